"""The same BiT in JAX and in PyTorch, compared rung by rung; `python -m parity --help`.

The comparison runs in a process that computes nothing; each framework runs in processes of its own, and they exchange
files (`worker.py`). What flows where: `inputs.py` -> `jax_side.py`, `torch_side.py` -> `rungs.py` -> `report.py`.
"""
