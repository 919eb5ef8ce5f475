"""ImageNet's class names in words; its datasets name the classes by their WordNet ids."""

import functools
from collections.abc import Sequence
from importlib import resources


@functools.cache
def imagenet1k() -> dict[str, str]:
    """Returns {WordNet id: words} for the 1,000 classes, in label order."""
    table = resources.files("bit_jax.model").joinpath("imagenet1k_classes.txt").read_text()
    return dict(line.split(" ", 1) for line in table.splitlines() if not line.startswith("#"))


def in_words(names: Sequence[str]) -> list[str]:
    """Returns a dataset's class names with the WordNet ids of ImageNet-1k replaced by words."""
    return [imagenet1k().get(name, name) for name in names]
