"""How is it shown?

Comparisons are saved, and shown in the terminal, as JUnit XML and as HTML pages with plots.
It may import: input_pipeline, bit_jax, parity.sides, parity.ladder.
"""
