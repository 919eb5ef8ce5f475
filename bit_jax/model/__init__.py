"""What is BiT?

The architecture, its parameters, and the precision that all of it is computed in.
It may import: input_pipeline.
"""
