"""What does a compiled program do?

Reading the text that XLA leaves of a program, the peaks of GPUs, and where the time of a traced step goes.
It may import: input_pipeline, bit_jax.model.
"""
