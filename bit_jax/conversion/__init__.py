"""Where can a model be taken to?

What is converted, the kinds of targets in one table, and the proof that a target computes what its source does.
It may import: bit_jax.formats, bit_jax.model, input_pipeline.
"""
