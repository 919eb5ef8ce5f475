"""Image files on PyTorch's side of the comparison: decoded by Pillow alone, within the limits that training has."""

import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from input_pipeline.examples import DamagedImage, DatasetError, Example
from input_pipeline.terminal import printable

# as training's; Pillow would also start Ghostscript for an EPS, whatever the file is called
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "MPO")
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26


def read(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        DatasetError: it cannot be read, or is a pipe, a socket or a device, which might never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DatasetError(f"{path} is not a regular file; give image files")
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None


def decode(data: np.ndarray | bytes) -> Image.Image:
    """As torchvision's `pil_loader`: an array or an encoded file as an RGB image.

    Raises:
        DamagedImage: it is of another format, too large, or damaged.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert("RGB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DamagedImage(f"an image of {image.width}x{image.height}, more than {MAX_PIXELS:,} pixels")
            return image.convert("RGB")
    except DamagedImage:
        raise
    except Exception as error:  # readers of image formats raise what they come across
        raise DamagedImage(f"not a readable image ({' '.join(str(error).split())})") from None


def rgb(example: Example, name: str) -> Image.Image:
    """An example's image; `name` is what it is an example of.

    Raises:
        DatasetError: it cannot be read; the message names the example.
    """
    try:
        return decode(example["image"])
    except DamagedImage as error:
        raise DatasetError(f"example {printable(example['id'])} of {printable(name)} is {error}") from None
