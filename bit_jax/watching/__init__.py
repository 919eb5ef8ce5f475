"""Are the numbers of a run still sane?

From gradients, updates and activations to the few numbers that are looked at, from losses to those that stand out, and
from each device's copy of the parameters to the one that differs.
It may import: input_pipeline, bit_jax.model, bit_jax.scale, bit_jax.process.
"""
