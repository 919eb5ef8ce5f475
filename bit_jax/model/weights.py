"""The official BiT `.npz` <-> the parameters of `ResNetV2`: one name table, strict both ways.

A parameter's path, joined by "/" and put behind `resnet/`, is its key in the file; nothing else is translated.
Files are read one array at a time (NumPy stores them uncompressed), so that loading takes one copy of the
parameters and little more than the time to read the file.
"""

import contextlib
import dataclasses
import errno
import io
import math
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

from bit_jax.model import formats
from bit_jax.model.architecture import GROUPS, HEAD_BIAS, HEAD_KERNEL, PREFIX, ROOT_KERNEL, STAGES, Architecture
from bit_jax.model.layers import param_dtype
from bit_jax.model.resnetv2 import ResNetV2
from input_pipeline.errors import RequestError
from input_pipeline.files import replacing, user_path
from input_pipeline.terminal import printable

CHUNK = 1 << 20  # bytes read at a time: they stay in the processor's cache between checksum and copy
ALIGNMENT = 64  # bytes
LISTED = 12  # names that an error message spells out of each kind; the exception's attributes hold all
SPELLED = 120  # characters of each
HEADER = 1 << 14  # bytes: no array's header is longer, because NumPy refuses those above 10,000
EXPANSION = 100  # bytes that one byte of a file may become: weights hardly shrink, zip bombs do by a thousand
LARGEST = float(np.finfo(np.float32).max)  # of the values in a file, which every `load` must be able to hold
NOT_FINITE = "NaN, infinite values or ones beyond float32's range"
AGAIN = "move it aside and get it again"

COMPUTED = tuple(jnp.dtype(each) for each in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64))

Params = dict[str, Any]


class WeightsError(RequestError):
    """The file or the parameters are not a BiT in the official layout.

    Attributes:
        missing, extra, misshapen: every offending key; misshapen ones with both shapes.
    """

    def __init__(self, message: str, missing=(), extra=(), misshapen=()):
        super().__init__(message)
        self.missing, self.extra, self.misshapen = list(missing), list(extra), list(misshapen)


def load(path: str | os.PathLike, *, num_classes: int | None = None, dtype=jnp.float32) -> tuple[ResNetV2, Params]:
    """Reads an official BiT `.npz`; depth, width and head are read off the file.

    Args:
        path: the file; `~` is the home directory.
        num_classes: replaces the file's head by one of this size, of zeros, as BiT transfers.
        dtype: what the model computes in. Parameters are float32, or float64 where `dtype` is (which needs x64).

    Returns:
        The model and its parameters, on JAX's default device: `model.apply({"params": params}, images)`.

    Raises:
        WeightsError: the file is missing, damaged, not a BiT, or holds values that are not finite in float32.
        RequestError: the file cannot be read for another reason, which the message gives, or an argument is wrong.
    """
    dtype = _computed(dtype)
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise RequestError("float64 needs 64-bit mode: jax.config.update('jax_enable_x64', True), before any array")
    architecture, arrays = read(path, num_classes=num_classes)
    kept = param_dtype(dtype)
    flat = {key: jnp.asarray(array, kept) for key, array in arrays}
    return architecture.model(dtype), unflatten(flat)


def _computed(dtype: Any) -> np.dtype:
    with contextlib.suppress(TypeError):  # it is the name or type of no dtype
        if (known := jnp.dtype(dtype)) in COMPUTED:
            return known
    raise RequestError(f"dtype {dtype!r} is not computed in; choose one of {', '.join(map(str, COMPUTED))}")


def read(
    path: str | os.PathLike, *, num_classes: int | None = None
) -> tuple[Architecture, Iterator[tuple[str, np.ndarray]]]:
    """The architecture of a file, checked whole, and its arrays one at a time, under their official keys.

    The names and shapes are checked before this returns; contents (checksum, finite values) as they are read.
    The arrays' order is the file's, a replaced head last.

    Raises:
        WeightsError, RequestError: see `load`.
    """
    if num_classes is not None and not _is_count(num_classes):
        raise RequestError(f"num_classes is {num_classes!r}; give a whole number from 1, or None to keep the head")
    path = user_path(path)
    members = _members(path)
    architecture = _architecture({key: member.shape for key, member in members.items()}, path)
    if num_classes is None:
        return architecture, _arrays(path, members)
    architecture = dataclasses.replace(architecture, num_classes=num_classes)
    body = {key: member for key, member in members.items() if key not in (HEAD_KERNEL, HEAD_BIAS)}
    shapes = architecture.layout

    def with_new_head() -> Iterator[tuple[str, np.ndarray]]:
        yield from _arrays(path, body)
        yield from ((key, np.zeros(shapes[key], np.float32)) for key in (HEAD_KERNEL, HEAD_BIAS))

    return architecture, with_new_head()


def save(path: str | os.PathLike, params: Params, *, fetch: Callable[[Any], np.ndarray] = np.asarray) -> None:
    """Writes parameters in the official layout, atomically, in float32; float64 stays float64.

    The same parameters give the same bytes. Narrower floats, such as bfloat16, become float32, which holds all their
    values. Whatever this function accepts, `load` reads.

    Args:
        path: the file; one that exists is replaced.
        params: the parameter tree; its keys, shapes and dtypes are checked before anything is written.
        fetch: brings an array to this host. Values are looked at as they come, and the file gets its name at the end.

    Raises:
        WeightsError: the parameters are not those of a ResNetV2, not floats, or not finite in float32; whatever was
            at `path` is untouched.
    """
    where = "the parameters to save"
    flat = flatten(params)
    if wrong := {key: leaf for key, leaf in flat.items() if _kept(leaf) is None}:
        kinds = [f"{key} ({getattr(leaf, 'dtype', type(leaf).__name__)})" for key, leaf in wrong.items()]
        raise WeightsError(f"{where} hold something else than floats: {_some(kinds)}; convert them first", extra=wrong)
    _architecture({key: array.shape for key, array in flat.items()}, where)
    not_finite = []
    with replacing(user_path(path)) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for key, array in flat.items():
                fetched = np.asarray(fetch(array)).astype(_kept(array), copy=False)
                if not _finite(fetched):
                    not_finite.append(key)
                # force_zip64 as numpy.savez does: a member's size is not known when its header is written
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, fetched, allow_pickle=False)
        if not_finite:  # nothing of the file remains: it had no name yet
            raise WeightsError(f"{where} hold {NOT_FINITE} in {_some(not_finite)}; nothing was written")


def _kept(leaf: Any) -> np.dtype | None:
    """What an array's numbers are written as; None where they are no floats or wider than float64."""
    dtype = getattr(leaf, "dtype", None)
    if not isinstance(dtype, np.dtype) or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        return None
    return np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def _is_count(number: object) -> bool:
    return isinstance(number, numbers.Integral) and not isinstance(number, bool) and int(number) > 0


def flatten(params: Params) -> dict[str, Any]:
    """Parameter tree -> {official key: array}, sorted by key.

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
    """{official key: array} -> parameter tree."""
    return traverse_util.unflatten_dict({key.removeprefix(PREFIX): array for key, array in flat.items()}, sep="/")


@dataclasses.dataclass(frozen=True)
class _Member:
    """An array in the archive: where it is and what its header says."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int  # of the data within the member, in bytes


def _members(path: Path) -> dict[str, _Member]:
    """{official key: member} of the file; reads only headers, and believes no size that the file cannot have."""
    try:
        if other := formats.recognize(path):
            raise WeightsError(f"{path} {other}")
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            _check_sizes(infos, path)
            return _headers(archive, infos, path)
    except WeightsError:
        raise
    except FileNotFoundError:
        raise WeightsError(
            f"weight file {path} does not exist; `python -m bit_jax.zoo list` names those that can be fetched"
        ) from None
    except Exception as error:  # damaged directories make zipfile raise many kinds
        raise _unreadable(path, "is truncated or damaged", error) from None


def _headers(archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo], path: Path) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    problems = []
    for info in infos:
        name = info.filename
        try:
            member = _header(archive, info)
        except Exception as error:  # damaged headers make zipfile and NumPy raise many kinds
            if _of_the_system(error):
                raise
            problems.append(f"{name} ({str(error)[:SPELLED]})")
            continue
        # some published files number their convolutions: standardized_conv2d_17
        key = re.sub(r"standardized_conv2d_\d+(?=/)", "standardized_conv2d", name.removesuffix(".npy"))
        if key in members:
            problems.append(f"{name} (a second array for {key})")
        members[key] = member
    if problems:
        raise WeightsError(f"{path} holds members that are not plain arrays: {_some(problems)}", extra=problems)
    return members


def _of_the_system(error: BaseException) -> bool:
    """Whether an error says nothing about a file's content: it could not be read, or memory is short.

    EINVAL is a place that a damaged file names and no file has.
    """
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL))


def _unreadable(path: Path, damage: str, error: Exception) -> RequestError:
    """What to raise where reading failed: damage is only what was read and is wrong."""
    if isinstance(error, OSError) and _of_the_system(error):
        return RequestError(f"cannot read {path}: {error.strerror}; mend that and start again")
    if isinstance(error, MemoryError):
        return RequestError(f"cannot read {path}: it does not fit into this machine's memory")
    return WeightsError(f"{path} {damage} ({error}); {AGAIN}")


def _check_sizes(infos: list[zipfile.ZipInfo], path: Path) -> None:
    """Raises WeightsError where members are said to be larger than a file of this size can hold."""
    there = path.stat().st_size
    packed, unpacked = sum(info.compress_size for info in infos), sum(info.file_size for info in infos)
    if packed > there or unpacked > EXPANSION * there:
        raise WeightsError(
            f"{path} is damaged or no weight file: its {there:,} bytes are said to hold {unpacked:,}; {AGAIN}"
        )


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    """Raises ValueError where the member is not a plain array of floating-point numbers."""
    if not info.filename.endswith(".npy"):
        raise ValueError("not an .npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compression {info.compress_type}, which NumPy does not write")
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise ValueError(f"{info.compress_size:,} bytes in place of {info.file_size:,}")
    with archive.open(info) as member:
        start = io.BytesIO(member.read(HEADER))
    version = np.lib.format.read_magic(start)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"npy format {version}")
    shape, fortran_order, dtype = read_header(start)
    if dtype.hasobject:
        raise ValueError("pickled Python objects are refused")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"dtype {dtype}, not a float of at most 64 bits")
    if min(shape, default=0) < 0 or info.file_size != start.tell() + dtype.itemsize * math.prod(shape):
        raise ValueError(f"{info.file_size:,} bytes for shape {shape}")
    return _Member(info, shape, dtype, fortran_order, start.tell())


def _arrays(path: Path, members: dict[str, _Member]) -> Iterator[tuple[str, np.ndarray]]:
    """Every array, one copy of its bytes in memory; the zip's CRC-32 is checked on the way."""
    not_finite = []
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        raise _unreadable(path, "has changed while it was read", error) from None
    with archive:
        for key, member in members.items():
            try:
                data = _aligned_bytes(member.info.file_size - member.offset)
                with archive.open(member.info) as file:
                    file.read(member.offset)
                    for start in range(0, len(data), CHUNK):
                        part = data[start : start + CHUNK]
                        part[:] = np.frombuffer(file.read(len(part)), np.uint8)
                    file.read()  # the end, where the checksum is compared
                order = "F" if member.fortran_order else "C"
                array = np.ndarray(member.shape, member.dtype, buffer=data, order=order)
            except Exception as error:  # damaged contents make zipfile, zlib and NumPy raise many kinds
                raise _unreadable(path, f"is damaged at {key}", error) from None
            if not _finite(array):
                not_finite.append(key)
            yield key, array
    if not_finite:
        raise WeightsError(f"{path} holds {NOT_FINITE} in {_some(not_finite)}; {AGAIN}")


def _aligned_bytes(count: int) -> np.ndarray:
    """uint8 [count] at an address that JAX's CPU backend takes over without a copy."""
    buffer = np.empty(count + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + count]


def _finite(array: np.ndarray) -> bool:
    """Whether all values are finite in float32."""
    if array.dtype.itemsize > 4:
        return bool((np.abs(array) <= LARGEST).all())
    with np.errstate(over="ignore", invalid="ignore"):
        # a finite sum has only finite terms and is the faster look; one that overflows proves nothing
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


def _architecture(shapes: dict[str, tuple[int, ...]], where: str | Path) -> Architecture:
    """Reads depth, width and head off the keys and shapes, then holds every key and shape against them."""
    root, head = shapes.get(ROOT_KERNEL, ()), shapes.get(HEAD_KERNEL, ())
    if len(root) != 4 or len(head) != 4:
        absent = [key for key, shape in ((ROOT_KERNEL, root), (HEAD_KERNEL, head)) if len(shape) != 4]
        raise WeightsError(
            f"{where} is not a BiT in the official layout: no 4-dimensional {' and '.join(absent)} "
            f"among its {len(shapes)} arrays ({_some(list(shapes))})",
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
    if not head[3]:
        raise WeightsError(f"{where} has a head of 0 classes; a head has at least 1")
    # a stage without units is no BiT: its first unit is then listed as missing
    architecture = Architecture(tuple(max(count, 1) for count in units), root[3] / 64, head[3])
    expected = architecture.layout
    missing = [key for key in expected if key not in shapes]
    extra = [key for key in shapes if key not in expected]
    misshapen = [
        f"{key} is {shapes[key]}, not {shape}" for key, shape in expected.items() if shapes.get(key, shape) != shape
    ]
    if missing or extra or misshapen:
        raise WeightsError(
            f"{where} does not hold a {architecture}: {len(missing)} missing ({_some(missing)}); "
            f"{len(extra)} extra ({_some(extra)}); {len(misshapen)} misshapen ({_some(misshapen)})",
            missing,
            extra,
            misshapen,
        )
    return architecture


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(printable(name[:SPELLED]) for name in sorted(names)[:LISTED]) or "none") + rest
