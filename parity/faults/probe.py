"""Faults in a linear probe: in the features that a head is trained on."""

from typing import Any
from unittest import mock

from parity.faults.registry import fault

PROBE: dict[str, Any] = {"additions": {"train": "head"}, "candidate": "jax:probe"}


def _with(other: Any) -> Any:
    """Replaces the function (model, parameters, images) -> features."""
    return mock.patch("bit_jax.predictions.rows.pooled", other)


@fault("a probe on the features of the image before", "gradients", "resnet/head/conv2d/kernel", **PROBE)
def shifted_features() -> Any:
    import jax.numpy as jnp

    from bit_jax.predictions import rows

    pooled = rows.pooled
    return _with(lambda model, params, images: jnp.roll(pooled(model, params, images), 1, axis=0))


@fault("a probe on features before the last GroupNorm and ReLU", "gradients", "resnet/head/conv2d/kernel", **PROBE)
def features_before_relu() -> Any:
    def before(model, params, images):
        features = model.apply({"params": params}, images, method="features")
        return features["block4"].astype(features["pooled"].dtype).mean(axis=(1, 2))

    return _with(before)
