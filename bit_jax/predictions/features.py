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
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.examples import NO_LABEL
from input_pipeline.files import DamagedFile, parse_json, replacing

ARRAYS = {"features": 2, "names": 1, "labels": 1, "class_names": 1, "metadata": 0}  # {name: number of axes}
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
        path.parent.mkdir(parents=True, exist_ok=True)
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
            raise DamagedFile(f"{path} is no file of features ({error}); {REMEDY}") from None
        for name, axes in ARRAYS.items():
            if arrays[name].ndim != axes:
                raise DamagedFile(f"{path} is damaged (its {name} has {arrays[name].ndim} axes, not {axes}); {REMEDY}")
        names, labels, classes = arrays["names"].tolist(), arrays["labels"], arrays["class_names"].tolist()
        rows = len(arrays["features"])
        if not rows == len(names) == len(labels):
            raise DamagedFile(f"{path} is damaged (its arrays are of {rows}, {len(names)} and {len(labels)}); {REMEDY}")
        if rows and not NO_LABEL <= labels.min() <= labels.max() < len(classes):
            raise DamagedFile(f"{path} is damaged (a label is not one of its {len(classes)} classes); {REMEDY}")
        metadata = parse_json(str(arrays["metadata"]), dict, f"the metadata of {path}", REMEDY)
        return cls(arrays["features"], names, labels, classes, metadata)
