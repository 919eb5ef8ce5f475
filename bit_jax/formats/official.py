"""Reads the arrays of an `.npz`; nothing that the file says of itself, such as a size, is believed unchecked.

Files are read one array at a time (NumPy stores them uncompressed), so that loading takes one copy of the parameters
and little more than the time to read the file.
"""

import dataclasses
import errno
import io
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bit_jax.formats import recognize
from input_pipeline.errors import RequestError
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


class WeightsError(RequestError):
    """The file or the parameters are not a BiT in the official layout.

    Attributes:
        missing, extra, misshapen: every offending key; misshapen ones with both shapes.
    """

    def __init__(self, message: str, missing=(), extra=(), misshapen=()):
        super().__init__(message)
        self.missing, self.extra, self.misshapen = list(missing), list(extra), list(misshapen)


@dataclasses.dataclass(frozen=True)
class Member:
    """An array in the archive: where it is and what its header says."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int  # of the data within the member, in bytes


def read_members(path: Path) -> dict[str, Member]:
    """Returns {official key: member}. Reads only headers, and believes no size that the file cannot have.

    Raises:
        WeightsError: the file is damaged, or something else than an `.npz` of plain arrays.
        RequestError: the file cannot be read for another reason.
    """
    try:
        if other := recognize.recognize(path):
            raise WeightsError(f"{path} {other}")
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            check_sizes(infos, path)
            return _read_headers(archive, infos, path)
    except WeightsError:
        raise
    except Exception as error:  # damaged directories make zipfile raise many kinds
        raise _unreadable(path, "is truncated or damaged", error) from None


def check_sizes(infos: list[zipfile.ZipInfo], path: Path) -> None:
    """Raises WeightsError where members are said to be larger than a file of this size can hold."""
    there = path.stat().st_size
    packed, unpacked = sum(info.compress_size for info in infos), sum(info.file_size for info in infos)
    if packed > there or unpacked > EXPANSION * there:
        raise WeightsError(
            f"{path} is damaged or no weight file: its {there:,} bytes are said to hold {unpacked:,}; {AGAIN}"
        )


def _read_headers(archive: zipfile.ZipFile, infos: list[zipfile.ZipInfo], path: Path) -> dict[str, Member]:
    """Returns {official key: member}, or raises WeightsError with every member that is not a plain array."""
    members: dict[str, Member] = {}
    problems = []
    for info in infos:
        name = info.filename
        try:
            member = _read_header(archive, info)
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
        raise WeightsError(f"{path} holds members that are not plain arrays: {listed(problems)}", extra=problems)
    return members


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    """Reads where an array is; raises ValueError where the member is not a plain array of floating-point numbers."""
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
    return Member(info, shape, dtype, fortran_order, start.tell())


def read_arrays(path: Path, members: dict[str, Member]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (official key, array), one copy of its bytes in memory; the zip's CRC-32 is checked on the way.

    Raises:
        WeightsError: an array is damaged, or, once all are read, some hold values that are not finite in float32.
        RequestError: the file cannot be read for another reason.
    """
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
            if not fits_float32(array):
                not_finite.append(key)
            yield key, array
    if not_finite:
        raise WeightsError(f"{path} holds {NOT_FINITE} in {listed(not_finite)}; {AGAIN}")


def _aligned_bytes(count: int) -> np.ndarray:
    """Allocates uint8 [count] at an address that JAX's CPU backend takes over without a copy."""
    buffer = np.empty(count + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + count]


def fits_float32(array: np.ndarray) -> bool:
    """Returns whether all values are finite in float32."""
    if array.dtype.itemsize > 4:
        return bool((np.abs(array) <= LARGEST).all())
    with np.errstate(over="ignore", invalid="ignore"):
        # a finite sum has only finite terms and is the faster look; one that overflows proves nothing
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


def _unreadable(path: Path, damage: str, error: Exception) -> RequestError:
    """Returns the exception to raise where reading failed; only content that was read and is wrong is damage."""
    return cannot_read(path, error) if _of_the_system(error) else WeightsError(f"{path} {damage} ({error}); {AGAIN}")


def cannot_read(path: Path, error: BaseException) -> RequestError:
    """Returns the exception to raise for an OSError or a MemoryError, which say nothing about a file's content."""
    if isinstance(error, OSError):
        return RequestError(f"cannot read {error.filename or path}: {error.strerror}; mend that and start again")
    return RequestError(f"cannot read {path}: it does not fit into this machine's memory")


def _of_the_system(error: BaseException) -> bool:
    """Returns whether an error says nothing about a file's content: it could not be read, or memory is short.

    EINVAL does: it comes from a place that a damaged file names and no file has.
    """
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL))


def listed(names: list[str]) -> str:
    """Spells out the first names for an error message, and counts the others."""
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (", ".join(printable(name[:SPELLED]) for name in sorted(names)[:LISTED]) or "none") + rest
