"""In which files do weights come and go?

The official `.npz`, what else people take for weights, and what a training run writes beside its own.
It may import: bit_jax.model, input_pipeline.
"""
