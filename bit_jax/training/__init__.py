"""How is BiT trained?

From the flags of a run to its result: recipe, training step, loop, evaluation, log and figures.
It may import: input_pipeline, bit_jax.config, bit_jax.formats, bit_jax.model, bit_jax.scale, bit_jax.compiled,
bit_jax.published, bit_jax.accounts, bit_jax.process, bit_jax.watching, bit_jax.checkpoints, bit_jax.stores.
"""
