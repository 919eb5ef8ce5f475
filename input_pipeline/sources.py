"""Where examples come from: each source is a random-access sequence of image, label and id.

A source knows nothing of order, batches or hosts; `loader.py` decides those.
"""

import difflib
import gzip
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np

# MNIST's file format, https://yann.lecun.org/exdb/mnist: magic, sizes (big-endian int32), then bytes
IDX_IMAGES_MAGIC, IDX_LABELS_MAGIC = 2051, 2049
IDX_FILES = {"train": "train", "test": "t10k"}
DIGITS_TEST_EVERY = 5  # every fifth scan is held out


class DatasetError(ValueError):
    """The dataset cannot be had as asked for; the message names it and the remedy."""


class Example(TypedDict):
    image: np.ndarray | bytes  # uint8 [height, width] or [height, width, 3], or an encoded file
    label: int
    id: str


@runtime_checkable
class Source(Protocol):
    """One split of a dataset.

    Attributes:
        name: dataset and split, for messages and results.
        class_names: one a label, in label order.
        labels: int32 [len(source)], known without decoding an image.
    """

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def labels(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


class ArraySource:
    """Images held in memory."""

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]):
        """images: uint8 [n, height, width]; labels: [n]."""
        self.name, self.class_names = name, class_names
        self._images, self.labels = images, labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index], "label": int(self.labels[index]), "id": str(index)}


class TfdsSource:
    """A split that tfds has prepared as array_record, read by random access; images stay encoded."""

    def __init__(self, name: str, split: str, records, info):
        self.name = f"{name}/{split}"
        self.class_names = info.features["label"].names
        self._records = records
        self._labels: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        if self._labels is None:
            self._labels = np.array([record["label"] for record in self._records], np.int32)
        return self._labels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        identity = record.get("file_name", record.get("id", index))
        identity = identity.decode() if isinstance(identity, bytes) else str(identity)
        return {"image": record["image"], "label": int(record["label"]), "id": identity}


class Subset:
    """Some examples of another source, in the order given."""

    def __init__(self, source: Source, indices: np.ndarray, note: str):
        self.name = f"{source.name} ({note})"
        self.class_names = source.class_names
        self.labels = source.labels[indices]
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]


def open_source(dataset: str, split: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Opens one split of a dataset.

    Args:
        dataset: `digits` (scikit-learn's scanned digits), `idx:DIRECTORY` (MNIST's file format, as MNIST and
            Fashion-MNIST come), or a tfds image classification dataset prepared as array_record, such as `cifar10`
            or `imagenet2012`.
        split: `train`, `test`, `validation`; for tfds any slice, such as `train[:98%]`.
        data_dir: where tfds keeps its datasets.

    Raises:
        DatasetError: no such dataset or split, or it is not prepared.
    """
    if dataset == "digits":
        source = _digits(split)
    elif dataset.startswith("idx:"):
        source = _idx(Path(dataset.removeprefix("idx:")), split)
    else:
        source = _tfds(dataset, split, data_dir)
    if not len(source):
        raise DatasetError(f"{source.name} has no examples; choose another split")
    return source


def few_shot(source: Source, examples_per_class: int, seed: int) -> Subset:
    """The same `examples_per_class` examples of every class for the same seed, in random order.

    Raises:
        DatasetError: a class has fewer.
    """
    order = np.random.default_rng(seed).permutation(len(source))
    labels = source.labels[order]
    chosen = []
    for label, class_name in enumerate(source.class_names):
        of_class = np.flatnonzero(labels == label)[:examples_per_class]
        if len(of_class) < examples_per_class:
            raise DatasetError(
                f"{source.name} has {len(of_class)} examples of class {class_name!r}, "
                f"not {examples_per_class}; ask for at most {len(of_class)} a class"
            )
        chosen.append(of_class)
    indices = order[np.sort(np.concatenate(chosen))]
    return Subset(source, indices, f"{examples_per_class} a class, seed {seed}")


def _digits(split: str) -> ArraySource:
    """1,797 scanned digits of 8x8 pixels and 17 grey levels, from UCI's "Optical Recognition of Handwritten Digits"."""
    from sklearn.datasets import load_digits  # a second of imports that other datasets need not pay

    if split not in ("train", "test"):
        raise DatasetError(f"digits has no split {split!r}; it has train and test")
    digits: Any = load_digits()
    held_out = np.arange(len(digits.target)) % DIGITS_TEST_EVERY == DIGITS_TEST_EVERY - 1
    chosen = held_out if split == "test" else ~held_out
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource(f"digits/{split}", images, digits.target[chosen], [str(digit) for digit in range(10)])


def _idx(directory: Path, split: str) -> ArraySource:
    if split not in IDX_FILES:
        raise DatasetError(f"idx datasets have no split {split!r}; they have {' and '.join(IDX_FILES)}")
    images = _read_idx(directory, f"{IDX_FILES[split]}-images-idx3-ubyte", IDX_IMAGES_MAGIC, 3)
    labels = _read_idx(directory, f"{IDX_FILES[split]}-labels-idx1-ubyte", IDX_LABELS_MAGIC, 1)
    if len(images) != len(labels):
        raise DatasetError(f"{directory} has {len(images)} {split} images but {len(labels)} labels; fetch both again")
    class_names = [str(label) for label in range(int(labels.max()) + 1)] if len(labels) else []
    return ArraySource(f"{directory.name}/{split}", images, labels, class_names)


def _read_idx(directory: Path, stem: str, magic: int, dimensions: int) -> np.ndarray:
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


def _tfds(dataset: str, split: str, data_dir: str | os.PathLike | None) -> TfdsSource:
    import tensorflow_datasets as tfds  # seconds of imports that the embedded digits need not pay

    known = tfds.list_builders(with_community_datasets=False)
    if re.split("[:/]", dataset)[0] not in known:
        nearest = difflib.get_close_matches(dataset, ["digits", *known], 3) or ["digits"]
        raise DatasetError(
            f"unknown dataset {dataset!r}; near it: {', '.join(nearest)} (or idx:DIRECTORY, or any tfds name)"
        )
    builder: Any = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
    features = list(builder.info.features or ())
    if not {"image", "label"} <= set(features):
        raise DatasetError(f"{dataset} is not an image classification dataset: its features are {features}")
    try:
        records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except (KeyError, ValueError):
        if not builder.info.splits:
            where = builder.data_dir
            raise DatasetError(
                f"{dataset} is not prepared as array_record under {where}; prepare it with tfds first"
            ) from None
        raise DatasetError(
            f"{dataset} has no split {split!r}; it has {', '.join(builder.info.splits)}, and slices such as train[:98%]"
        ) from None
    return TfdsSource(dataset, split, records, builder.info)
