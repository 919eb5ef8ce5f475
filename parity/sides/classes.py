"""Matches a dataset's labels to the classes of the model's head; both sides open datasets through `open_labelled`.

Classes are matched by name. A head has names where training left a config.json beside the weights, or where it is
ImageNet's of 1,000 classes and the dataset has their WordNet ids.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bit_jax.model.class_names import imagenet1k
from bit_jax.model.fine_tuned import described
from input_pipeline.errors import RequestError
from input_pipeline.examples import Source, relabelled
from input_pipeline.sources import open_source
from input_pipeline.terminal import printable


@dataclasses.dataclass(frozen=True)
class Matching:
    """How the labels of one split become the head's.

    Attributes:
        class_names: of the head; None: labels are taken as they are.
        how: one clause for the attestation.
    """

    class_names: list[str] | None
    how: str


def matching(source: Source, weights: str, weight_file: Path, num_classes: int, *, arbitrary: bool) -> Matching:
    """Decides how a split's labels are matched to a head.

    Args:
        weights: what the weights are called, for messages.
        arbitrary: whether the head is random, so that its classes mean nothing and may be any.

    Raises:
        RequestError: the split has classes that the head has not, or nothing tells which are which.
    """
    names = described(weight_file).class_names if not arbitrary else None
    if names is not None and len(names) == num_classes:
        relabelled(source, names, f"the head of {weights}")
        return Matching(names, "matched by name with the config.json beside the weights")
    imagenet = imagenet1k()
    if num_classes == len(imagenet) and any(name in imagenet for name in source.class_names):
        relabelled(source, list(imagenet), f"ImageNet's head of {weights}")
        return Matching(list(imagenet), "matched with ImageNet's by WordNet id")
    count = len(source.class_names)
    if count == num_classes or (arbitrary and count < num_classes):
        what = "a random head's mean nothing" if arbitrary else "the head has no names"
        return Matching(None, f"taken by position, unverified: {what}")
    shown = ", ".join(printable(name) for name in source.class_names[:4])
    raise RequestError(
        f"{printable(source.name)} has {count:,} classes ({shown}{', ...' if count > 4 else ''}), the head of "
        f"{weights} has {num_classes:,} without names; give --dataset or --weights that fit, or weights with the "
        "config.json that training left beside them"
    )


def open_labelled(dataset: str, split: str, data_dir: Any, class_names: Sequence[str] | None) -> Source:
    """A split whose labels are the head's: the one place where either side opens a dataset."""
    source = open_source(dataset, split, data_dir)
    return source if class_names is None else relabelled(source, class_names, "the head")
