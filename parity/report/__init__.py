"""How is it shown?

Saved comparisons, tables in the terminal, JUnit, and HTML pages with plots.
It may import: input_pipeline, bit_jax, parity.sides, parity.ladder.
"""
