"""Reads every record of a dataset, as training will: how many there are, whether each decodes, whether labels fit."""

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from input_pipeline.examples import NO_LABEL, DamagedImage, DatasetError, Source
from input_pipeline.preprocess import decode

BLOCK = 1024  # records under way at once


@dataclasses.dataclass
class Checked:
    """What a split holds.

    Attributes:
        name, examples: of the split.
        classes: how many occur.
        damaged: {id: why} of images that cannot be decoded.
        wrong: sentences on records that cannot be read and labels out of range.
        least, most: pixels of the smallest and the largest image, as height x width.
    """

    name: str
    examples: int
    classes: int = 0
    damaged: dict[str, str] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)
    least: tuple[int, int] = (0, 0)
    most: tuple[int, int] = (0, 0)

    @property
    def holds(self) -> bool:
        return not self.damaged and not self.wrong


def check(source: Source, advance: Callable[[int], None] = lambda done: None) -> Checked:
    """Reads and decodes all of a split, on every core.

    Args:
        advance: called now and then with the number of examples done.
    """
    checked = Checked(source.name, len(source))
    labels, sizes = np.full(len(source), NO_LABEL), set()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(source), BLOCK):
            block = range(start, min(start + BLOCK, len(source)))
            for index, (identity, label, outcome) in zip(
                block, pool.map(lambda index: _look(source, index), block), strict=True
            ):
                labels[index] = label
                if isinstance(outcome, DamagedImage):
                    checked.damaged[identity] = str(outcome)
                elif isinstance(outcome, DatasetError):
                    checked.wrong.append(str(outcome))
                else:
                    sizes.add(outcome)
            advance(block.stop)
    present = np.unique(labels)
    if not np.array_equal(present, [NO_LABEL]):
        outside = present[(present < 0) | (present >= len(source.class_names))]
        checked.wrong += [f"label {label} is not one of {len(source.class_names)} classes" for label in outside]
    checked.classes = len(present)
    if sizes:
        checked.least = min(sizes, key=lambda size: size[0] * size[1])
        checked.most = max(sizes, key=lambda size: size[0] * size[1])
    return checked


def _look(source: Source, index: int) -> tuple[str, int, tuple[int, int] | DatasetError]:
    """Its id, its label, and the image's height and width or what is wrong."""
    try:
        example = source[index]
    except DatasetError as error:
        return str(index), NO_LABEL, error
    try:
        height, width, _ = decode(example["image"]).shape
    except DamagedImage as error:
        return example["id"], example["label"], error
    return example["id"], example["label"], (height, width)
