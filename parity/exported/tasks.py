"""The tasks that an exported file can do: those that follow from logits. The counterpart of `in_jax/tasks.py`."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import input_pipeline
from input_pipeline.errors import RequestError
from parity.exported.program import Program
from parity.sides import inputs
from parity.sides.classes import open_labelled
from parity.sides.fingerprint import fingerprint
from parity.sides.side import Side
from parity.sides.tasks import UNKNOWN, Result

HIDDEN = (
    "matrix products",
    "convolution products",
    "group norm eps",
    "standardization eps",
    "groups",
    "weights sha256",
)
NO_CLASS = np.iinfo(np.int64).min  # equals no label


class ExportedSide:
    """An exported file, and the tasks of `sides/tasks.py` that can be asked of it.

    The file is loaded by what its side says, so that the process imports one framework.

    Raises:
        RequestError: the file cannot be run, or takes no images.
    """

    def __init__(self, side: Side, precision: str, progress: Callable[[int, int], None]):
        assert side.file is not None
        self.precision, self.progress = precision, progress
        self.program: Program
        if side.framework == "onnx":
            from parity.exported.onnx_program import OnnxProgram

            self.program = OnnxProgram(Path(side.file), precision)
        else:
            from parity.exported.stablehlo_program import StableHloProgram

            self.program = StableHloProgram(Path(side.file), precision)

    def injected(self, fault: str | None) -> contextlib.AbstractContextManager[None]:
        """Refuses faults: nothing can be injected into a file."""
        if fault is not None:
            raise RequestError(f"fault {fault!r} cannot be injected into an exported file")
        return contextlib.nullcontext()

    def attest(self, images: str, dataset: Sequence[Any] = (), *, program: bool = False) -> Result:
        """Describes what computes here: versions, device and format, the images that the file takes, and hashes."""
        return (
            self.program.described()
            | {"precision": self.precision, "takes": self.program.images.described(self.program.classes)}
            | dict.fromkeys(HIDDEN, UNKNOWN)
            | {"cannot be looked into": "units, weights, constants, formats of products"}
            | {"pictures sha256": fingerprint({"images": np.load(images)["image"]})}
            | inputs.described(dataset)
        ), None

    def products(self) -> Result:
        """Returns that the formats of matrix products and convolutions are not known."""
        return (UNKNOWN, UNKNOWN), None

    def forward(self, images: str) -> Result:
        """Returns the logits of the first batch."""
        return None, {"logits": self.program.logits(_normalized(np.load(images)["image"][0]))}

    def loss(self, mixed: str) -> Result:
        """Returns the loss of each row of the first batch, and their mean, computed from the logits in float64."""
        with np.load(mixed) as file:
            images, targets = file["images/0"], file["targets/0"]
        logits = self.program.logits(images).astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        rows = -(targets * log_softmax).sum(axis=1)
        return None, {"loss of each row": rows, "mean loss": rows.mean()}

    def accuracy(
        self,
        dataset: str,
        split: str,
        data_dir: str | None,
        class_names: Sequence[str] | None,
        size: int,
        batch: int,
        limit: int | None,
    ) -> Result:
        """Returns logits, label and index of every example of the split, and how many there are, how many were seen,
        and for how many the label is among the first one and the first five. A fixed batch is filled up by the loader,
        which marks the rows that do not count."""
        source = open_labelled(dataset, split, data_dir, class_names, limit)
        batch = self.program.images.rows or batch
        loader = input_pipeline.Loader(source, input_pipeline.Views(size, size, flip=False), batch)
        logits, labels, indices = [], [], []
        for number, rows in loader.evaluation():
            logits.append(self.program.logits(_normalized(rows["image"]))[rows["mask"]])
            labels.append(rows["label"][rows["mask"]])
            indices.append(rows["index"][rows["mask"]])
            self.progress(min((number + 1) * batch, len(source)), len(source))
        saved = {
            "logits": np.concatenate(logits),
            "labels": np.concatenate(labels),
            "index": np.concatenate(indices),
        }
        first = _first_five(saved["logits"]) == saved["labels"][:, None]
        return {
            "correct1": int(first[:, 0].sum()),
            "correct5": int(first.sum()),
            "seen": len(first),
            "examples": len(source),
        }, saved


def _normalized(images: np.ndarray) -> np.ndarray:
    """Turns uint8 [..., 3] into float64 in [-1, 1]; the file's dtype is rounded to afterwards."""
    return (images.astype(np.float64) - 127.5) / 127.5


def _first_five(logits: np.ndarray) -> np.ndarray:
    """Returns the classes of the five largest logits, [images, 5], equal ones in the order of their classes; `NO_CLASS`
    where a row is not finite."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return np.where(np.isfinite(logits).all(axis=1, keepdims=True), order, NO_CLASS)
