"""Reads every record of a dataset, as training will, and counts those that do not decode or have a wrong label."""

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from input_pipeline.examples import NO_LABEL, CannotRead, DamagedImage, DatasetError, Source
from input_pipeline.preprocess import decode

BLOCK = 1024  # records that are read at the same time
SHOWN = 20  # faults of a split that are described; the rest are only counted


@dataclasses.dataclass
class Checked:
    """The content and the faults of one split.

    Attributes:
        name, examples: the split's name and number of examples.
        classes: number of its classes that occur.
        damaged: number of images that cannot be decoded.
        wrong: number of records that cannot be read and of labels out of range.
        faults: a sentence on each of the first `SHOWN` faults.
        least, most: (height, width) in pixels of the smallest and the largest image.
    """

    name: str
    examples: int
    classes: int = 0
    damaged: int = 0
    wrong: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)
    least: tuple[int, int] = (0, 0)
    most: tuple[int, int] = (0, 0)

    @property
    def holds(self) -> bool:
        return not self.damaged and not self.wrong

    def fault(self, sentence: str, *, damaged: int = 0, wrong: int = 0) -> None:
        """Counts a fault, and keeps its sentence if it is among the first `SHOWN`, so that memory stays bounded."""
        self.damaged += damaged
        self.wrong += wrong
        if len(self.faults) < SHOWN:
            self.faults.append(sentence)

    def seen(self, size: tuple[int, int]) -> None:
        """Takes note of an image's height and width."""
        self.least = min(self.least, size, key=_area) if self.least != (0, 0) else size
        self.most = max(self.most, size, key=_area)


class _Look(NamedTuple):
    """One record: its id and label if it can be read, and its (height, width) or its fault."""

    identity: str
    label: int | None
    size: tuple[int, int] | None
    fault: str = ""


def check(source: Source, advance: Callable[[int], None] = lambda done: None) -> Checked:
    """Reads and decodes all examples of a split, on every core.

    Args:
        advance: function that is called after every `BLOCK` examples with the number of examples done.

    Raises:
        CannotRead: the operating system refuses to read a file, which says nothing about the dataset.
    """
    checked = Checked(source.name, len(source))
    occurring, unlabelled = np.zeros(len(source.class_names), bool), 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(source), BLOCK):
            block = range(start, min(start + BLOCK, len(source)))
            for look in pool.map(lambda index: _look(source, index), block):
                if look.size is not None:
                    checked.seen(look.size)
                elif look.label is not None:
                    checked.fault(look.fault, damaged=1)
                else:
                    checked.fault(look.fault, wrong=1)
                if look.label == NO_LABEL:
                    unlabelled += 1
                elif look.label is not None and 0 <= look.label < len(occurring):
                    occurring[look.label] = True
                elif look.label is not None:
                    checked.fault(
                        f"label {look.label} of example {look.identity} is not one of {len(occurring)} classes", wrong=1
                    )
            advance(block.stop)
    checked.classes = int(occurring.sum())
    if unlabelled and checked.classes:  # a whole split without labels is published so
        checked.fault(f"{unlabelled:,} examples have no label, and others have", wrong=1)
    return checked


def _look(source: Source, index: int) -> _Look:
    """Reads one record. It returns faults as text: an exception would keep the image in its traceback's frames."""
    try:
        example = source[index]
    except CannotRead:
        raise
    except DatasetError as error:
        return _Look("", None, None, str(error))
    try:
        height, width, _ = decode(example["image"], reuse=True).shape
    except DamagedImage as error:
        return _Look(example["id"], example["label"], None, f"damaged: {example['id']}: {error}")
    return _Look(example["id"], example["label"], (height, width))


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
