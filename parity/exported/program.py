"""What the files of all formats have in common: images of one shape in, logits out."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from input_pipeline.errors import RequestError
from parity.sides.tasks import ANY

CHANNELS = 3
Shape = Sequence[int | None]  # None: a size that the file leaves open


@dataclasses.dataclass(frozen=True)
class Images:
    """The images that a file takes.

    Attributes:
        dtype: name of their dtype.
        layout: NHWC or NCHW, told apart by the axis of three channels.
        rows, height, width: their sizes; None where the file leaves them open.
    """

    dtype: str
    layout: str
    rows: int | None
    height: int | None
    width: int | None

    @classmethod
    def of(cls, shape: Shape, dtype: str, name: str) -> "Images":
        """Reads the shape of a file's input; `name` is the side's, for messages.

        Raises:
            RequestError: it is not the shape of images, or their dtype is no floating-point type.
        """
        if len(shape) != 4 or CHANNELS not in (shape[1], shape[3]):
            raise RequestError(
                f"{name} takes an array of shape {written(shape)}, and images are wanted: [rows, height, width, 3] or "
                "[rows, 3, height, width], in [-1, 1]; export a function of the images alone"
            )
        if "float" not in dtype:
            raise RequestError(f"{name} takes {dtype} images, and floats in [-1, 1] are compared; export it with those")
        nhwc = shape[3] == CHANNELS
        height, width = shape[1:3] if nhwc else shape[2:4]
        return cls(dtype, "NHWC" if nhwc else "NCHW", shape[0], height, width)

    def described(self, classes: int | None) -> dict[str, Any]:
        """Returns the entry "takes" of the attestation."""
        sizes = {"rows": self.rows, "height": self.height, "width": self.width, "classes": classes}
        return {"dtype": self.dtype, "layout": self.layout} | {
            name: ANY if size is None else size for name, size in sizes.items()
        }

    def batches(self, images: np.ndarray, dtype: Any) -> list[np.ndarray]:
        """Splits images [rows, height, width, 3] into batches of the file's dtype, layout and number of rows."""
        images = images.astype(dtype) if self.layout == "NHWC" else images.astype(dtype).transpose(0, 3, 1, 2)
        rows = self.rows or len(images)
        return [np.ascontiguousarray(images[start : start + rows]) for start in range(0, len(images), rows)]


class Program(Protocol):
    """A file that was loaded.

    Attributes:
        images: images that it takes.
        classes: number of logits that it gives for an image, or None if the file does not say.
    """

    images: Images
    classes: int | None

    def described(self) -> dict[str, Any]:
        """Returns the entries of the attestation that depend on the format."""
        ...

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits [rows, classes] of images [rows, height, width, 3] in [-1, 1]."""
        ...


def the_logits(outputs: Sequence[str], name: str) -> int:
    """Returns the place of the logits among a file's outputs: the only one, or the one that is called so.

    Raises:
        RequestError: there is none.
    """
    if len(outputs) == 1:
        return 0
    if "logits" in outputs:
        return outputs.index("logits")
    raise RequestError(
        f"{name} has {len(outputs)} outputs ({', '.join(outputs[:4])}), none of which is called logits; export a "
        "function that returns the logits alone"
    )


def sha256(paths: Iterable[Path]) -> str:
    """Returns the SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def written(shape: Iterable[Any]) -> str:
    """Writes a shape as [4, any, 3]."""
    return f"[{', '.join(ANY if size is None else str(size) for size in shape)}]"


def sentence(error: Exception) -> str:
    """Writes an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
