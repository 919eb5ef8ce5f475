"""Which published figures can be checked here, and do they hold?

The figures with their sources and the commands that measure them, what is judged of a measured one, and what a
measurement would take.
It may import: input_pipeline, bit_jax.compiled, bit_jax.config, bit_jax.evaluate, bit_jax.formats, bit_jax.model,
bit_jax.plan, bit_jax.predictions, bit_jax.published, bit_jax.train, bit_jax.training.
"""
