"""Where is the state of a run kept while it trains, and when is it saved?

Shared checkpoints in the work directory or in an object store, frequent local copies on each host, and what decides
that one of them is due.
It may import: input_pipeline, bit_jax.config, bit_jax.scale, bit_jax.stores.
"""
