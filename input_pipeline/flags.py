"""Types of command-line flags that all commands share."""

from pathlib import Path
from typing import Annotated

import tyro

from input_pipeline.files import user_path

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
