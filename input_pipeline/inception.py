"""The random crop of Inception's training (arXiv:1409.4842, section 6), as torchvision's RandomResizedCrop draws it:
a part of the image of random area and ratio, which is then resized to the square that the model sees."""

import math
from typing import NamedTuple

import numpy as np

AREA = (0.08, 1.0)  # smallest and largest share of the image's area, uniform
RATIO = (3 / 4, 4 / 3)  # smallest and largest width over height, uniform in the logarithm
TRIES = 10  # boxes that are drawn before the largest central one of a possible ratio is taken


class Box(NamedTuple):
    """A part of the image before it is resized.

    Attributes:
        top, left: the box's first row and column.
        height, width: its sides in pixels.
        mirrored: whether left and right change places.
    """

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False


def draw_box(rng: np.random.Generator, height: int, width: int) -> Box:
    """Draws the part of an image of height x width pixels that a training view shows, mirrored half of the time."""
    mirrored, (least, most) = bool(rng.random() < 0.5), RATIO
    for _ in range(TRIES):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(least), math.log(most)))
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            top, left = rng.integers((height - box_height + 1, width - box_width + 1))
            return Box(int(top), int(left), box_height, box_width, mirrored)
    box_height = min(height, round(width / least))
    box_width = min(width, round(height * most))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width, mirrored)
