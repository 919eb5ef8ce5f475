"""What became of runs?

From the files that runs leave in their work directories to a table of them all, and to FlagPerf's card.
It may import: input_pipeline, bit_jax.config, bit_jax.compiled, bit_jax.training, bit_jax.accounts, bit_jax.watching.
"""
