"""The view of an image that a model is given to predict: BiT's own, or timm's."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from bit_jax.formats.described import Description
from bit_jax.training import hyperrule
from input_pipeline import Views
from input_pipeline.centre_crop import CROP_SHARE, CentreCrop, Interpolation
from input_pipeline.errors import RequestError
from input_pipeline.flags import require_positive

Resize = Literal["pillow", "tf", "timm"]
SQUARE = {
    "pillow": "resized straight to the square, bilinear with antialiasing",
    "tf": "resized straight to the square, bilinear from the four nearest pixels",
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The view of each image that the model is given."""

    size: int | None = None
    """Side in pixels of the square that the model is given.
    None: the size that the weights were fine-tuned at, where the config.json beside them says so,
    else BiT-HyperRule's: 128 where images have fewer than 96x96 pixels, and 480 otherwise."""
    resize: Resize | None = None
    """Resizing method: `pillow` (antialiased, as BiT's PyTorch code) and `tf` (the four nearest pixels, as BiT's
    TensorFlow code) resize the whole image to the square, whatever its shape; `timm` resizes the shorter side and
    cuts out the centre. None: the method that the weights were fine-tuned with, else `pillow`."""
    crop_pct: float | None = None
    """Side of the square as a share of the resized image's shorter side, with --resize timm. None: 0.875.
    timm has 1 for the ImageNet-1k models at 448 and 480 pixels, and 0.875 for others."""
    interpolation: Interpolation | None = None
    """Interpolation of --resize timm, which has bicubic for the distilled models and bilinear for others.
    None: bilinear."""

    def check(self) -> None:
        """Raises RequestError if a number is out of its range, or if a flag would change nothing."""
        require_positive({"--size": self.size})
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise RequestError(f"--crop-pct {self.crop_pct:g} must be above 0 and at most 1")
        for flag, value in (("--crop-pct", self.crop_pct), ("--interpolation", self.interpolation)):
            if value is not None and self.resize != "timm":
                raise RequestError(f"{flag} {value} belongs to --resize timm; add that, or leave {flag} out")

    def side(self, known: Description, area: Callable[[], int]) -> int:
        """Returns the side that the flags decide, else the weights, else BiT-HyperRule.

        Args:
            known: what is known of the weights' training.
            area: returns the number of pixels of a typical image; called only where BiT-HyperRule decides.
        """
        return self.size or known.crop or hyperrule.resolution(area())[1]

    def views(self, known: Description, side: int) -> Views:
        """Returns the view of this side.

        Args:
            known: what is known of the weights' training.
        """
        resize = self.resize or known.resize
        if resize == "timm":
            return CentreCrop.of(side, self.crop_pct or CROP_SHARE, self.interpolation or "bilinear")
        return Views(side, side, flip=False, resize=resize)


def in_words(views: Views) -> str:
    """Returns a clause that says how images are resized."""
    square = f"{views.crop}x{views.crop} pixels"
    if isinstance(views, CentreCrop):
        how = f"shorter side resized to {views.resize_to} pixels ({views.interpolation}), the centre cut out"
        return f"{square}, {how} (timm)"
    return f"{square}, {SQUARE[views.resize]} ({views.resize})"
