"""The same BiT in JAX and in PyTorch, compared rung by rung; `python -m parity --help`.

The comparison runs in a process that computes nothing. Each framework runs in processes of its own, and they exchange
files: `sides/inputs.py` -> `in_jax/tasks.py` and `in_torch/tasks.py` -> `ladder/rungs.py` -> `report/`.
"""
