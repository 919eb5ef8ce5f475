"""Files of pooled features: what a model's head is given for each of many images, for use without the model.

The file is a NumPy `.npz` without pickles:

| array | shape and type | what |
|---|---|---|
| `features` | [N, C] float32 | pooled features, the mean over height and width after the last GroupNorm and ReLU |
| `names` | [N] text | name of each image, `CLASS/FILE` where it lies in a directory of a class |
| `labels` | [N] int32 | number of its class in `class_names`, or -1 if it lies in none |
| `class_names` | [K] text | names of the classes in code point order, composed (NFC) |
| `metadata` | [] text | JSON: see `Features.metadata` |
"""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from input_pipeline.examples import NO_LABEL, DatasetError, Example, Source, cut, parse_slice
from input_pipeline.files import DamagedFile, parse_json, replacing, user_path
from input_pipeline.terminal import printable

FEATURES = "features"  # kind of a dataset, as in --dataset features:DIRECTORY

# {name: (number of axes, kind of NumPy's type)}
ARRAYS = {"features": (2, "f"), "names": (1, "U"), "labels": (1, "i"), "class_names": (1, "U"), "metadata": (0, "U")}
KINDS = {"f": "floating-point numbers", "i": "whole numbers", "U": "text"}
REMEDY = "write it again with python -m bit_jax.predict --features"


@dataclasses.dataclass(frozen=True)
class Features:
    """The content of a file of features.

    Attributes:
        features: float32 [N, C].
        names: name of each image.
        labels: int32 [N]; -1 for an image without a class.
        class_names: names of the classes.
        metadata: what the features were computed with: `weights` (the name that was given), `sha256` (of the weight
            file), `architecture`, `size` (pixels of the square), `view` (how images are resized, in words), `resize`,
            `precision` and `versions`.
    """

    features: np.ndarray
    names: list[str]
    labels: np.ndarray
    class_names: list[str]
    metadata: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes the file, atomically; the same features give the same bytes."""
        arrays = {
            "features": self.features.astype(np.float32),
            "names": np.array(self.names, np.str_),
            "labels": self.labels.astype(np.int32),
            "class_names": np.array(self.class_names, np.str_),
            "metadata": np.array(json.dumps(self.metadata)),
        }
        with replacing(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Features":
        """Reads a file of features.

        Raises:
            DamagedFile: the file is none, or its arrays do not fit each other.
            OSError: the file cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ARRAYS}
        except OSError:
            raise
        except Exception as error:  # zipfile and NumPy raise exceptions of many kinds
            why = error if zipfile.is_zipfile(path) else "it is no zip archive"  # NumPy takes any other for a pickle
            raise DamagedFile(f"{path} is no file of features ({why}); {REMEDY}") from None
        for name, (axes, kind) in ARRAYS.items():
            array = arrays[name]
            if array.ndim != axes:
                raise DamagedFile(f"{path} is damaged (its {name} has {array.ndim} axes, not {axes}); {REMEDY}")
            if array.dtype.kind != kind:
                raise DamagedFile(f"{path} is damaged (its {name} is {array.dtype}, not {KINDS[kind]}); {REMEDY}")
        names, labels, classes = arrays["names"].tolist(), arrays["labels"], arrays["class_names"].tolist()
        rows = len(arrays["features"])
        if not rows == len(names) == len(labels):
            raise DamagedFile(f"{path} is damaged (its arrays are of {rows}, {len(names)} and {len(labels)}); {REMEDY}")
        if rows and not NO_LABEL <= labels.min() <= labels.max() < len(classes):
            raise DamagedFile(f"{path} is damaged (a label is not one of its {len(classes)} classes); {REMEDY}")
        metadata = parse_json(str(arrays["metadata"]), dict, f"the metadata of {path}", REMEDY)
        return cls(arrays["features"], names, labels, classes, metadata)


class FeatureSource:
    """The features of a file as examples to train a head on; an example's `image` is its row, float32 [channels].

    Attributes:
        name, class_names, labels: see `Source`.
        metadata: what the features were computed with, see `Features`.
        channels: number of values of each row.

    Raises:
        DatasetError: an image has no class, or features that are not finite.
    """

    decoded = True

    def __init__(self, path: Path, file: Features):
        self.name = f"{path.parent.name}/{path.stem} (features)"
        self.class_names, self.labels, self.metadata = file.class_names, file.labels.astype(np.int32), file.metadata
        self.channels = file.features.shape[1]
        self._rows, self._names = file.features.astype(np.float32, copy=False), file.names
        self._refuse(
            np.equal(self.labels, NO_LABEL), "lies in no directory of a class, so there is no label to train with"
        )
        self._refuse(np.logical_not(np.isfinite(self._rows).all(axis=1)), "has features that are not finite")

    def _refuse(self, wrong: np.ndarray, why: str) -> None:
        if wrong.any():
            first = printable(self._names[int(np.argmax(wrong))])
            raise DatasetError(
                f"{self.name}: {first}, as {int(wrong.sum()):,} of {len(self):,} images, {why}; {REMEDY}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self._rows[index], "label": int(self.labels[index]), "id": self._names[index]}


def open_features(dataset: str, split: str) -> tuple[Source, FeatureSource]:
    """Opens a split of `features:DIRECTORY`, the file DIRECTORY/SPLIT.npz or a slice of it, such as `train[:98%]`.

    Returns:
        The split, and the whole file that it is of.

    Raises:
        DatasetError: there is no such file, or its features cannot be trained with.
        DamagedFile: it is no file of features.
        RequestError: the path is a URL, or its home directory is not known.
    """
    _, _, place = dataset.partition(":")
    whole, _, _ = parse_slice(split)
    path = user_path(place) / f"{whole}.npz"
    try:
        file = FeatureSource(path, Features.load(path))
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read ({error.strerror}); {FEATURES}:DIRECTORY holds a file SPLIT.npz for each split, as "
            "python -m bit_jax.predict --features writes them"
        ) from None
    source = cut(file, split)
    if not len(source):
        raise DatasetError(f"{source.name} has no examples; choose another split")
    return source, file


@dataclasses.dataclass(frozen=True)
class FeatureViews:
    """Rows of features as they are, for a `Loader`: nothing is resized, cropped or drawn.

    Attributes:
        channels: number of values of each row.
    """

    channels: int
    field: ClassVar[str] = "features"  # the batch's array of what is shown

    def empty(self, rows: int) -> np.ndarray:
        """Makes a batch's array of rows, float32 [rows, channels], without values."""
        return np.empty((rows, self.channels), np.float32)

    def train(self, row: np.ndarray, rng: np.random.Generator, into: np.ndarray) -> np.ndarray:
        """Copies a row, float32 [channels], into an array, and returns that; nothing is drawn from `rng`."""
        return self.evaluation(row, into)

    def evaluation(self, row: np.ndarray, into: np.ndarray) -> np.ndarray:
        """Copies a row, float32 [channels], into an array, and returns that."""
        into[...] = row
        return into
