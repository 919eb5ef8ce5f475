"""What does a trained model say of images, and how often is it right?

The head's classes by name, the work over all devices and hosts, accuracies with intervals, and the pages
that show them.
It may import: input_pipeline, bit_jax.formats, bit_jax.model, bit_jax.scale, bit_jax.training, bit_jax.pages.
"""
