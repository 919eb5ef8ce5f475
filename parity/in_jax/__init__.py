"""What does JAX compute?

The tasks that a side owes, made of the functions that `train.py` trains with.
It may import: input_pipeline, bit_jax, parity.sides, parity.faults.
"""
