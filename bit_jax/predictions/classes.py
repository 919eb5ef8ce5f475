"""The classes of a head, and which of them a dataset's labels are: matched by name, never silently by position.

A head has names if a config.json beside the weights lists them, as training leaves it, or if it has as many classes as
ImageNet-1k or ImageNet-21k, whose classes are named by WordNet ids.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from bit_jax.model.class_names import imagenet, imagenet1k, in_words
from input_pipeline.errors import RequestError
from input_pipeline.examples import Relabelled, Source, canonical, relabelled
from input_pipeline.terminal import printable

Competing = Literal["dataset", "occurring", "head"]
FEW_OCCUR = 0.5  # share of a dataset's classes below which it is worth a sentence that the others do not occur


@dataclasses.dataclass(frozen=True)
class Head:
    """The classes of a head that has names for them.

    Attributes:
        names: a name for each class, in the order of the logits.
        whose: the head's owner, for messages, such as "the head of w.npz".
        how: a clause that says how classes with these very names are matched, and where the names are from.
        described: whether the weights themselves brought the names, and not the number of classes.
    """

    names: tuple[str, ...]
    whose: str
    how: str
    described: bool

    @classmethod
    def of(cls, described: Sequence[str] | None, num_classes: int, weights: str) -> "Head | None":
        """Returns the classes of a head, or None if it has no names.

        Args:
            described: the class names that belong to the weights, or None if they are not known.
            num_classes: size of the head.
            weights: name of the weights, for messages.
        """
        if described is not None and len(described) == num_classes:
            how = "matched by name with the config.json beside the weights"
            return cls(_as_ids(described), f"the head of {weights}", how, True)
        if (known := imagenet(num_classes)) is not None:
            which = "ImageNet" if num_classes == len(imagenet1k()) else "ImageNet-21k"
            return cls(tuple(known), f"{which}'s head of {weights}", f"matched with {which}'s by WordNet id", False)
        return None

    def spelled(self, names: Sequence[str]) -> tuple[dict[str, str], str]:
        """Finds the names of a dataset's classes that are spelled otherwise here.

        A head with ImageNet-1k's WordNet ids also knows the classes by their numbers from 0 to 999, as ImageNet-V2's
        folders are named, and by their words. Numbers count only where the names are all 1,000 of them, because the
        names of a few, such as those of MNIST, are other things' numbers; words only where they belong to one class.

        Returns:
            ({the dataset's name: this head's}, a clause that says how the classes are matched).
        """
        known = imagenet1k()
        if self.names != tuple(known):
            return {}, self.how
        if set(names) == {str(number) for number in range(len(known))}:
            return {name: self.names[int(name)] for name in names}, "matched with ImageNet's by number"
        of_words: dict[str, list[str]] = {}
        for wordnet_id, words in known.items():
            of_words.setdefault(words, []).append(wordnet_id)
        candidates = {name: of_words.get(canonical(name), []) for name in names}
        spelling = {name: found[0] for name, found in candidates.items() if len(found) == 1}
        if not spelling:
            return {}, self.how
        by_both = len(spelling) < len(set(names))
        return spelling, f"matched with ImageNet's {'by WordNet id and ' if by_both else ''}by words"


def _as_ids(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names; if they are ImageNet-1k's in words, in its order, then its WordNet ids."""
    ids = imagenet1k()
    return tuple(ids) if list(names) == list(ids.values()) else tuple(names)


@dataclasses.dataclass(frozen=True)
class Matched:
    """A dataset whose labels are numbers of the classes that compete for the prediction.

    Attributes:
        source: the examples.
        competing: the logits of these classes are compared, by their numbers in the head; label 0 is the first.
        names: a name to show for each competing class, in words; no two are equal unless the head's names are.
        notes: sentences that say how the classes were matched, and which of them compete.
    """

    source: Source
    competing: tuple[int, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...]


def match(source: Source, head: Head, competing: Competing) -> Matched:
    """Matches a dataset's labels with a head's classes.

    Args:
        competing: which classes compete for the prediction: all of the `head`, those of the `dataset`, or those of
            which the split has an example (`occurring`).

    Raises:
        DatasetError: the dataset has classes that the head has not; the message names them.
    """
    spelling, how = head.spelled(source.class_names)
    source = relabelled(_spelled(source, spelling), head.names, head.whose)
    return _restricted(source, _declared(source, len(head.names)), head.names, competing, how)


def match_by_position(source: Source, num_classes: int, weights: str, competing: Competing) -> Matched:
    """Takes a dataset's labels as numbers of the head's classes.

    Args:
        num_classes: size of the head.
        weights: name of the weights, for messages.
        competing: which classes compete for the prediction; see `match`. The dataset has all of the head's.

    Raises:
        RequestError: their numbers of classes differ.
    """
    count = len(source.class_names)
    if count != num_classes:
        raise RequestError(
            f"{printable(source.name)} has {count:,} classes and the head of {weights} has {num_classes:,}; give "
            "--dataset or --weights that fit, because only equal numbers can be matched by position"
        )
    how = "matched by position, unverified"
    return _restricted(source, list(range(count)), source.class_names, competing, how)


def unnamed(source: Source, num_classes: int, weights: str) -> RequestError:
    """Makes the error for a head without names."""
    shown = ", ".join(printable(name) for name in source.class_names[:4])
    more = ", ..." if len(source.class_names) > 4 else ""
    return RequestError(
        f"the head of {weights} has {num_classes:,} classes without names, and {printable(source.name)} has "
        f"{len(source.class_names):,} ({shown}{more}); put the config.json that training left beside the weights, or "
        "add --by-position if you know that label 0 is the head's class 0, and so on"
    )


class _Spelled(Relabelled):
    """Examples of another source, whose classes have other names."""

    def __init__(self, source: Source, names: Sequence[str]):
        super().__init__(source, names, np.arange(len(names), dtype=np.int32))


def _spelled(source: Source, spelling: Mapping[str, str]) -> Source:
    if not spelling:
        return source
    return _Spelled(source, [spelling.get(name, name) for name in source.class_names])


def _declared(source: Source, num_classes: int) -> list[int]:
    """Returns the numbers in the head of the classes that the dataset has, whether or not an example is of them."""
    if isinstance(source, Relabelled):
        return sorted({int(number) for number in source.numbers})
    return list(range(num_classes))


def _restricted(source: Source, declared: list[int], names: Sequence[str], competing: Competing, how: str) -> Matched:
    everything = len(names)
    if competing == "occurring":
        labels = source.labels
        chosen = sorted({int(label) for label in labels if label >= 0})
        rule = f"the {len(chosen):,} classes that occur in the split compete, of the head's {everything:,}"
    elif competing == "dataset":
        chosen = declared
        rule = (
            f"the dataset has {len(chosen):,} of the head's {everything:,} classes, and only these compete; "
            "--classes head lets all compete"
        )
    else:
        chosen = list(range(everything))
        rule = f"all {everything:,} classes of the head compete, and the dataset has {len(declared):,} of them"
    notes = [how, *([rule] if len(chosen) < everything or len(declared) < everything else [])]
    shown = tuple(in_words([names[number] for number in chosen]))
    if len(chosen) < everything:
        numbers = np.full(everything, -1, np.int32)
        numbers[chosen] = np.arange(len(chosen))
        source = Relabelled(source, [names[number] for number in chosen], numbers)
    return Matched(source, tuple(chosen), shown, tuple(notes))
