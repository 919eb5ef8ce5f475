"""Image files on PyTorch's side of the comparison: Pillow decodes them all, with the same limits as in training."""

import io

import numpy as np
from PIL import Image

from input_pipeline.examples import DamagedImage, DatasetError, Example
from input_pipeline.image_file import FORMATS, check_pixels
from input_pipeline.terminal import printable


def decode(data: np.ndarray | bytes) -> Image.Image:
    """Turns an array or an encoded file into an RGB image, as torchvision's `pil_loader` does.

    Raises:
        DamagedImage: the image has a format that training does not read, or is too large or damaged.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert("RGB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_pixels(image.height, image.width)
            return image.convert("RGB")
    except DamagedImage:
        raise
    except Exception as error:  # the formats' readers raise exceptions of many kinds
        raise DamagedImage(f"not a readable image ({' '.join(str(error).split())})") from None


def rgb(example: Example, name: str) -> Image.Image:
    """Returns an example's image in RGB; `name` is the name of its dataset.

    Raises:
        DatasetError: the image cannot be read; the message names the example.
    """
    try:
        return decode(example["image"])
    except DamagedImage as error:
        raise DatasetError(f"example {printable(example['id'])} of {printable(name)} is {error}") from None
