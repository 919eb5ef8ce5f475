"""What ImageNet's classes are called in words; its datasets name them by their WordNet ids."""

import functools
from collections.abc import Sequence
from importlib import resources


@functools.cache
def imagenet1k() -> dict[str, str]:
    """{WordNet id: words} of the 1,000 classes, in label order."""
    table = resources.files("bit_jax.model").joinpath("imagenet1k_classes.txt").read_text()
    return dict(line.split(" ", 1) for line in table.splitlines() if not line.startswith("#"))


def in_words(names: Sequence[str]) -> list[str]:
    """Class names as a dataset has them, with words for WordNet ids of ImageNet-1k."""
    return [imagenet1k().get(name, name) for name in names]
