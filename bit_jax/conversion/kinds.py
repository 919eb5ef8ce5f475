"""The kinds of targets, in one table: how each is known, written, and held against its source."""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Set
from pathlib import Path

import numpy as np

from bit_jax.conversion import check, layouts
from bit_jax.conversion.check import Compared
from bit_jax.conversion.conversion import Conversion
from bit_jax.formats import comment, pickles, safetensors, weights
from bit_jax.formats.names import PEERS
from input_pipeline.errors import RequestError
from input_pipeline.files import write_json

AUTO = "auto"
OFFICIAL = "official"
CONFIG, WEIGHTS = "config.json", "model.safetensors"  # names in a directory


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of target.

    Attributes:
        title: its name for people.
        suffixes: of the target's name, by which it is known; none: a directory.
        namings: names of arrays that it may have (--format), the first where nothing else is asked for.
        write: function (conversion, path, naming): writes the target, of which nothing is there yet.
        contents: names in the target where it is a directory; None: it is a file.
        require: function (): raises RequestError where a package is missing that writing needs.
    """

    title: str
    suffixes: tuple[str, ...]
    namings: tuple[str, ...]
    write: Callable[[Conversion, Path, str], None]
    contents: Set[str] | None = None
    require: Callable[[], object] | None = None

    def naming(self, asked: str) -> str:
        """Returns the naming for --format.

        Raises:
            RequestError: this kind of target has no such names.
        """
        if asked != AUTO and asked not in self.namings:
            raise RequestError(f"--format {asked} is not written to {self.title}; choose {' or '.join(self.namings)}")
        return self.namings[0] if asked == AUTO else asked

    def check(self, conversion: Conversion, path: Path, naming: str) -> list[Compared]:
        """Returns what was compared of a target and its source: all arrays, and logits of the library that the names
        are of.

        A new head of zeros makes all logits 0. The library then gets a file that is written for the check, with
        random numbers in place of the zeros, in a folder on the same disk.
        """
        compared = check.read_back(conversion, path)
        if naming == OFFICIAL:
            return compared
        telling = dataclasses.replace(conversion, arrays=weights.with_telling_head(conversion.arrays))
        if telling.arrays is conversion.arrays:
            return compared + check.by_library(conversion, path, PEERS[naming])
        with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=f".{path.name}.") as folder:
            self.write(telling, Path(folder) / path.name, naming)
            by_library = check.by_library(telling, Path(folder) / path.name, PEERS[naming])
        return compared + [
            dataclasses.replace(entry, what=f"{entry.what}, {check.RANDOM_HEAD}") for entry in by_library
        ]


def kind_of(target: Path) -> Kind:
    """Returns the kind of a target by its name's suffix; without one it is a directory.

    Raises:
        RequestError: nothing is written under that suffix.
    """
    # the dot of R26x0.5 or resnetv2_50x1_bit.goog_in21k begins no suffix
    suffix = target.suffix if re.fullmatch(r"\.[A-Za-z][A-Za-z0-9]*", target.suffix) else ""
    for kind in KINDS:
        if suffix in kind.suffixes or not (suffix or kind.suffixes):
            return kind
    known = ", ".join(suffix for kind in KINDS for suffix in kind.suffixes)
    raise RequestError(
        f"{target} has suffix {suffix}, and what is written ends in {known}, .stablehlo, .onnx, .savedmodel, or in "
        "none (a directory)"
    )


def _state(conversion: Conversion, naming: str) -> dict[str, np.ndarray]:
    peer = PEERS[naming]
    return {peer.name(key): peer.array(key, array) for key, array in conversion.arrays.items()}


def _write_official(conversion: Conversion, path: Path, naming: str) -> None:
    params = weights.unflatten(dict(conversion.arrays))
    weights.save(path, params, standardize_eps=conversion.architecture.standardize_eps)


def _write_safetensors(conversion: Conversion, path: Path, naming: str) -> None:
    said = {"format": "pt", comment.KEY: repr(float(conversion.architecture.standardize_eps))}
    with open(path, "wb") as file:
        safetensors.write(file, _state(conversion, naming), said)


def _write_pickle(conversion: Conversion, path: Path, naming: str) -> None:
    with open(path, "wb") as file:
        pickles.write(file, _state(conversion, naming))


def _write_directory(conversion: Conversion, path: Path, naming: str) -> None:
    config = layouts.timm(conversion) if naming == "timm" else layouts.hugging_face(conversion)
    path.mkdir()
    _write_safetensors(conversion, path / WEIGHTS, naming)
    write_json(path / CONFIG, config)


KINDS = (
    Kind("an official .npz", (".npz",), (OFFICIAL,), _write_official),
    Kind("safetensors", (".safetensors",), ("timm", "original", "huggingface"), _write_safetensors),
    Kind(
        "a PyTorch file",
        (".pth", ".pt", ".bin", ".tar"),
        ("original", "timm", "huggingface"),
        _write_pickle,
        require=pickles.require,
    ),
    Kind("a directory", (), ("huggingface", "timm"), _write_directory, frozenset({CONFIG, WEIGHTS})),
)
