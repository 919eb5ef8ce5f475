"""One image -> the uint8 square that the model is given.

What is done to images that are not ordinary: alpha is dropped; grey becomes three equal channels; CMYK and palettes
become RGB as Pillow converts them; 16 bits keep the upper eight; a rotation noted in EXIF is not carried out; what a
file is, its first bytes say, never its name. docs/imagenet.md compares this with torchvision and TensorFlow.
"""

import dataclasses
import statistics

import numpy as np
import simplejpeg

from input_pipeline.examples import DamagedImage, DatasetError, Source, first_undamaged
from input_pipeline.image_file import check_pixels, damaged, opened
from input_pipeline.resample import Method, Window, resample, scratch

JPEG = b"\xff\xd8"
# what simplejpeg converts to RGB as Pillow does, bit for bit; it differs for CMYK, which 22 images of ImageNet are
JPEG_COLOURS = ("YCbCr", "RGB", "Gray")
LOOKED_AT = 16  # examples that a dataset's typical size is taken from


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
        pixels = _simplejpeg(image, fast, reuse)
        if pixels is not None:
            return pixels
    with opened(image) as file:
        try:
            if file.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would turn it white
                grey = np.clip(np.asarray(file) >> 8, 0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(file.convert("RGB"))
        except MemoryError:  # says nothing about the image
            raise
        except Exception as error:  # readers of many formats raise what they come across
            raise damaged(error) from None


def _simplejpeg(image: bytes, fast: bool, reuse: bool) -> np.ndarray | None:
    """A JPEG's pixels, or None where Pillow has to decide, because the comparison with PyTorch does.

    Besides damage, simplejpeg refuses some whole files, by whatever its tables happen to raise: a KeyError for the
    4:4:1 subsampling that rotating a 4:1:1 file by 90 degrees makes.
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
    """Finds how many pixels a dataset's images have as they are stored: the median of some, evenly spread over all.

    It depends on the source alone, so whoever chooses a resolution by it should give the whole training split, before
    some examples of each class are selected by a seed.

    Args:
        skip_damaged: whether the example after a damaged one stands for it, as in training.

    Returns:
        The median, and a sentence for the log that says what was found.

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
    found = f"of {len(areas)} images spread over {source.name}, the smallest has {min(areas):,} pixels"
    return median, f"{found}, the largest {max(areas):,}, the median {median:,}"
