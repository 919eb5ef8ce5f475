"""Matches a dataset's labels to the classes of the model's head; both sides open datasets through `open_labelled`.

Classes are matched by name. A head has names if training left a config.json beside the weights, or if it has
ImageNet's 1,000 classes and the dataset has their WordNet ids.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bit_jax.formats.described import described
from bit_jax.model.class_names import imagenet1k
from input_pipeline.errors import RequestError
from input_pipeline.examples import Source, relabelled
from input_pipeline.sources import open_source
from input_pipeline.terminal import printable


@dataclasses.dataclass(frozen=True)
class Matching:
    """The matching of one split's labels to the head's.

    Attributes:
        class_names: the head's class names; None: labels are used unchanged.
        how: a clause for the attestation that says how they were matched.
    """

    class_names: list[str] | None
    how: str


def matching(source: Source, weights: str, weight_file: Path, num_classes: int, *, arbitrary: bool) -> Matching:
    """Decides how a split's labels are matched to a head.

    Args:
        weights: name of the weights, for messages.
        arbitrary: whether the head is random, so that its classes have no meaning.

    Raises:
        RequestError: the split has classes that the head has not, or the head's classes have no names to match.
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
    """Opens a split with the head's labels; both sides open datasets only here."""
    source = open_source(dataset, split, data_dir)
    return source if class_names is None else relabelled(source, class_names, "the head")
