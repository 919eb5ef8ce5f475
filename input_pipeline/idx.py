"""MNIST's file format, as MNIST and Fashion-MNIST come: `idx:DIRECTORY`, compressed or not."""

import gzip
from pathlib import Path

import numpy as np

from input_pipeline.examples import ArraySource, DatasetError

# https://yann.lecun.org/exdb/mnist: magic, sizes (big-endian int32), then bytes
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
FILES = {"train": "train", "test": "t10k"}


def open_idx(directory: Path, split: str) -> ArraySource:
    """One split of the four files in a directory.

    Raises:
        DatasetError: a file is missing, damaged or of another format, or images and labels do not pair up.
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
    path = next((path for path in (directory / stem, directory / f"{stem}.gz") if path.exists()), None)
    if path is None:
        raise DatasetError(
            f"{directory} has neither {stem} nor {stem}.gz; idx:DIRECTORY names the folder that holds them"
        )
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DatasetError(f"{path} cannot be read ({error}); fetch it again") from None
    size = 4 * (1 + dimensions)
    header = np.frombuffer(data.ljust(size, b"\0"), ">i4", count=1 + dimensions)
    if header[0] != magic or len(data) < size:
        raise DatasetError(f"{path} is not an idx file of {dimensions} dimensions; fetch it again")
    content = np.frombuffer(data, np.uint8, offset=size)
    if content.size != np.prod(header[1:], dtype=np.int64):
        raise DatasetError(f"{path} is truncated: {content.size} bytes for shape {tuple(header[1:])}; fetch it again")
    return content.reshape(header[1:])
