"""Holds a target that was just written against its source, in float64."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Float

from bit_jax.conversion import layouts, libraries
from bit_jax.conversion.conversion import Conversion, images
from bit_jax.formats.names import Peer
from bit_jax.formats.weights import with_telling_head
from bit_jax.model.architecture import Architecture
from input_pipeline.errors import RunFailed

# of a float64 difference, as a share of the largest logit: rounding makes some 1e-14, a wrong constant 1e-7
LIMIT = 1e-9
RANDOM_HEAD = "with random numbers in place of the head's zeros"
PACKAGES = {"timm": "timm", "huggingface": "transformers"}  # the library of each peer that has one


@dataclasses.dataclass(frozen=True)
class Compared:
    """One comparison of a target with its source.

    Attributes:
        what: what was compared, as a clause.
        difference: the largest difference, of a float64 logit or in an array; None where nothing could be computed.
        limit: above it the conversion has failed; None: the difference is only told.
    """

    what: str
    difference: float | None
    limit: float | None = None

    @property
    def failed(self) -> bool:
        return self.limit is not None and not (self.difference is not None and self.difference <= self.limit)

    def __str__(self) -> str:
        return self.what if self.difference is None else f"{self.what}: largest difference {self.difference:.2g}"


def require(compared: list[Compared]) -> None:
    """Raises RunFailed if a comparison has failed."""
    if wrong := [entry for entry in compared if entry.failed]:
        raise RunFailed(f"the target does not compute what its source does ({'; '.join(map(str, wrong))})")


def read_back(conversion: Conversion, target: Path) -> list[Compared]:
    """Reads the target with this project's reader, and compares every array, which has to be the same.

    Returns:
        What was compared; where the target has no place for the constant that the weights were trained with, how much
        the logits change by the one that it is read with.

    Raises:
        RunFailed: the target is another architecture.
    """
    again = Conversion.of(target)
    read, trained = again.architecture.standardize_eps, conversion.architecture.standardize_eps
    same = dataclasses.replace(again.architecture, standardize_eps=trained) == conversion.architecture
    if not same or again.arrays.keys() != conversion.arrays.keys():
        raise RunFailed(f"the target reads as {again.architecture}, and its source is {conversion.architecture}")
    differences = [_apart(again.arrays[key], array) for key, array in conversion.arrays.items()]
    compared = [Compared("read back, every array", max(differences), 0.0)]
    if read != trained:
        telling = dataclasses.replace(conversion, arrays=with_telling_head(conversion.arrays))
        apart = float(np.abs(telling.logits(read) - telling.logits()).max())
        told = f"read back with {read:g} added to the variance of kernels, not {trained:g}"
        remedy = f"give --standardize-eps {trained:g}, or standardize_eps={trained:g} to `load`"
        compared.append(Compared(f"{told}: {remedy}", apart))
    return compared


def _apart(left: np.ndarray, right: np.ndarray) -> float:
    """Returns the largest difference of two arrays; infinite where their shapes or dtypes differ."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return math.inf
    return 0.0 if np.array_equal(left, right) else float(np.abs(left.astype(np.float64) - right).max())


def by_library(conversion: Conversion, target: Path, peer: Peer) -> list[Compared]:
    """Has the target loaded and run by the peer's library, in a process that cannot import this project.

    Returns:
        What was compared: with this project's model at the library's constant, and, where that is not the weights',
        how far the library is from the source.

    Raises:
        RunFailed: the library does not load the target.
    """
    package = PACKAGES.get(peer.key)
    if package is None:
        return []
    missing = [name for name in (package, "torch") if importlib.util.find_spec(name) is None]
    if missing:
        return [Compared(f"not compared with {peer.title}'s own model: {' and '.join(missing)} not installed", None)]
    theirs = library_logits(conversion.architecture, target, peer, images())
    if isinstance(theirs, str):
        return [Compared(f"not compared with {peer.title}'s own model: {theirs}", None)]
    ours = conversion.logits(peer.standardize_eps)
    scale = max(1.0, float(np.abs(ours).max()))
    own = f"loaded by {package}, float64 logits"
    result = [Compared(own, float(np.abs(theirs - ours).max()), LIMIT * scale)]
    trained = conversion.architecture.standardize_eps
    if trained != peer.standardize_eps:
        result[0] = dataclasses.replace(result[0], what=f"{own} with its {peer.standardize_eps:g} in both models")
        apart = float(np.abs(theirs - conversion.logits()).max())
        told = f"{package} adds {peer.standardize_eps:g} to the variance of kernels, and the source {trained:g}"
        result.append(Compared(told, apart))
    return result


def library_logits(
    architecture: Architecture, target: Path, peer: Peer, images: Float[np.ndarray, "batch height width 3"]
) -> Float[np.ndarray, "batch classes"] | str:
    """Returns the float64 logits of the peer's library, or a clause that says why it cannot be imported.

    Args:
        target: the weights as that library loads them.
        images: float64 images in [-1, 1].

    Raises:
        RunFailed: the library does not load the target.
    """
    with tempfile.TemporaryDirectory(prefix="bit_jax_convert_") as name:
        folder = Path(name)
        np.save(folder / "images.npy", images)
        question = {
            "target": str(target.absolute()),
            "directory": target.is_dir(),
            "images": str(folder / "images.npy"),
            "sizes": layouts.sizes(architecture),
            "num_classes": architecture.num_classes,
        }
        (folder / "question.json").write_text(json.dumps(question))
        command = [sys.executable, "-P", "-S", libraries.__file__, peer.key]
        done = subprocess.run(
            [*command, str(folder / "question.json"), str(folder / "answer.npy")],
            env=isolated(),
            cwd=folder,
            capture_output=True,
            text=True,
        )
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        if done.returncode == libraries.MISSING:
            return last
        if done.returncode:
            raise RunFailed(f"{PACKAGES[peer.key]} does not load the target: {last}")
        return np.load(folder / "answer.npy")


def isolated() -> dict[str, str]:
    """Returns an environment in which Python finds the installed packages, and no project that is installed in place;
    nothing is fetched there."""
    places = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(places)}
