"""Finds a model's state dict in what `torch.save` writes: alone, in dicts within dicts, of a model that was wrapped.

Whatever has a `shape` stands for a tensor, so that this file imports no framework.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from bit_jax.formats.official import WeightsError, listed

DEEPEST = 4  # levels of dicts within dicts that a checkpoint is searched through
# DataParallel, DistributedDataParallel and torch.compile put these before the names of the model that they wrap
WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod)\.")


def named_state_dicts(content: Any, depth: int = 0, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, tensors) of every dict in a checkpoint that has any; the outermost has no name."""
    if not isinstance(content, Mapping) or depth > DEEPEST:
        return
    tensors = {str(key): value for key, value in content.items() if hasattr(value, "shape")}
    if tensors:
        yield name, tensors
    for key, value in content.items():
        yield from named_state_dicts(value, depth + 1, f"{name}.{key}" if name else str(key))


def unwrapped(state: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Returns the tensors under the names that they have in a model that nothing wraps.

    Args:
        known: names in such a model; a prefix that all of the state's names share is taken off until one fits.

    Raises:
        WeightsError: two names become one.
    """
    known = set(known)
    state = _renamed(state, lambda name: WRAPPERS.sub("", name))
    while not known & state.keys():
        first = {name.partition(".")[0] for name in state}
        if len(first) != 1 or not all("." in name for name in state):
            break
        # a prefix such as "model." or "net.": the model was an attribute of the module that was saved
        state = _renamed(state, lambda name: WRAPPERS.sub("", name.partition(".")[2]))
    return state


def _renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    renamed: dict[str, tuple[str, Any]] = {}
    for name, tensor in state.items():
        short = rename(name)
        if short in renamed:
            names = [renamed[short][0], name]
            raise WeightsError(f"{listed(names)} are both {short} once wrappers are left out; save one of them alone")
        renamed[short] = (name, tensor)
    return {short: tensor for short, (_, tensor) in renamed.items()}
