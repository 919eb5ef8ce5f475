"""What the original PyTorch code, timm and Hugging Face call BiT's arrays: one table, read in both directions.

It imports no framework, because a comparison's PyTorch side asks for it too. Every peer has kernels as out, in, height,
width, and gives each parameter the same values as the official file; only names and axes differ.
"""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np

from bit_jax.formats.states import unwrapped
from bit_jax.model.architecture import HEAD_BIAS, HEAD_KERNEL, PREFIX, ROOT_KERNEL, STANDARDIZE_EPS, STANDARDIZED

PARTS = {"a": 1, "b": 2, "c": 3}  # a unit's layers, in the official file's letters and in the peers' numbers
KERNEL, SCALE, SHIFT = "kernel", "gamma", "beta"  # the last part of an official key


@dataclasses.dataclass(frozen=True)
class Peer:
    """Names of one library, and what its model computes.

    Attributes:
        key: its name on the command line.
        title: its name for people.
        root, norm, head: names of the root convolution, of the last norm and of the head, without what follows.
        unit: beginning of the names within a unit, with {stage} and {unit}.
        first: number of the first stage and of the first unit.
        gn: name of a unit's norms, before their number.
        projection: name of a unit's shortcut convolution.
        dense: whether the head's kernel has two axes, [classes, channels], as a dense layer has.
        standardize_eps: what the library's model adds to a kernel's variance.
    """

    key: str
    title: str
    root: str
    norm: str
    head: str
    unit: str
    first: int
    gn: str
    projection: str
    dense: bool
    standardize_eps: float

    def name(self, official: str) -> str:
        """Returns the peer's name of an official key."""
        if official == ROOT_KERNEL:
            return f"{self.root}.weight"
        *path, last = official.removeprefix(PREFIX).split("/")
        weight = "bias" if last in (SHIFT, "bias") else "weight"
        if path[0] == "group_norm":
            return f"{self.norm}.{weight}"
        if path[0] == "head":
            return f"{self.head}.{weight}"
        stage, unit = int(path[0].removeprefix("block")), int(path[1].removeprefix("unit"))
        within = self.unit.format(stage=stage - 1 + self.first, unit=unit - 1 + self.first)
        if path[3] == "proj":
            return f"{within}.{self.projection}.weight"
        layer = "conv" if path[3] == STANDARDIZED else self.gn
        return f"{within}.{layer}{PARTS[path[2]]}.{weight}"

    def official(self, name: str) -> str | None:
        """Returns the official key of a peer's name, None of any other name."""
        for key in (ROOT_KERNEL, f"{PREFIX}group_norm/gamma", f"{PREFIX}group_norm/beta", HEAD_KERNEL, HEAD_BIAS):
            if name == self.name(key):
                return key
        pattern = re.escape(self.unit).replace(r"\{stage\}", r"(\d)").replace(r"\{unit:02d\}", r"(\d{2,9})")
        pattern = pattern.replace(r"\{unit\}", r"(0|[1-9]\d{0,8})")
        match = re.fullmatch(rf"{pattern}\.(.+)\.(weight|bias)", name)
        if match is None:
            return None
        unit = f"{PREFIX}block{int(match[1]) + 1 - self.first}/unit{int(match[2]) + 1 - self.first:02d}"
        candidates = [f"{unit}/a/proj/{STANDARDIZED}/{KERNEL}"]
        for part in PARTS:
            candidates += [f"{unit}/{part}/{STANDARDIZED}/{KERNEL}"]
            candidates += [f"{unit}/{part}/group_norm/{last}" for last in (SCALE, SHIFT)]
        return next((key for key in candidates if self.name(key) == name), None)

    def array(self, official: str, array: np.ndarray) -> np.ndarray:
        """Returns an official array as the peer has it: kernels as out, in, height, width."""
        if array.ndim == 4:
            array = np.ascontiguousarray(array.transpose(3, 2, 0, 1))
        return array.reshape(array.shape[:2]) if self.dense and official == HEAD_KERNEL else array


ORIGINAL = Peer(
    key="original",
    title="the original PyTorch code",
    root="root.conv",
    norm="head.gn",
    head="head.conv",
    unit="body.block{stage}.unit{unit:02d}",
    first=1,
    gn="gn",
    projection="downsample",
    dense=False,
    standardize_eps=STANDARDIZE_EPS,
)
TIMM = Peer(
    key="timm",
    title="timm",
    root="stem.conv",
    norm="norm",
    head="head.fc",
    unit="stages.{stage}.blocks.{unit}",
    first=0,
    gn="norm",
    projection="downsample.conv",
    dense=False,
    standardize_eps=1e-8,
)
# Hugging Face's model was made from timm's: the names within a unit and the constant are the same
HUGGING_FACE = dataclasses.replace(
    TIMM,
    key="huggingface",
    title="Hugging Face",
    root="bit.embedder.convolution",
    norm="bit.norm",
    head="classifier.1",
    unit="bit.encoder.stages.{stage}.layers.{unit}",
    dense=True,
)
PEERS = {peer.key: peer for peer in (ORIGINAL, TIMM, HUGGING_FACE)}
HEADLESS = "embedder.convolution.weight"  # Hugging Face's model without a head has no `bit.` before its names
# the root convolution's names, by which a state dict of a BiT is known
ROOTS = {HEADLESS, *(peer.name(ROOT_KERNEL) for peer in PEERS.values())}


def complete(names: Iterable[str]) -> dict[str, str]:
    """Returns {name: name in a whole model}."""
    names = list(names)
    headless = HEADLESS in names
    return {name: f"bit.{name}" if headless else name for name in names}


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Returns {name: name in a model that nothing wraps}; see `states.unwrapped`."""
    return {full: short for short, full in unwrapped({name: name for name in names}, ROOTS).items()}


def peer_of(names: Iterable[str]) -> tuple[Peer, dict[str, str]] | None:
    """Returns the peer that most of the names are of, and {name: official key}; None where they are no peer's."""
    whole = complete(names)
    paired = {
        key: {name: official for name, full in whole.items() if (official := peer.official(full))}
        for key, peer in PEERS.items()
    }
    best = max(paired, key=lambda key: len(paired[key]))
    return (PEERS[best], paired[best]) if paired[best] else None


def shape_here(official: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the official shape of an array that a peer has in that shape; kernels become height, width, in, out."""
    if official == HEAD_KERNEL and len(shape) == 2:
        shape = (*shape, 1, 1)
    return (*shape[2:], shape[1], shape[0]) if len(shape) == 4 else shape


def array_here(official: str, array: np.ndarray) -> np.ndarray:
    """Returns a peer's array in the official layout."""
    if official == HEAD_KERNEL and array.ndim == 2:
        array = array[..., None, None]
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array
