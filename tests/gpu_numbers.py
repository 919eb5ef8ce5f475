"""Logits and gradients in float32 on the default device: `gpu_numbers.py WEIGHTS IMAGES.npy FOUND.npz`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import bit_jax
from bit_jax import steps, weights
from bit_jax.resnetv2 import param_dtype


def logits_and_gradients(model: bit_jax.ResNetV2, params, images: np.ndarray) -> dict[str, np.ndarray]:
    """{"logits": [batch, classes], a parameter's key: its gradient}; image number n is of class n."""
    images = jnp.asarray(images, param_dtype(model.dtype))
    targets = jax.nn.one_hot(jnp.arange(len(images)), model.num_classes, dtype=images.dtype)

    def loss_of(params):
        logits = model.apply({"params": params}, images)
        return steps.cross_entropy(logits, targets).mean(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    return {key: np.asarray(array) for key, array in ({"logits": logits} | weights.flatten(gradients)).items()}


if __name__ == "__main__":
    weight_file, images, found = sys.argv[1:]
    np.savez(found, **logits_and_gradients(*bit_jax.load(weight_file), np.load(images)))
