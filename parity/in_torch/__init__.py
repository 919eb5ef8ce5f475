"""What does PyTorch compute?

The reference model, other people's models, and the tasks that a side owes. No other folder imports torch.
It may import: input_pipeline, bit_jax, parity.sides, parity.faults.
"""
