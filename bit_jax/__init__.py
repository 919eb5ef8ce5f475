"""BiT (Big Transfer) in JAX: `load` an official `.npz`, apply or fine-tune the `ResNetV2`, `save` it again."""

from bit_jax.resnetv2 import ResNetV2
from bit_jax.weights import load, save

__all__ = ["ResNetV2", "load", "save"]
