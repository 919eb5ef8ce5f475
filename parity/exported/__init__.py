"""What does an exported file compute?

ONNX runs in onnxruntime, in a process without JAX and PyTorch; StableHLO runs in JAX. No other folder imports
onnxruntime.
It may import: input_pipeline, bit_jax, parity.sides.
"""
