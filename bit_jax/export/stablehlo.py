"""Writes the model as `jax.export` serializes it: StableHLO for CPUs, NVIDIA's GPUs and TPUs, of any image size."""

import contextlib
import importlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from bit_jax.export.source import Source
from bit_jax.formats.weights import save, unflatten
from input_pipeline.errors import RequestError

PLATFORMS = ("cpu", "cuda", "tpu")
SHAPE = "batch, height, width, 3"
BESIDE = ".npz"  # what the file of the weights adds to the program's name


def require(*, checked: bool) -> None:
    """Raises RequestError where flatbuffers, which serializing needs, is not installed."""
    try:
        importlib.import_module("flatbuffers")
    except ImportError as error:
        raise RequestError(f"a .stablehlo needs {error.name}; pip install 'bit-jax[stablehlo]'") from None


def write(source: Source, path: Path, dtype: np.dtype, *, beside: bool) -> None:
    """Writes images [batch, height, width, 3] in [-1, 1] -> logits [batch, classes]; all three sizes are symbolic.

    Args:
        source: the model.
        path: the file.
        dtype: of images, weights and logits; products of float32 are exact on every platform.
        beside: False: the file holds the weights, with kernels standardized. True: the exported function takes
            ({official key: array}, images), as `dict(numpy.load(path + ".npz"))` gives them, and standardizes kernels.

    Raises:
        RequestError: the weights do not fit into the file.
    """
    if not beside:
        source.require_room(dtype)
    with _mode(dtype):
        path.write_bytes(trace(source, dtype, beside=beside).serialize())
    if beside:
        arrays = {key: array.astype(dtype) for key, array in source.arrays.items()}
        beside_path = path.with_name(path.name + BESIDE)
        save(beside_path, unflatten(arrays), standardize_eps=source.architecture.standardize_eps)


def trace(source: Source, dtype: np.dtype, *, beside: bool) -> export.Exported:
    """Returns the exported function; see `write`."""
    images = jax.ShapeDtypeStruct(export.symbolic_shape(SHAPE), dtype)
    model = source.architecture.model(dtype)
    if beside:

        def of_both(arrays, images):
            return model.apply({"params": unflatten(arrays)}, images)

        shapes = {key: jax.ShapeDtypeStruct(array.shape, dtype) for key, array in source.arrays.items()}
        return export.export(jax.jit(of_both), platforms=PLATFORMS)(shapes, images)
    params = unflatten({key: jnp.asarray(array) for key, array in source.folded(dtype).items()})
    model = model.clone(standardized=True)
    return export.export(jax.jit(lambda images: model.apply({"params": params}, images)), platforms=PLATFORMS)(images)


def run(path: Path, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns the logits of batches of images, as the file computes them on JAX's default device."""
    with _mode(batches[0].dtype):
        exported = export.deserialize(bytearray(path.read_bytes()))
        call = jax.jit(exported.call)
        if len(exported.in_avals) == 1:
            return [np.asarray(call(images)) for images in batches]
        with np.load(path.with_name(path.name + BESIDE)) as file:
            arrays = dict(file)
        return [np.asarray(call(arrays, images)) for images in batches]


def _mode(dtype: np.dtype) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which JAX has 64-bit types where they are needed, and has not where they are not."""
    return jax.enable_x64(jnp.dtype(dtype) == jnp.float64)
