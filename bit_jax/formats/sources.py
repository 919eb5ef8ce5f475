"""Opens whatever holds a BiT's weights, by its content, and shows its arrays under their official keys.

| content | names | read by |
|---|---|---|
| `.npz` | the official ones | `official` |
| safetensors | the original code's, timm's, Hugging Face's | `safetensors` |
| what `torch.save` writes, in either of its formats | the same | `pickles`, with PyTorch |
| a directory with one of the two, or its parts and their index | the same | the same |
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np

from bit_jax.formats import comment, names, official, pickles, recognize, safetensors
from bit_jax.formats.official import WeightsError, listed
from input_pipeline.files import read_json

EPS = comment.KEY  # of safetensors' metadata, where this project wrote them
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
REMEDY = "get the directory again"

Shape = tuple[int, ...]
HASHED = (".safetensors", ".bin", ".pth", ".tar", ".json")  # of the files in a directory of weights
Arrays = Iterator[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Source:
    """Arrays somewhere; only their names and shapes have been read.

    Attributes:
        shapes: {official key: shape in the official layout}; a name that is no array's of BiT is a key itself.
        arrays: function (keys) -> (key, array) of each, in the order in which they are stored.
        standardize_eps: what the weights' model adds to a kernel's variance: what the file says, else what such files
            are computed with.
    """

    shapes: dict[str, Shape]
    arrays: Callable[[Collection[str]], Arrays]
    standardize_eps: float


def open_source(path: Path) -> Source:
    """Returns the arrays of a file or directory; see the table above.

    Raises:
        WeightsError: it is missing, damaged, or something else.
        RequestError: it cannot be read for another reason, or PyTorch is needed and not installed.
    """
    try:
        container = recognize.container(path)
        if container == "npz":
            return _official(path)
        if container == "directory":
            return _directory(path)
        return _foreign(path, [path])
    except FileNotFoundError:
        raise WeightsError(
            f"weight file {path} does not exist; `python -m bit_jax.zoo list` names those that can be fetched"
        ) from None
    except OSError as error:
        raise official.cannot_read(path, error) from None


def digest(path: Path) -> str:
    """Returns SHA-256 of a weight file, in hex; of a directory, over the names and contents of the files in it that may
    belong to weights."""
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.iterdir() if file.suffix in HASHED and file.is_file())
    listing = "".join(f"{digest(file)} {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _official(path: Path) -> Source:
    members = official.read_members(path)

    def arrays(keys: Collection[str]) -> Arrays:
        return official.read_arrays(path, {key: member for key, member in members.items() if key in keys})

    return Source({key: member.shape for key, member in members.items()}, arrays, comment.read(path))


def _directory(path: Path) -> Source:
    index = next((path / name for name in INDEXES if (path / name).exists()), None)
    if index is None:
        whole = [path / name for name in WHOLE if (path / name).exists()]
        if not whole:
            raise WeightsError(f"the weights in {path} are a symbolic link to nothing; {REMEDY}")
        return _foreign(path, whole[:1])
    where = read_json(index, dict, REMEDY).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise WeightsError(f"{index} is damaged (it has no weight_map of file names); {REMEDY}")
    files = sorted(set(where.values()))
    if strange := [name for name in files if name != os.path.basename(name) or not (path / name).is_file()]:
        raise WeightsError(f"{index} names files that are not in {path}: {listed(strange)}; {REMEDY}")
    return _foreign(path, [path / name for name in files])


@dataclasses.dataclass(frozen=True)
class _Part:
    """A file of tensors: {name: shape}, how the arrays of some are read, and what the file says of itself."""

    shapes: dict[str, Shape]
    arrays: Callable[[Collection[str]], Arrays]
    metadata: dict[str, str]


def _part(path: Path) -> _Part:
    container = recognize.container(path)
    if container not in ("safetensors", "pickle"):
        other = recognize.recognize(path) or f"is an .npz, which is named by itself, or damaged; {REMEDY}"
        raise WeightsError(f"{path} {other}")
    if container == "safetensors":
        entries, metadata = safetensors.read_header(path)

        def stored(wanted: Collection[str]) -> Arrays:
            return safetensors.read_arrays(path, {name: entries[name] for name in entries if name in wanted})

        return _Part({name: entry.shape for name, entry in entries.items()}, stored, metadata)
    tensors = pickles.read(path)

    def pickled(wanted: Collection[str]) -> Arrays:
        return pickles.arrays({name: tensors[name] for name in tensors if name in wanted})

    return _Part({name: tuple(tensor.shape) for name, tensor in tensors.items()}, pickled, {})


def _foreign(path: Path, files: list[Path]) -> Source:
    """Returns what files of one model hold, under official keys.

    Args:
        path: the name for messages.
        files: the model's files; no array is in two of them.
    """
    parts = [_part(file) for file in files]
    everywhere = [name for part in parts for name in part.shapes]
    if twice := {name for name in everywhere if everywhere.count(name) > 1} if len(parts) > 1 else set():
        raise WeightsError(f"{path} has several arrays of one name: {listed(sorted(twice))}; {REMEDY}")
    plain = names.unwrapped_names(everywhere)
    found = names.peer_of(plain.values())
    if found is None:
        raise WeightsError(
            f"{path} is no BiT in the names of the original code, timm or Hugging Face: none of its "
            f"{len(everywhere)} arrays ({listed(everywhere)}) is",
            extra=everywhere,
        )
    peer, paired = found
    keys = {name: paired.get(short, short) for name, short in plain.items()}
    if len(set(keys.values())) != len(keys):
        raise WeightsError(f"{path} has several arrays for one place: {listed(sorted(keys))}", extra=keys)
    shapes = {keys[name]: names.shape_here(keys[name], shape) for part in parts for name, shape in part.shapes.items()}

    def arrays(wanted: Collection[str]) -> Arrays:
        not_finite = []
        for part in parts:
            for name, array in part.arrays({name for name in part.shapes if keys[name] in wanted}):
                if not official.fits_float32(array):
                    not_finite.append(name)
                yield keys[name], names.array_here(keys[name], array)
        if not_finite:
            raise WeightsError(f"{path} holds {official.NOT_FINITE} in {listed(not_finite)}; {official.AGAIN}")

    # of the metadata alone: a config.json keeps what it does not know when other weights are saved beside it
    said = next((part.metadata[EPS] for part in parts if EPS in part.metadata), None)
    return Source(shapes, arrays, peer.standardize_eps if said is None else _eps(said, path))


def _eps(said: str, path: Path) -> float:
    """Returns the number that the metadata's text says."""
    try:
        eps = float(said)
    except ValueError:
        eps = None
    if not comment.is_eps(eps):
        raise WeightsError(f"{path} says that {EPS} is {repr(said)[:60]}, not a number between 0 and 1; mend that")
    assert eps is not None
    return eps
