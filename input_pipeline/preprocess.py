"""Turns one image into the uint8 square that the model is given.

Unusual images are treated as follows: alpha is dropped; grey becomes three equal channels; CMYK and palettes become RGB
as Pillow converts them; 16 bits keep the upper eight; a rotation noted in EXIF is not carried out; a file's format is
taken from its first bytes, never from its name. docs/imagenet.md compares this with torchvision and TensorFlow.
"""

import dataclasses
import statistics
from typing import ClassVar, Literal

import numpy as np
import simplejpeg

from input_pipeline.examples import DamagedImage, DatasetError, Source, first_undamaged
from input_pipeline.image_file import check_pixels, damaged, opened
from input_pipeline.inception import Box, draw_box
from input_pipeline.resample import Method, Window, resample, scratch

JPEG = b"\xff\xd8"
# simplejpeg converts these to RGB exactly as Pillow does; it differs for CMYK, which 22 images of ImageNet are
JPEG_COLOURS = ("YCbCr", "RGB", "Gray")
LOOKED_AT = 16  # examples that a dataset's typical size is computed from


@dataclasses.dataclass(frozen=True)
class Views:
    """Views of images as in BiT: training resizes to a square of side `resize_to` and crops a random square of side
    `crop`; evaluation resizes straight to a square of side `crop`. Neither keeps the aspect ratio.

    Attributes:
        resize_to, crop: sides of the squares in pixels.
        flip: whether half of the training views are mirrored.
        resize: method of resizing and decoding: `pillow`, as in BiT's PyTorch code, or `tf`, as in its TensorFlow and
            JAX code.
        crop_style: `bit`, or `inception` for training views that show a random part of the image resized to the square,
            see `inception.py`; `resize_to` does not matter then.
    """

    resize_to: int
    crop: int
    flip: bool
    resize: Method = "pillow"
    crop_style: Literal["bit", "inception"] = "bit"
    field: ClassVar[str] = "image"  # the batch's array of what is shown

    def __post_init__(self):
        if self.crop < 1 or (self.crop_style == "bit" and self.crop > self.resize_to):
            raise DatasetError(f"crop {self.crop} does not fit into resize-to {self.resize_to}; crop at most that")

    def train(self, image: np.ndarray | bytes, rng: np.random.Generator, into: np.ndarray | None = None) -> np.ndarray:
        """Returns a training view, uint8 [crop, crop, 3], in `into` if that is given.

        Args:
            image: an encoded file or an array; see `decode`.

        Raises:
            DamagedImage: the image cannot be decoded; nothing was drawn from `rng`.
        """
        pixels = self.pixels(image)
        if self.crop_style == "inception":
            return self.of_box(pixels, self.draw_box(rng, *pixels.shape[:2]), into)
        return resample(pixels, self.resize_to, self.draw(rng), self.resize, into)

    def empty(self, rows: int) -> np.ndarray:
        """Makes a batch's array of views, uint8 [rows, crop, crop, 3], without values."""
        return np.empty((rows, self.crop, self.crop, 3), np.uint8)

    def draw(self, rng: np.random.Generator) -> Window:
        """Draws a training view's window. It always draws three numbers, so that `flip` does not shift later draws."""
        top, left = rng.integers(self.resize_to - self.crop + 1, size=2)
        mirrored = rng.random() < 0.5
        return Window(int(top), int(left), self.crop, bool(self.flip and mirrored))

    def draw_box(self, rng: np.random.Generator, height: int, width: int) -> Box:
        """Draws the part of an image of height x width pixels that a training view in Inception's style shows."""
        box = draw_box(rng, height, width)
        return box if self.flip else box._replace(mirrored=False)

    def of_box(self, pixels: np.ndarray, box: Box, into: np.ndarray | None = None) -> np.ndarray:
        """Returns a box of the image, cut out and then resized, so that no pixel beyond it counts, as in torchvision:
        uint8 [crop, crop, 3]."""
        top, left, height, width, mirrored = box
        cut = scratch("cut", height, width)
        cut[...] = pixels[top : top + height, left : left + width]
        return resample(cut, self.crop, Window(0, 0, self.crop, mirrored), self.resize, into)

    def evaluation(self, image: np.ndarray | bytes, into: np.ndarray | None = None) -> np.ndarray:
        """Returns the evaluation view, uint8 [crop, crop, 3], in `into` if that is given; see `train`."""
        return resample(self.pixels(image), self.crop, Window(0, 0, self.crop), self.resize, into)

    def pixels(self, image: np.ndarray | bytes) -> np.ndarray:
        """Decodes an image to uint8 [height, width, 3], valid until this thread's next call."""
        return decode(image, fast=self.resize == "tf", reuse=True)


def decode(image: np.ndarray | bytes, *, fast: bool = False, reuse: bool = False) -> np.ndarray:
    """Returns an image's RGB pixels, uint8 [height, width, 3].

    Args:
        image: an encoded file, or an array [height, width] or [height, width, 3].
        fast: whether to decode JPEGs with the integer transform that is TensorFlow's default.
        reuse: whether to decode into memory that this thread's next such call overwrites.

    Raises:
        DamagedImage: the bytes are not an image that can be read whole.
    """
    if isinstance(image, np.ndarray):
        return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    if image.startswith(JPEG):
        pixels = _simplejpeg(image, fast, reuse)
        if pixels is not None:
            return pixels
    with opened(image) as file:
        try:
            if file.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would turn it white
                grey = np.clip(np.asarray(file) >> 8, 0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(file.convert("RGB"))
        except MemoryError:  # the machine's fault, not the image's
            raise
        except Exception as error:  # the formats' readers raise exceptions of many kinds
            raise damaged(error) from None


def _simplejpeg(image: bytes, fast: bool, reuse: bool) -> np.ndarray | None:
    """Returns a JPEG's pixels, or None where Pillow must decode it or report its damage, as in BiT's PyTorch code.

    Besides damaged files, simplejpeg refuses some whole ones with unrelated exceptions, such as a KeyError for the
    4:4:1 subsampling that comes from rotating a 4:1:1 file by 90 degrees.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except Exception:
        return None
    check_pixels(int(height), int(width))
    if colours not in JPEG_COLOURS:
        return None
    buffer = scratch("decoded", int(height), int(width)) if reuse else None
    try:
        return simplejpeg.decode_jpeg(image, "RGB", fastdct=fast, buffer=buffer)
    except Exception:
        return None


def native_area(image: np.ndarray | bytes) -> int:
    """Counts the pixels of the image as it is stored; only the header of a file is read.

    Raises:
        DamagedImage: the header cannot be read.
    """
    if isinstance(image, np.ndarray):
        return image.shape[0] * image.shape[1]
    with opened(image) as file:
        return file.width * file.height


def typical_area(source: Source, *, skip_damaged: bool) -> tuple[int, str]:
    """Finds the typical number of pixels of a dataset's stored images: the median of `LOOKED_AT` evenly spread ones.

    To choose a resolution by it, give the whole training split, not a few-shot selection: then the resolution does not
    depend on the seed.

    Args:
        skip_damaged: whether the example after a damaged one replaces it, as in training.

    Returns:
        The median, and a sentence for the log with the smallest, largest and median number of pixels.

    Raises:
        DamagedImage: an image's header cannot be read; the message names the example.
        CannotRead: the operating system refuses to read a file.
    """

    def area(index: int) -> int:
        example = source[index]
        try:
            return native_area(example["image"])
        except DamagedImage as error:
            raise DamagedImage(f"example {example['id']} of {source.name} is {error}") from None

    places = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int))
    areas = [first_undamaged(source, int(index), area, skip_damaged=skip_damaged)[1] for index in places]
    median = statistics.median_low(areas)
    extremes = f"of {len(areas)} images spread over {source.name}, the smallest has {min(areas):,} pixels"
    return median, f"{extremes}, the largest {max(areas):,}, the median {median:,}"
