"""Writes the model in TensorFlow's own operations as a SavedModel, and runs one: in a process without JAX.

`python -m bit_jax.export.tensorflow_graph write WEIGHTS.npz UNITS DIRECTORY` and
`python -m bit_jax.export.tensorflow_graph run DIRECTORY IMAGES.npz LOGITS.npz` are how `saved_model.py` calls it.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow

tf: Any = tensorflow  # its types know neither NumPy's arrays nor explicit padding

GROUPS, NORM_EPS = 32, 1e-5  # as `bit_jax.model` has them, which this process does not import
SIGNATURE = "serving_default"


class BiT(tensorflow.Module):
    """Images [batch, height, width, 3] in [-1, 1] -> {"logits": [batch, classes]}; batch, height and width are open.

    Args:
        weights: {official key: array}, kernels standardized and HWIO.
        units: units in each of the four stages.
    """

    def __init__(self, weights: dict[str, np.ndarray], units: Sequence[int]):
        super().__init__()
        self.units = units
        self.weights = {key: tf.Variable(array, trainable=False, name=key) for key, array in weights.items()}

    def weight(self, key: str) -> Any:
        return self.weights[f"resnet/{key}"]

    def std_conv(self, x, place: str, stride: int):
        kernel = self.weight(f"{place}/standardized_conv2d/kernel")
        pad = [(kernel.shape[0] - 1) // 2] * 2
        return tf.nn.conv2d(x, kernel, stride, padding=[[0, 0], pad, pad, [0, 0]])

    def group_norm_relu(self, x, place: str):
        gamma, beta = (self.weight(f"{place}/{name}") for name in ("gamma", "beta"))
        shape = tf.shape(x)
        grouped = tf.reshape(x, [shape[0], shape[1] * shape[2], GROUPS, x.shape[3] // GROUPS])
        mean, variance = tf.nn.moments(grouped, [1, 3], keepdims=True)
        normal = (grouped - mean) * tf.math.rsqrt(variance + NORM_EPS)
        return tf.nn.relu(tf.ensure_shape(tf.reshape(normal, shape), x.shape) * gamma + beta)

    def unit(self, x, place: str, stride: int, *, project: bool):
        active = self.group_norm_relu(x, f"{place}/a/group_norm")
        shortcut = self.std_conv(active, f"{place}/a/proj", stride) if project else x
        y = self.std_conv(active, f"{place}/a", 1)
        y = self.std_conv(self.group_norm_relu(y, f"{place}/b/group_norm"), f"{place}/b", stride)
        return self.std_conv(self.group_norm_relu(y, f"{place}/c/group_norm"), f"{place}/c", 1) + shortcut

    def logits(self, images):
        x = self.std_conv(images, "root_block", 2)
        # zeros, not -inf: the checkpoints were trained with a zero-padded pool
        x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")
        for stage, units in enumerate(self.units, start=1):
            for unit in range(1, units + 1):
                first = unit == 1
                x = self.unit(x, f"block{stage}/unit{unit:02d}", 2 if first and stage > 1 else 1, project=first)
        features = tf.reduce_mean(self.group_norm_relu(x, "group_norm"), [1, 2])
        return {"logits": features @ self.weight("head/conv2d/kernel")[0, 0] + self.weight("head/conv2d/bias")}


def write(weights: str, units: str, directory: str) -> None:
    with np.load(weights) as file:
        model = BiT(dict(file), json.loads(units))
    images = tf.TensorSpec([None, None, None, 3], model.weight("head/conv2d/bias").dtype, name="images")
    call = tf.function(model.logits, input_signature=[images], autograph=False)
    tf.saved_model.save(model, directory, signatures={SIGNATURE: call})


def run(directory: str, images: str, logits: str) -> None:
    call = tf.saved_model.load(directory).signatures[SIGNATURE]
    with np.load(images) as file:
        np.savez(logits, **{key: call(images=tf.constant(file[key]))["logits"].numpy() for key in file.files})


if __name__ == "__main__":
    {"write": write, "run": run}[sys.argv[1]](*sys.argv[2:])
