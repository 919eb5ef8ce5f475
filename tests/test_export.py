"""Exported files: that they are the model, that one which is not is not written, and that others can use them."""

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import parity
from jax import export

import bit_jax
from bit_jax.export import check, onnx_graph, saved_model, stablehlo, targets
from bit_jax.export.source import LARGEST, Source
from bit_jax.formats import weights
from bit_jax.model.architecture import Architecture
from input_pipeline.errors import RequestError
from parity import faults

SHAPE = (3, 36, 45, 3)  # of the images that another process gives a file
# what a user without this project types; -S leaves out the files that would put it on the path
PROGRAMS = {
    ".stablehlo": """
import jax
exported = jax.export.deserialize(bytearray(open(path, "rb").read()))
logits = exported.call(images)
""",
    "beside.stablehlo": """
import jax
exported = jax.export.deserialize(bytearray(open(path, "rb").read()))
logits = exported.call(dict(np.load(path + ".npz")), images)
""",
    ".onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
[logits] = session.run(["logits"], {"images": images.transpose(0, 3, 1, 2)})
""",
    ".savedmodel": """
import tensorflow as tf
logits = tf.saved_model.load(path).signatures["serving_default"](images=images)["logits"]
""",
}
AROUND = """
import importlib.util, sys
import numpy as np
assert importlib.util.find_spec("bit_jax") is None
path, images = sys.argv[1], np.load(sys.argv[2])
{}
np.save(sys.argv[3], np.asarray(logits))
"""


@pytest.fixture(scope="module")
def source(small_npz):
    architecture, arrays = weights.read(small_npz)
    return Source(architecture, dict(arrays))


@pytest.fixture(scope="module", autouse=True)
def computed_once():
    """Compiles the model that files are held against once for all tests."""
    known, own_logits = {}, check.own_logits

    def once(source, batches, dtype):
        key = dtype, source.architecture, source.arrays["resnet/head/conv2d/bias"].tobytes()
        if key not in known:
            known[key] = own_logits(source, batches, dtype)
        return known[key]

    with mock.patch.object(check, "own_logits", once):
        yield


def outside(suffix, path, images, tmp_path):
    """Returns the logits that a process without this project computes from a file."""
    np.save(tmp_path / "images.npy", images)
    environment = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"], "JAX_PLATFORMS": "cpu"}
    program = AROUND.format(PROGRAMS[suffix])
    command = [sys.executable, "-S", "-c", program, path, tmp_path / "images.npy", tmp_path / "logits.npy"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / "logits.npy")


def compared(source, logits, images):
    """Holds float32 logits of a file against the model's in float64, image by image."""
    [exact] = check.own_logits.__wrapped__(source, [images], np.float64)
    np.testing.assert_allclose(logits, exact, atol=3e-5)
    np.testing.assert_array_equal(logits.argmax(1), exact.argmax(1))


def test_sizes_may_stay_open_and_change_nothing(source, x64):
    """All three sizes of the images are symbolic, in one program for three platforms."""
    exported = stablehlo.trace(source, np.dtype(np.float64), beside=False)
    assert [str(size) for size in exported.in_avals[0].shape] == ["batch", "height", "width", "3"]
    assert exported.platforms == ("cpu", "cuda", "tpu")
    images = np.random.default_rng(1).uniform(-1, 1, (2, 39, 50, 3))
    [exact] = own(source, images)
    np.testing.assert_allclose(jax.jit(exported.call)(images), exact, rtol=0, atol=1e-11)
