"""What is the model outside of this project?

A StableHLO program, an ONNX graph or a TensorFlow SavedModel of images in, logits out; and the check that it is right.
It may import: bit_jax.model, bit_jax.formats, input_pipeline.
"""
