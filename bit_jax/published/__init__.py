"""Which weights are published, and how does one get them?

The catalogue of BiT's files, the fetching and verifying of one, and the file that a `--model` argument names.
It may import: input_pipeline, bit_jax.config, bit_jax.formats, bit_jax.model.
"""
