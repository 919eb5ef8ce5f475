"""Reads and writes safetensors files without a library; nothing that the file says of itself is believed unchecked.

The format (https://huggingface.co/docs/safetensors, "Format"): eight bytes with the header's length, the header as a
JSON object {name: {dtype, shape, data_offsets}}, and the arrays' bytes, one behind the other without gaps. It is small
enough to be read exactly here, with errors that name file and array, so that no library is needed for it.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from bit_jax.formats import recognize
from bit_jax.formats.official import AGAIN, SPELLED, WeightsError, cannot_read, listed

LENGTH = 8  # bytes of the header's length
METADATA = "__metadata__"
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array in the file: what the header says of it, and where it is."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # in bytes, from the beginning of the file


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns {name: entry} and the file's metadata.

    Raises:
        WeightsError: the header is damaged, names what the file cannot hold, or holds another dtype than a float's.
        RequestError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH), "little")
            if length > min(recognize.HEADER, size - LENGTH):
                raise WeightsError(f"{path} is truncated or damaged: it is too short for its header; {AGAIN}")
            text = file.read(length)
    except (OSError, MemoryError) as error:
        raise cannot_read(path, error) from None
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        metadata = header.pop(METADATA, {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
    except (ValueError, RecursionError, AttributeError) as error:
        raise WeightsError(f"{path} has a damaged header ({str(error)[:SPELLED]}); {AGAIN}") from None
    entries, problems = {}, []
    for name, said in header.items():
        try:
            entries[name] = _entry(said, LENGTH + length)
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"{name} ({type(error).__name__}: {str(error)[:SPELLED]})")
    if problems:
        raise WeightsError(f"{path} holds what is no array of floats: {listed(problems)}", extra=problems)
    end = LENGTH + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset != end:
            raise WeightsError(f"{path} is damaged: {listed([name])} is not where the array before it ends; {AGAIN}")
        end += entry.dtype.itemsize * math.prod(entry.shape)
    if end != size:
        raise WeightsError(f"{path} is truncated or damaged: {size:,} bytes in place of {end:,}; {AGAIN}")
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice")
    return content


def _entry(said: Any, start: int) -> Entry:
    """Checks what the header says of one array; its place in the file is checked by the caller."""
    if said["dtype"] not in DTYPES:
        raise ValueError(f"dtype {said['dtype']!r}")
    dtype, shape = DTYPES[said["dtype"]], said["shape"]
    begin, end = said["data_offsets"]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in (*shape, begin, end)):
        raise ValueError("a size that is no whole number")
    if min((*shape, begin), default=0) < 0 or end - begin != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{end - begin:,} bytes for shape {shape}")
    return Entry(dtype, tuple(shape), start + begin)


def read_arrays(path: Path, entries: Mapping[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, array); bfloat16 comes as float32, which holds all its values.

    Raises:
        WeightsError: the file became shorter since its header was read.
        RequestError: it cannot be read, or an array does not fit into memory.
    """
    try:
        with open(path, "rb") as file:
            for name, entry in entries.items():
                array = np.empty(entry.shape, entry.dtype)
                file.seek(entry.offset)
                if array.size and file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                    raise WeightsError(f"{path} has changed while it was read; {AGAIN}")
                yield name, array.astype(np.float32) if entry.dtype == DTYPES["BF16"] else array
    except (OSError, MemoryError) as error:
        raise cannot_read(path, error) from None


def write(file: BinaryIO, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes arrays of floats. The same arrays give the same bytes.

    Args:
        metadata: texts that the header keeps; Hugging Face's library wants {"format": "pt"} among them.
    """
    # the official library's order: the widest first, so that every array is aligned to its items
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        array = arrays[name]
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH)
    file.write(len(text).to_bytes(LENGTH, "little") + text)
    for name in names:
        file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
