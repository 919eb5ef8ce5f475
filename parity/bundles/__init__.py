"""How is a comparison carried to another machine?

What the reference says is recorded in one file here, and another machine's framework is held against it there.
It may import: input_pipeline, bit_jax, parity.sides, parity.ladder, parity.options.
"""
