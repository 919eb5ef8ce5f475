"""Logits and gradients in float32 on the default device: `gpu_numbers.py WEIGHTS IMAGES.npy FOUND.npz`."""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import bit_jax
from bit_jax.formats import weights
from bit_jax.model.layers import param_dtype
from bit_jax.training import steps


def logits_and_gradients(model: bit_jax.ResNetV2) -> Callable[..., dict[str, np.ndarray]]:
    """(params, images) -> {"logits": [batch, classes], a parameter's key: its gradient}; image n is of class n."""

    def loss_of(params, images):
        logits = model.apply({"params": params}, images)
        targets = jax.nn.one_hot(jnp.arange(len(images)), model.num_classes, dtype=images.dtype)
        return steps.cross_entropy(logits, targets).mean(), logits

    compiled = jax.jit(jax.value_and_grad(loss_of, has_aux=True))

    def compute(params, images) -> dict[str, np.ndarray]:
        (_, logits), gradients = compiled(params, jnp.asarray(images, param_dtype(model.dtype)))
        return {key: np.asarray(array) for key, array in ({"logits": logits} | weights.flatten(gradients)).items()}

    return compute


if __name__ == "__main__":
    weight_file, images, found = sys.argv[1:]
    model, params = bit_jax.load(weight_file)
    np.savez(found, **logits_and_gradients(model)(params, np.load(images)))
