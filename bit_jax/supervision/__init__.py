"""When is a run started again, on which hosts, and when is it given up?

It may import: input_pipeline, bit_jax.process, bit_jax.stores.
"""
