"""How is the work spread over devices and hosts?

The mesh, what lies where on it, and hosts that start, watch and end each other.
It may import: input_pipeline, bit_jax.config.
"""
