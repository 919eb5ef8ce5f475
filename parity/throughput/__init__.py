"""How fast is it?

Arms are timed in turns on the same work, and every convolution by itself.
It may import: input_pipeline, bit_jax, parity.sides, parity.faults, parity.ladder, parity.report.
"""
