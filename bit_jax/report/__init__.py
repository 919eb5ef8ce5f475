"""What became of runs?

From the files that runs leave in their work directories to tables of them all, to FlagPerf's card and to a page.
It may import: input_pipeline, bit_jax.config, bit_jax.compiled, bit_jax.training, bit_jax.accounts,
bit_jax.pages, bit_jax.watching, bit_jax.stores.
"""
