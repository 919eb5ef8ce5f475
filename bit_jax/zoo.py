"""Every published BiT file, and how it comes here: found in the cache, or fetched, resumed, verified and kept.

python -m bit_jax.zoo list [TEXT]    the files whose name contains TEXT
python -m bit_jax.zoo fetch NAME     into the cache; prints the path
"""

import contextlib
import os
import sys
from typing import Annotated

import tyro

from bit_jax.published.catalogue import CATALOGUE
from bit_jax.published.fetch import cache_dir
from bit_jax.published.locate import weight_file
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.terminal import printable


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"list": list_files, "fetch": fetch_file}, description=__doc__)


def list_files(text: Annotated[str, tyro.conf.Positional] = "") -> None:
    """Lists the published files.

    Args:
        text: part of a name; only files whose name contains it are listed. Empty: all of them.
    """
    cache = None
    with contextlib.suppress(RequestError):  # without one, nothing is in it
        cache = cache_dir()
    for file in CATALOGUE.values():
        if text in file.name:
            kept = "  (in the cache)" if cache is not None and os.path.exists(cache / file.path) else ""
            size = f"{file.architecture:7} {file.num_classes:>6} classes"
            print(f"{file.name:44} {size}  {file.url}{kept}")


def fetch_file(name: Annotated[str, tyro.conf.Positional]) -> None:
    """Fetches a published file into the cache and prints where it is.

    Args:
        name: the published name, as `list` shows it.
    """
    print(printable(weight_file(name)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
