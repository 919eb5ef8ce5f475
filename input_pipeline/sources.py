"""Datasets by name: `open_source` opens one, whatever its format."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.examples import ArraySource, DatasetError, Example, Source, cut, parse_slice
from input_pipeline.features import FEATURES
from input_pipeline.files import user_path
from input_pipeline.folder import FolderSource, directory_names
from input_pipeline.idx import open_idx
from input_pipeline.tfds_source import open_builder, open_tfds

DIGITS_TEST_EVERY = 5  # every fifth scan is held out
SYNTHETIC_SPLITS = {"train": 1_281_167, "validation": 50_000, "test": 50_000}  # as many as ImageNet-1k has
SYNTHETIC_CLASSES, SYNTHETIC_SIDE, SYNTHETIC_IMAGES = 1000, 512, 16


def open_source(dataset: str, split: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Opens one split of a dataset.

    Args:
        dataset: `digits` (scikit-learn's scanned digits), `synthetic` (noise, to measure training without reading),
            `folder:PATH` (PATH/SPLIT/CLASS/IMAGE), `idx:DIRECTORY` (MNIST's file format), or a tfds image
            classification dataset prepared as array_record, such as `cifar10`, `cifar10:3.0.2`, `imagenet2012` or a
            dataset of the user's own in `data_dir`.
        split: `train`, `test`, `train-small`, or a slice such as `train[:98%]`.
        data_dir: directory with the prepared tfds datasets; None: tfds's default directory.

    Raises:
        DatasetError: there is no such dataset or split, or it is not prepared, or it is empty.
        RequestError: a path is a URL, or its home directory is not known.
    """
    kind, _, place = dataset.partition(":")
    _require_images(dataset, kind)
    openers: dict[str, Callable[[str], Source]] = {
        "digits": _digits,
        "synthetic": SyntheticSource,
        "folder": lambda whole: FolderSource(user_path(place), whole),
        "idx": lambda whole: open_idx(user_path(place), whole),
    }
    if kind in openers and bool(place) == (kind in ("folder", "idx")):
        whole, _, _ = parse_slice(split)
        source = cut(openers[kind](whole), split)
    else:
        source = open_tfds(dataset, split, data_dir and user_path(data_dir))
    if not len(source):
        raise DatasetError(f"{source.name} has no examples; choose another split")
    return source


def split_names(dataset: str, data_dir: str | os.PathLike | None = None) -> list[str]:
    """Returns the names of all splits that the dataset has.

    Raises:
        DatasetError: there is no such dataset.
    """
    kind, _, place = dataset.partition(":")
    _require_images(dataset, kind)
    if dataset == "synthetic":
        return list(SYNTHETIC_SPLITS)
    if kind == "folder":
        return directory_names(user_path(place))
    if dataset == "digits" or kind == "idx":
        return ["train", "test"]
    return list(open_builder(dataset, data_dir and user_path(data_dir)).info.splits) or ["train"]


def _require_images(dataset: str, kind: str) -> None:
    if kind == FEATURES:
        raise DatasetError(
            f"{dataset} holds features and no images; python -m bit_jax.train alone takes them, to train a head on"
        )


class SyntheticSource:
    """A few images of noise, repeated for as many examples as ImageNet-1k has, in the size that its recipe resizes to.
    Nothing is read, decoded or resized, so a run measures the devices."""

    decoded = True

    def __init__(self, split: str):
        if split not in SYNTHETIC_SPLITS:
            raise DatasetError(f"synthetic has no split {split!r}; it has {', '.join(SYNTHETIC_SPLITS)}")
        self.name = f"synthetic/{split}"
        self.class_names = [f"class {label}" for label in range(SYNTHETIC_CLASSES)]
        rng = np.random.default_rng(0)
        shape = SYNTHETIC_IMAGES, SYNTHETIC_SIDE, SYNTHETIC_SIDE, 3
        self._images = rng.integers(0, 256, shape, np.uint8)
        self.labels = (np.arange(SYNTHETIC_SPLITS[split]) % SYNTHETIC_CLASSES).astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._images[index % SYNTHETIC_IMAGES], "label": int(self.labels[index]), "id": str(index)}


def _digits(split: str) -> ArraySource:
    """1,797 scanned digits of 8x8 pixels and 17 grey levels, from UCI's "Optical Recognition of Handwritten Digits"."""
    if split not in ("train", "test"):
        raise DatasetError(f"digits has no split {split!r}; it has train and test")
    levels, labels = _all_digits()
    held_out = np.arange(len(labels)) % DIGITS_TEST_EVERY == DIGITS_TEST_EVERY - 1
    chosen = held_out if split == "test" else ~held_out
    images = np.round(levels[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource(f"digits/{split}", images, labels[chosen], [str(digit) for digit in range(10)])


def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns what `sklearn.datasets.load_digits` does, grey levels [1797, 8, 8] and labels, but reads scikit-learn's
    file itself where that is found: importing scikit-learn takes a second."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return digits.images, digits.target
