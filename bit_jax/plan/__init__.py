"""What would it take?

A train step is compiled for GPUs that are not here, and its program tells memory, traffic, collectives and a roofline.
It may import: input_pipeline, bit_jax.config, bit_jax.compiled, bit_jax.model, bit_jax.published, bit_jax.scale,
bit_jax.training.
"""
