"""In which files do weights come and go?

The official `.npz`; the original PyTorch code's, timm's and Hugging Face's files; what else people take for weights;
and what is written beside them. `pickles` alone imports PyTorch, when such a file is read or written.
It may import: bit_jax.model, input_pipeline.
"""
