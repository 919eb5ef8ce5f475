"""Refuses a target in whose place something lies that would be lost."""

import os
from collections.abc import Set
from pathlib import Path

from bit_jax.formats.official import listed
from input_pipeline.errors import RequestError


def require_free(target: Path, contents: Set[str] | None, *, overwrite: bool) -> None:
    """Refuses a target that cannot be written, or whose place is taken.

    Args:
        target: the file or directory that is to be written.
        contents: names of what this program writes into a directory of that kind; None: the target is a file.
        overwrite: whether a target of the same kind may be replaced.

    Raises:
        RequestError: its folder does not exist; something is there and `overwrite` is not given; or what is there is of
            another kind, or a directory with something else in it.
    """
    folder = Path(os.path.realpath(target)).parent
    if not folder.is_dir():
        raise RequestError(f"{folder} is no directory; make it first")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise RequestError(f"{target} exists; add --overwrite to replace it, or choose another name")
    if not target.exists():  # a symbolic link to nothing: what it leads to is written
        return
    wanted = "a file" if contents is None else "a directory"
    if target.is_dir():
        if contents is None:
            raise RequestError(f"{target} is a directory, and {wanted} is to be written there; choose another name")
        if others := sorted(set(os.listdir(target)) - contents):
            raise RequestError(
                f"{target} holds {listed(others)}, which would be lost, and only a directory that this program wrote "
                "is replaced; choose another name"
            )
    elif contents is not None or not target.is_file():
        found = "a file" if target.is_file() else "no regular file"
        raise RequestError(f"{target} is {found}, and {wanted} is to be written there; choose another name")


def require_apart(target: Path, source: Path) -> None:
    """Refuses a target that is the source, lies within it, or holds it.

    Raises:
        RequestError: writing the target would change the source.
    """
    place = Path(os.path.realpath(target))
    # the file itself, and the link by which it is named
    for taken in (Path(os.path.realpath(source)), Path(os.path.realpath(source.parent)) / source.name):
        same = place == taken or (place.exists() and taken.exists() and place.samefile(taken))
        if same or taken in place.parents or place in taken.parents:
            relation = "is the source itself" if same else f"and the source {source} lie within one another"
            raise RequestError(f"{target} {relation}; choose another name")
