"""One image -> the uint8 square that the model is given. Resizing is Pillow's, as in BiT's PyTorch code."""

import dataclasses
import io

import numpy as np
from PIL import Image

from input_pipeline.sources import DatasetError


@dataclasses.dataclass(frozen=True)
class Views:
    """How an image is shown: training resizes to `resize` squared and crops `crop` squared at random; evaluation
    resizes straight to `crop` squared (BiT, both without keeping the aspect ratio)."""

    resize: int
    crop: int
    flip: bool

    def __post_init__(self):
        if not 0 < self.crop <= self.resize:
            raise DatasetError(f"crop {self.crop} does not fit into resize {self.resize}; crop at most that")

    def train(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """uint8 [crop, crop, 3]."""
        top, left, mirrored = self.draw(rng)
        view = np.asarray(resize(image, self.resize))[top : top + self.crop, left : left + self.crop]
        return np.ascontiguousarray(view[:, ::-1] if mirrored else view)

    def draw(self, rng: np.random.Generator) -> tuple[int, int, bool]:
        """A training view's (top, left, mirrored); three draws whatever the flags, so that none shift others."""
        top, left = rng.integers(self.resize - self.crop + 1, size=2)
        mirrored = rng.random() < 0.5
        return int(top), int(left), bool(self.flip and mirrored)

    def evaluation(self, image: Image.Image) -> np.ndarray:
        """uint8 [crop, crop, 3]."""
        return np.asarray(resize(image, self.crop))


def resize(image: Image.Image, side: int) -> Image.Image:
    """To a square: bilinear with antialiasing, half-pixel centres."""
    return image.resize((side, side), Image.Resampling.BILINEAR)


def decode(image: np.ndarray | bytes) -> Image.Image:
    """RGB image from an encoded file or a uint8 array [height, width] or [height, width, 3].

    Raises:
        DatasetError: the bytes are not an image that Pillow reads whole.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image).convert("RGB")
    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"not a readable image ({error})") from None


def native_area(image: np.ndarray | bytes) -> int:
    """Pixels of the image as it is stored; of a file only the header is read."""
    if isinstance(image, np.ndarray):
        return image.shape[0] * image.shape[1]
    try:
        width, height = Image.open(io.BytesIO(image)).size
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"not a readable image ({error})") from None
    return width * height
