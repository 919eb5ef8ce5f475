"""Matches a dataset's labels to the classes of the model's head; both sides open datasets through `open_labelled`.

Classes are matched by name; `bit_jax.predictions.classes` says which heads have names.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bit_jax.formats.described import described
from bit_jax.predictions.classes import Head
from input_pipeline.errors import RequestError
from input_pipeline.examples import Source, Subset, relabelled
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
    head = Head.of(None if arbitrary else described(weight_file).class_names, num_classes, weights)
    if head is not None and (head.described or any(name in head.names for name in source.class_names)):
        relabelled(source, head.names, head.whose)
        return Matching(list(head.names), head.how)
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


def open_labelled(
    dataset: str, split: str, data_dir: Any, class_names: Sequence[str] | None, limit: int | None = None
) -> Source:
    """Opens a split with the head's labels, or its first `limit` examples; both sides open datasets only here."""
    source = open_source(dataset, split, data_dir)
    if class_names is not None:
        source = relabelled(source, class_names, "the head")
    if limit is None:
        return source
    return Subset(source, np.arange(min(limit, len(source))), f"{source.name} (first {limit})")
