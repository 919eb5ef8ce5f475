"""Chooses the parameters that train, all of them or those that --train names, and takes trees of these alone out of the
whole tree and back into it."""

import itertools
import re
from collections.abc import Collection
from typing import Any

from flax import traverse_util

from bit_jax.model.architecture import PREFIX
from input_pipeline.errors import RequestError

SHOWN = 3  # paths in a refusal


def trains(path: str, pattern: str | None) -> bool:
    """Whether the pattern, a regular expression, matches one part of a parameter's path or several in a row, from their
    beginning to their end; None matches all.

    The path is the parameter's official key, with or without the leading `resnet/`. `head$` and `(?i)HEAD` match as
    `head` does, because what they are matched against begins and ends with the parts.
    """
    if pattern is None:
        return True
    parts = path.removeprefix(PREFIX).split("/")
    ends = itertools.combinations(range(len(parts) + 1), 2)
    return any(re.fullmatch(pattern, "/".join(parts[begin:end])) for begin, end in ends)


def require(keys: Collection[str], pattern: str | None) -> list[str]:
    """Returns those of a model's official keys that train.

    Raises:
        RequestError: the pattern matches none of them; the message gives examples of paths.
    """
    chosen = [key for key in keys if trains(key, pattern)]
    if not chosen:
        paths = [key.removeprefix(PREFIX) for key in keys]
        examples = dict.fromkeys(paths[number * (len(paths) - 1) // (SHOWN - 1)] for number in range(SHOWN))
        raise RequestError(
            f"--train {pattern!r} matches no parameter; it is matched against whole parts of paths such as "
            f"{', '.join(examples)}, as in head or 'block4|head'"
        )
    return chosen


def trained(params: Any, pattern: str | None) -> Any:
    """Returns the tree of the parameters that train, which has no other leaves."""
    if pattern is None:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if trains(path, pattern)}, sep="/")


def restricted(params: Any, like: Any) -> Any:
    """Returns the leaves of a tree that another one, with some of its leaves, has too."""
    if not isinstance(like, dict):
        return params
    return {name: restricted(params[name], inner) for name, inner in like.items()}


def overlaid(params: Any, own: Any) -> Any:
    """Returns the parameters with those of `own`, a tree with some of their leaves, in the places of their own."""
    if not isinstance(own, dict):
        return own
    return {name: overlaid(inner, own[name]) if name in own else inner for name, inner in params.items()}
