"""BiT (Big Transfer) in JAX: `load` an official `.npz`, apply or fine-tune the `ResNetV2`, `save` it again."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bit_jax.formats.weights import load, save
    from bit_jax.model.resnetv2 import ResNetV2

__all__ = ["ResNetV2", "load", "save"]


def __getattr__(name: str) -> Any:
    """Imports JAX when one of the names is first used, because PyTorch's side of a comparison does without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bit_jax.formats import weights
    from bit_jax.model import resnetv2

    return getattr(resnetv2 if name == "ResNetV2" else weights, name)
