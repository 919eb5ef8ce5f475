"""ImageNet's class names in words; its datasets name the classes by their WordNet ids."""

import collections
import functools
import gzip
from collections.abc import Sequence
from importlib import resources


@functools.cache
def imagenet1k() -> dict[str, str]:
    """Returns {WordNet id: words} for the 1,000 classes, in label order."""
    return _parsed(resources.files("bit_jax.model").joinpath("imagenet1k_classes.txt").read_text())


@functools.cache
def imagenet21k() -> dict[str, str]:
    """Returns {WordNet id: words} for the 21,843 classes of ImageNet-21k, in the label order of BiT-M's heads. Of the
    1,000 it lacks one, n04399382 (teddy bear)."""
    packed = resources.files("bit_jax.model").joinpath("imagenet21k_classes.txt.gz").read_bytes()
    return _parsed(gzip.decompress(packed).decode())


def _parsed(table: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in table.splitlines() if not line.startswith("#"))


def imagenet(num_classes: int) -> dict[str, str] | None:
    """Returns {WordNet id: words} for a head of 1,000 or 21,843 classes, else None."""
    table = {1000: imagenet1k, 21_843: imagenet21k}.get(num_classes)
    return None if table is None else table()


def in_words(names: Sequence[str]) -> list[str]:
    """Returns a dataset's class names with ImageNet's WordNet ids replaced by words.

    Where several have the same words, as the bird and the machine have `crane`, each is followed by its id.
    """
    few = imagenet1k()
    words = [few.get(name) or (imagenet21k().get(name, name) if _is_wordnet_id(name) else name) for name in names]
    counts = collections.Counter(words)
    shown = zip(words, names, strict=True)
    return [text if text == name or counts[text] == 1 else f"{text} ({name})" for text, name in shown]


def _is_wordnet_id(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdecimal()
