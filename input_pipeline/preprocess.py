"""One image -> the uint8 square that the model is given.

What is done to images that are not ordinary: alpha is dropped; grey becomes three equal channels; CMYK and palettes
become RGB as Pillow converts them; 16 bits keep the upper eight; a rotation noted in EXIF is not carried out; what a
file is, its first bytes say, never its name. docs/imagenet.md compares this with torchvision and TensorFlow.
"""

import dataclasses
import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from input_pipeline.examples import DamagedImage, DatasetError
from input_pipeline.resample import Method, Window, resample, scratch

JPEG = b"\xff\xd8"
# what simplejpeg converts to RGB as Pillow does, bit for bit; it differs for CMYK, which 22 images of ImageNet are
JPEG_COLOURS = ("YCbCr", "RGB", "Gray")


@dataclasses.dataclass(frozen=True)
class Views:
    """How an image is shown: training resizes to `resize_to` squared and crops `crop` squared at random; evaluation
    resizes straight to `crop` squared (BiT, both without keeping the aspect ratio).

    Attributes:
        resize_to, crop: sides of squares.
        flip: whether half of the training views are mirrored.
        resize: `pillow`, as BiT's PyTorch code, or `tf`, as its TensorFlow and JAX code; of resizing and decoding.
    """

    resize_to: int
    crop: int
    flip: bool
    resize: Method = "pillow"

    def __post_init__(self):
        if not 0 < self.crop <= self.resize_to:
            raise DatasetError(f"crop {self.crop} does not fit into resize-to {self.resize_to}; crop at most that")

    def train(self, image: np.ndarray | bytes, rng: np.random.Generator, into: np.ndarray | None = None) -> np.ndarray:
        """An encoded file or an array, see `decode` -> uint8 [crop, crop, 3], in `into` where given.

        Raises:
            DamagedImage: nothing is drawn from `rng` then.
        """
        pixels = self.pixels(image)
        return resample(pixels, self.resize_to, self.draw(rng), self.resize, into)

    def draw(self, rng: np.random.Generator) -> Window:
        """A training view's window; three draws whatever the flags, so that none shift others."""
        top, left = rng.integers(self.resize_to - self.crop + 1, size=2)
        mirrored = rng.random() < 0.5
        return Window(int(top), int(left), self.crop, bool(self.flip and mirrored))

    def evaluation(self, image: np.ndarray | bytes, into: np.ndarray | None = None) -> np.ndarray:
        """As `train`, without chance."""
        return resample(self.pixels(image), self.crop, Window(0, 0, self.crop), self.resize, into)

    def pixels(self, image: np.ndarray | bytes) -> np.ndarray:
        """uint8 [height, width, 3], valid until this thread's next call."""
        return decode(image, fast=self.resize == "tf", reuse=True)


def decode(image: np.ndarray | bytes, *, fast: bool = False, reuse: bool = False) -> np.ndarray:
    """RGB pixels, uint8 [height, width, 3], of an encoded file or an array [height, width] or [height, width, 3].

    Args:
        fast: JPEGs by the integer transform that TensorFlow takes unless told otherwise.
        reuse: into memory that this thread's next such call overwrites.

    Raises:
        DamagedImage: the bytes are not an image that can be read whole.
    """
    if isinstance(image, np.ndarray):
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    if image.startswith(JPEG):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
            if colours in JPEG_COLOURS:
                buffer = scratch("decoded", int(height), int(width)) if reuse else None
                return simplejpeg.decode_jpeg(image, "RGB", fastdct=fast, buffer=buffer)
        except ValueError:
            pass  # Pillow decides what cannot be read, because the comparison with PyTorch does
    try:
        with Image.open(io.BytesIO(image)) as opened:
            if opened.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would turn it white
                grey = np.clip(np.asarray(opened) >> 8, 0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(opened.convert("RGB"))
    except Exception as error:  # readers of two dozen formats raise what they come across
        raise _damaged(error) from None


def native_area(image: np.ndarray | bytes) -> int:
    """Pixels of the image as it is stored; of a file only the header is read."""
    if isinstance(image, np.ndarray):
        return image.shape[0] * image.shape[1]
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.width * opened.height
    except Exception as error:  # as above
        raise _damaged(error) from None


def _damaged(error: Exception) -> DamagedImage:
    reason = "its first bytes are no known format's" if isinstance(error, UnidentifiedImageError) else error
    return DamagedImage(f"not a readable image ({reason})")
