"""Image files on PyTorch's side of the comparison: decoded by Pillow alone, within the limits that training has."""

import io

import numpy as np
from PIL import Image

from input_pipeline.examples import DamagedImage, DatasetError, Example
from input_pipeline.image_file import FORMATS, check_pixels
from input_pipeline.terminal import printable


def decode(data: np.ndarray | bytes) -> Image.Image:
    """Turns an array or an encoded file into an RGB image, as torchvision's `pil_loader` does.

    Raises:
        DamagedImage: it is of another format, too large, or damaged.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert("RGB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_pixels(image.height, image.width)
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
