"""Is it the same?

The rungs from weights to accuracy, and the verdict on what two sides computed.
It may import: input_pipeline, bit_jax, parity.sides, parity.faults, parity.options.
"""
