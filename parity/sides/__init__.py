"""Who is compared, on which work?

A side is a framework and how it runs; each has a process of its own, and both are given the same files.
It may import: input_pipeline, bit_jax.
"""
