"""`idx:DIRECTORY` datasets: MNIST's file format, which MNIST and Fashion-MNIST come in, compressed or not."""

import gzip
import io
import math
import os
import zlib
from pathlib import Path

import numpy as np

from input_pipeline.examples import ArraySource, DatasetError
from input_pipeline.image_file import read_regular_file

# A file holds a magic number and the sizes, as big-endian int32, then bytes: https://yann.lecun.org/exdb/mnist
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
FILES = {"train": "train", "test": "t10k"}
MAX_BYTES = 1 << 36  # the largest file that is read; it is held in memory
MOST_DEFLATED = 1032  # the most bytes that one byte of a .gz can expand to (https://zlib.net/zlib_tech.html)
CHUNK = 1 << 20


def open_idx(directory: Path, split: str) -> ArraySource:
    """Opens one split from the directory's four files.

    Raises:
        CannotRead: the operating system refuses to read a file.
        DatasetError: a file is missing, damaged or of another format, or there are not as many labels as images.
    """
    if split not in FILES:
        raise DatasetError(f"idx datasets have no split {split!r}; they have {' and '.join(FILES)}")
    images = _read(directory, f"{FILES[split]}-images-idx3-ubyte", IMAGES_MAGIC, 3)
    labels = _read(directory, f"{FILES[split]}-labels-idx1-ubyte", LABELS_MAGIC, 1)
    if len(images) != len(labels):
        raise DatasetError(f"{directory} has {len(images)} {split} images but {len(labels)} labels; fetch both again")
    class_names = [str(label) for label in range(int(labels.max()) + 1)] if len(labels) else []
    return ArraySource(f"{directory.name}/{split}", images, labels, class_names)


def _read(directory: Path, stem: str, magic: int, dimensions: int) -> np.ndarray:
    path = next((path for path in (directory / stem, directory / f"{stem}.gz") if os.path.lexists(path)), None)
    if path is None:
        raise DatasetError(
            f"{directory} has neither {stem} nor {stem}.gz; idx:DIRECTORY names the folder that holds them"
        )
    data = read_regular_file(path, MAX_BYTES)
    compressed = path.suffix == ".gz"
    file = gzip.GzipFile(fileobj=io.BytesIO(data)) if compressed else io.BytesIO(data)
    try:
        header = file.read(4 * (1 + dimensions))
        shape = _shape(path, header, magic, dimensions)
        size = math.prod(shape)
        if size > len(data) * (MOST_DEFLATED if compressed else 1):
            raise DatasetError(f"{path} is truncated: {len(data):,} bytes for shape {shape}; fetch it again")
        content = _read_up_to(file, size + 1)
    except (OSError, EOFError, zlib.error) as error:  # from gzip, because the file's bytes are in memory
        raise DatasetError(f"{path} is damaged ({error}); fetch it again") from None
    if len(content) < size:
        raise DatasetError(f"{path} is truncated: {len(content):,} bytes for shape {shape}; fetch it again")
    if len(content) > size:
        raise DatasetError(f"{path} has more bytes than the {size:,} of shape {shape}; fetch it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _shape(path: Path, header: bytes, magic: int, dimensions: int) -> tuple[int, ...]:
    """Returns the sizes in the file's header: the number of examples, which may be 0, then rows and columns of each."""
    if len(header) < 4 * (1 + dimensions) or int.from_bytes(header[:4], "big") != magic:
        raise DatasetError(f"{path} is not an idx file of {dimensions} dimensions; fetch it again")
    shape = tuple(int(size) for size in np.frombuffer(header, ">i4", offset=4))
    if shape[0] < 0 or any(size < 1 for size in shape[1:]):
        raise DatasetError(f"{path} is damaged: its header names the shape {shape}; fetch it again")
    return shape


def _read_up_to(file: gzip.GzipFile | io.BytesIO, most: int) -> bytearray:
    """Reads at most `most` bytes, and takes no more memory than the file's content needs."""
    content = bytearray()
    while len(content) < most and (chunk := file.read(min(CHUNK, most - len(content)))):
        content += chunk
    return content
