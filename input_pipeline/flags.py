"""Types of command-line flags that all commands share."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tyro

from input_pipeline.errors import RequestError
from input_pipeline.files import Url, is_stream, place, user_path

UserPath = Annotated[
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda texts: user_path(texts[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]
"""A path as a person types it: `~` is the home directory, and a URL is refused; see `files.user_path`."""

Place = Annotated[
    Path | Url,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH|URL",
        instance_from_str=lambda texts: place(texts[0]),
        is_instance=lambda value: isinstance(value, Path | Url),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A directory as a person types it: a path, or the URL of one in an object store; see `files.place`."""

Switch = Annotated[
    bool,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=0,
        metavar="",
        instance_from_str=lambda _: True,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda _: [],
    ),
]
"""A flag that is given without a value and is False otherwise, in commands whose other flags take True or False."""


def require_positive(flags: Mapping[str, float | None]) -> None:
    """Refuses a number that has to be greater than 0; None is a flag that was not given.

    Args:
        flags: {the flag as it is typed, such as "--rows": its value}.

    Raises:
        RequestError: a value is 0 or less; the message names the flag.
    """
    for flag, value in flags.items():
        if value is not None and value <= 0:
            raise RequestError(f"{flag} {value} must be greater than 0")


def require_distinct(outputs: Mapping[str, Path | None]) -> None:
    """Refuses a file that several outputs would be written to; None is a flag that was not given.

    What is no file, such as /dev/null, may receive several.

    Args:
        outputs: {the flag as it is typed, such as "--json": its path}.

    Raises:
        RequestError: two flags name the same file.
    """
    named: dict[str, str] = {}
    for flag, path in outputs.items():
        if path is None or is_stream(path):
            continue
        other = named.setdefault(os.path.realpath(path), flag)
        if other != flag:
            raise RequestError(f"{other} and {flag} both name {path}, and only one can be kept there; give two paths")


def typed(described: object, *names: str) -> dict[str, float | None]:
    """Returns {the flag as it is typed: its value} of some attributes of a dataclass of flags."""
    return {f"--{name.replace('_', '-')}": getattr(described, name) for name in names}
