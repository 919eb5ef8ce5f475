"""timm's view of an image in evaluation, with the same bits: resize the shorter side, then cut out the centre.

BiT's own evaluation resizes the whole image to the square that the model sees, whatever its shape. The accuracies in
timm's tables are measured on this view instead.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image

from input_pipeline.errors import RequestError
from input_pipeline.preprocess import Views

Interpolation = Literal["bilinear", "bicubic"]
CROP_SHARE = (
    0.875  # timm's crop_pct for BiT, but for models that are evaluated at a larger size than they were tuned at
)


@dataclasses.dataclass(frozen=True)
class CentreCrop(Views):
    """The evaluation view of timm's `transforms_imagenet_eval` with crop_mode "center" and a square size.

    Attributes:
        resize_to: pixels of the image's shorter side after resizing; the other side keeps the aspect ratio.
        crop: side in pixels of the square that is cut out of its centre.
        interpolation: antialiased, as Pillow resizes.
    """

    interpolation: Interpolation = "bilinear"

    @classmethod
    def of(cls, crop: int, share: float = CROP_SHARE, interpolation: Interpolation = "bilinear") -> "CentreCrop":
        """Returns the view of side `crop`, which is this share of the resized image's shorter side (crop_pct).

        Raises:
            RequestError: the share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise RequestError(f"a crop of {share:g} of the image's side is not above 0 and at most 1")
        return cls(math.floor(crop / share), crop, flip=False, interpolation=interpolation)

    def evaluation(self, image: np.ndarray | bytes, into: np.ndarray | None = None) -> np.ndarray:
        """Returns the view, uint8 [crop, crop, 3], in `into` if that is given."""
        pixels = self.pixels(image)
        shown = np.empty((self.crop, self.crop, 3), np.uint8) if into is None else into
        height, width = resized(pixels.shape[0], pixels.shape[1], self.resize_to)
        if (height, width) != pixels.shape[:2]:
            method = Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR
            pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), method))
        # rounded half to even, as torchvision's CenterCrop
        top, left = round((height - self.crop) / 2), round((width - self.crop) / 2)
        shown[...] = pixels[top : top + self.crop, left : left + self.crop]
        return shown


def resized(height: int, width: int, side: int) -> tuple[int, int]:
    """Returns height and width of an image whose shorter side is resized to `side`; the longer is rounded down, as in
    torchvision's `Resize`."""
    if height <= width:
        return side, int(side * width / height)
    return int(side * height / width), side
