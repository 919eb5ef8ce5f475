"""Weight files -> the parameters of `ResNetV2` -> the official `.npz`, strict both ways.

A parameter's path, joined by "/" and put behind `resnet/`, is its key in the file; nothing else is translated.
"""

import contextlib
import dataclasses
import numbers
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bit_jax.formats import comment
from bit_jax.formats.official import NOT_FINITE, WeightsError, fits_float32, listed
from bit_jax.formats.sources import open_source
from bit_jax.model.architecture import (
    GROUPS,
    HEAD_BIAS,
    HEAD_KERNEL,
    PREFIX,
    ROOT_KERNEL,
    STAGES,
    STANDARDIZE_EPS,
    Architecture,
)
from bit_jax.model.layers import param_dtype
from bit_jax.model.resnetv2 import ResNetV2
from input_pipeline.errors import RequestError
from input_pipeline.files import replacing, user_path

COMPUTED = tuple(jnp.dtype(kind) for kind in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64))

Params = dict[str, Any]


def load(
    path: str | os.PathLike, *, num_classes: int | None = None, dtype=jnp.float32, standardize_eps: float | None = None
) -> tuple[ResNetV2, Params]:
    """Reads a BiT: an official `.npz`, or safetensors, a `torch.save` file or a directory of the original code, timm or
    Hugging Face, whatever its name. Depth, width and head are read off the file.

    Args:
        path: the file or directory; `~` is the home directory.
        num_classes: replaces the file's head by one of this size, of zeros, as BiT transfers. 0: leaves the head out,
            so that the model returns the pooled features. None: keeps the head.
        dtype: what the model computes in. Parameters are float32, or float64 where `dtype` is (which needs x64).
        standardize_eps: what the model adds to a kernel's variance; None: what the file says, else what such
            files are computed with: 1e-10, and 1e-8 under the names of timm or Hugging Face.

    Returns:
        The model and its parameters, on JAX's default device: `model.apply({"params": params}, images)`.

    Raises:
        WeightsError: the file is missing, damaged, not a BiT, or holds values that are not finite in float32.
        RequestError: the file cannot be read for another reason, which the message gives, or an argument is wrong.
    """
    dtype = _computed(dtype)
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise RequestError("float64 needs 64-bit mode: jax.config.update('jax_enable_x64', True), before any array")
    architecture, arrays = read(path, num_classes=num_classes, standardize_eps=standardize_eps)
    stored = param_dtype(dtype)
    flat = {key: jnp.asarray(array, stored) for key, array in arrays}
    return architecture.model(dtype), unflatten(flat)


def _computed(dtype: Any) -> np.dtype:
    with contextlib.suppress(TypeError):  # it is the name or type of no dtype
        if (known := jnp.dtype(dtype)) in COMPUTED:
            return known
    raise RequestError(f"dtype {dtype!r} is not computed in; choose one of {', '.join(map(str, COMPUTED))}")


def read(
    path: str | os.PathLike, *, num_classes: int | None = None, standardize_eps: float | None = None
) -> tuple[Architecture, Iterator[tuple[str, np.ndarray]]]:
    """Returns the architecture of a file, checked whole, and its arrays one at a time, under their official keys.

    The names and shapes are checked before this returns; contents (checksum, finite values) as they are read.
    The arrays' order is the file's, a replaced head last.

    Raises:
        WeightsError, RequestError: see `load`.
    """
    if num_classes is not None and not _is_count(num_classes):
        raise RequestError(
            f"num_classes is {num_classes!r}; give a whole number from 1 for a new head, 0 for none, or None to keep it"
        )
    if standardize_eps is not None:
        _require_eps(standardize_eps)
    path = user_path(path)
    source = open_source(path)
    architecture, kept = _architecture_of(source.shapes, path), list(source.shapes)
    if num_classes is not None:
        kept = [key for key in kept if key not in (HEAD_KERNEL, HEAD_BIAS)]
        architecture = dataclasses.replace(architecture, num_classes=num_classes)
    elif not architecture.num_classes:
        raise WeightsError(
            f"{path} holds a BiT without a head; give the number of classes of a new head (num_classes, --num-classes "
            "of convert), or num_classes=0 for its features",
            missing=[HEAD_KERNEL, HEAD_BIAS],
        )
    eps = source.standardize_eps if standardize_eps is None else standardize_eps
    architecture = dataclasses.replace(architecture, standardize_eps=eps)

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        yield from source.arrays(kept)
        for key, shape in architecture.layout.items():
            if key not in kept:
                yield key, _zeros(shape)

    return architecture, arrays()


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of a new head; raises RequestError where there is no room for it."""
    try:
        return np.zeros(shape, np.float32)
    except (MemoryError, ValueError):  # NumPy raises the latter where the size is no 64-bit number
        raise RequestError(
            f"a head of {shape[-1]:,} classes does not fit into this machine's memory; give a smaller number of them"
        ) from None


def with_telling_head(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Returns the arrays themselves; where the head's kernel is all zeros, as BiT transfers, copies with fixed random
    numbers in it, so that the logits depend on all other arrays."""
    if arrays[HEAD_KERNEL].any():
        return arrays
    kernel = np.random.default_rng(0).normal(0, 0.01, arrays[HEAD_KERNEL].shape)
    return {**arrays, HEAD_KERNEL: kernel.astype(arrays[HEAD_KERNEL].dtype)}


def _require_eps(eps: object) -> None:
    if not comment.is_eps(eps):
        raise RequestError(f"standardize_eps is {eps!r}; give a positive number below 1, or None")


def _is_count(number: object) -> bool:
    return isinstance(number, numbers.Integral) and not isinstance(number, bool) and int(number) >= 0


def _architecture_of(shapes: dict[str, tuple[int, ...]], where: str | Path) -> Architecture:
    """Reads depth, width and head off the keys and shapes, then holds every key and shape against them. Where neither
    of the head's arrays is there, the architecture has 0 classes."""
    headless = HEAD_KERNEL not in shapes and HEAD_BIAS not in shapes
    root, head = shapes.get(ROOT_KERNEL, ()), shapes.get(HEAD_KERNEL, ())
    if len(root) != 4 or (len(head) != 4 and not headless):
        absent = [key for key, shape in ((ROOT_KERNEL, root), (HEAD_KERNEL, head)) if len(shape) != 4]
        raise WeightsError(
            f"{where} is not a BiT in the official layout: no 4-dimensional {' and '.join(absent)} "
            f"among its {len(shapes)} arrays ({listed(list(shapes))})",
            missing=absent,
        )
    units = [0] * STAGES
    for key in shapes:
        match = re.match(rf"resnet/block([1-{STAGES}])/unit(\d{{2,9}})/", key)
        if match:
            units[int(match[1]) - 1] = max(units[int(match[1]) - 1], int(match[2]))
    if sum(units) > len(shapes):
        counts = ", ".join(map(str, units))
        raise WeightsError(f"{where} names more units ({counts} in its stages) than it has arrays ({len(shapes)})")
    if root[3] % GROUPS or not root[3]:
        raise WeightsError(f"{where} has {root[3]} root channels; GroupNorm needs a multiple of {GROUPS}")
    if not headless and not head[3]:
        raise WeightsError(f"{where} has a head of 0 classes; a head has at least 1")
    # a stage without units is no BiT: its first unit is then listed as missing
    num_classes = 0 if headless else head[3]
    architecture = Architecture(tuple(max(count, 1) for count in units), root[3] / 64, num_classes)
    _require_layout(architecture, shapes, where)
    return architecture


def _require_layout(architecture: Architecture, shapes: dict[str, tuple[int, ...]], where: str | Path) -> None:
    """Raises WeightsError that lists every key that is missing, extra or of another shape."""
    expected = architecture.layout
    missing = [key for key in expected if key not in shapes]
    extra = [key for key in shapes if key not in expected]
    misshapen = [
        f"{key} is {shapes[key]}, not {shape}" for key, shape in expected.items() if shapes.get(key, shape) != shape
    ]
    if missing or extra or misshapen:
        raise WeightsError(
            f"{where} does not hold a {architecture}: {len(missing)} missing ({listed(missing)}); "
            f"{len(extra)} extra ({listed(extra)}); {len(misshapen)} misshapen ({listed(misshapen)})",
            missing,
            extra,
            misshapen,
        )


def save(
    path: str | os.PathLike,
    params: Params,
    *,
    standardize_eps: float | None = None,
    fetch: Callable[[Any], np.ndarray] = np.asarray,
) -> None:
    """Writes parameters in the official layout, atomically, in float32; float64 stays float64.

    The same parameters give the same bytes. Narrower floats, such as bfloat16, become float32, which holds all their
    values. Whatever this function accepts, `load` reads; parameters without a head, where it is told `num_classes`.

    Args:
        path: the file; one that exists is replaced.
        params: the parameter tree; its keys, shapes and dtypes are checked before anything is written.
        standardize_eps: what the model adds to a kernel's variance, `model.standardize_eps`; None: BiT's 1e-10. Another
            value is kept in the file, as the zip's comment.
        fetch: brings an array to this host. Values are looked at as they come, and the file gets its name at the end.

    Raises:
        WeightsError: the parameters are not those of a ResNetV2, not floats, or not finite in float32; whatever was
            at `path` is untouched.
    """
    where = "the parameters to save"
    if standardize_eps is not None:
        _require_eps(standardize_eps)
    flat = flatten(params)
    if wrong := {key: leaf for key, leaf in flat.items() if _written_dtype(leaf) is None}:
        kinds = [f"{key} ({getattr(leaf, 'dtype', type(leaf).__name__)})" for key, leaf in wrong.items()]
        raise WeightsError(f"{where} hold something else than floats: {listed(kinds)}; convert them first", extra=wrong)
    _architecture_of({key: array.shape for key, array in flat.items()}, where)
    not_finite = []
    with replacing(user_path(path)) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = comment.written(STANDARDIZE_EPS if standardize_eps is None else standardize_eps)
            for key, array in flat.items():
                fetched = np.asarray(fetch(array)).astype(_written_dtype(array), copy=False)
                if not fits_float32(fetched):
                    not_finite.append(key)
                # force_zip64 as numpy.savez does: a member's size is not known when its header is written
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, fetched, allow_pickle=False)
        if not_finite:  # nothing of the file remains: it had no name yet
            raise WeightsError(f"{where} hold {NOT_FINITE} in {listed(not_finite)}; nothing was written")


def _written_dtype(leaf: Any) -> np.dtype | None:
    """Returns the dtype that an array is written in; None where it holds no floats or wider ones than float64."""
    dtype = getattr(leaf, "dtype", None)
    if not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        return None
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def flatten(params: Params) -> dict[str, Any]:
    """Returns the parameter tree as {official key: array}, sorted by key.

    Raises:
        WeightsError: it is not a tree of dictionaries with names as keys.
    """
    if not _is_tree(params):
        raise WeightsError("the parameters are not a tree of dictionaries with names as keys, such as `load` returns")
    flat = traverse_util.flatten_dict(params, sep="/")
    return {PREFIX + key: flat[key] for key in sorted(flat)}


def _is_tree(params: Any) -> bool:
    def named(tree: Any) -> bool:
        below = [child for child in tree.values() if isinstance(child, Mapping)]
        return all(isinstance(key, str) for key in tree) and all(map(named, below))

    return isinstance(params, Mapping) and named(params)


def unflatten(flat: dict[str, Any]) -> Params:
    """Returns {official key: array} as a parameter tree."""
    return traverse_util.unflatten_dict({key.removeprefix(PREFIX): array for key, array in flat.items()}, sep="/")
