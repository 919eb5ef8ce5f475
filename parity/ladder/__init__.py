"""Is it the same?

Rungs from weights to accuracy ask two sides for the same work, and the verdict judges their answers.
It may import: input_pipeline, bit_jax, parity.sides, parity.faults, parity.options.
"""
