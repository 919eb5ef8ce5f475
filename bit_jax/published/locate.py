"""Finds the file that a `--model` argument names."""

import difflib
import os
from pathlib import Path

from bit_jax.config import EMBEDDED
from bit_jax.published import hub
from bit_jax.published.catalogue import CATALOGUE, PublishedFile, lookup
from bit_jax.published.fetch import fetch
from input_pipeline.errors import RequestError
from input_pipeline.files import is_url, user_path

SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".tar")  # by which a path that does not exist is known
EMBEDDED_FILE = Path(__file__).parents[1] / "assets" / "fashion-mnist-R14x0.5" / "final.npz"


def weight_file(model: str) -> Path:
    """Returns the weights that `--model` names, a file or a directory; published ones, and those of the Hugging Face
    Hub (hf:OWNER/NAME), are fetched if need be.

    Raises:
        RequestError: see `resolve`.
        FetchError: it is not in the cache and cannot be fetched.
    """
    if model.startswith(hub.PREFIX):
        return hub.directory(model)
    place = resolve(model)
    return fetch(place) if isinstance(place, PublishedFile) else place


def resolve(model: str) -> PublishedFile | Path:
    """Finds out what `--model` names: `embedded`, a published name or address, or a path. Nothing is fetched.

    Raises:
        RequestError: there is no such name, and the nearest are listed, or it is the address of something else.
    """
    if model == EMBEDDED:
        return EMBEDDED_FILE
    if model.startswith(hub.PREFIX):
        return Path(model)  # the hub's library finds out whether there is such a model
    if published := lookup(model):
        return published
    if is_url(model):
        raise RequestError(
            f"{model} is the address of no published file; `python -m bit_jax.zoo list` names all {len(CATALOGUE)}, "
            "and other files are fetched first and named by their path"
        )
    path = user_path(model)
    if path.suffix in SUFFIXES or os.path.exists(path):
        return path
    nearest = difflib.get_close_matches(model, CATALOGUE, 3, cutoff=0.4)
    hint = f"near it: {', '.join(nearest)}; " if nearest else ""
    raise RequestError(
        f"unknown model {model!r}; {hint}`python -m bit_jax.zoo list` names all {len(CATALOGUE)}, "
        f"and a path must exist or end in {', '.join(SUFFIXES)}"
    )
