"""A checkpoint in an object store: which objects it is, and how they are read.

    checkpoints/500.1a2b3c4d/pieces.0        the bytes of the pieces that host 0 wrote
    checkpoints/500.1a2b3c4d/index.0.json    where each of them lies, and its digest
    checkpoints/500.1a2b3c4d/manifest.json   the digests of the indexes; present means "complete"

A store cannot rename a folder, so a name that is used again could mix two starts' objects: the text behind the step is
another one at every start.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bit_jax.checkpoints import packed
from bit_jax.checkpoints.errors import CheckpointError
from bit_jax.checkpoints.packed import Origin, Packed
from bit_jax.stores.store import Store

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
DAMAGED = "damaged.txt"  # beside a manifest: this checkpoint is not used; the text says why
BATCH = 2**26  # bytes that are read at a time


@dataclasses.dataclass(frozen=True, order=True)
class Checkpoint:
    """The folder of a checkpoint, by its step and the start that wrote it."""

    step: int
    attempt: str

    @property
    def folder(self) -> str:
        return f"{FOLDER}/{self.step}.{self.attempt}"

    @property
    def origin(self) -> Origin:
        return Origin(self.step, self.attempt)

    def pieces(self, host: int) -> str:
        return f"{self.folder}/pieces.{host}"

    def index(self, host: int) -> str:
        return f"{self.folder}/index.{host}.json"

    @classmethod
    def all(cls, keys: Iterator[str] | Sequence[str]) -> dict["Checkpoint", set[str]]:
        """Returns the checkpoints that objects belong to, whole or not, and the names of their objects."""
        found: dict[Checkpoint, set[str]] = {}
        for key in keys:
            if match := re.fullmatch(rf"{FOLDER}/(\d+)\.([0-9a-f]+)/(.+)", key):
                found.setdefault(cls(int(match[1]), match[2]), set()).add(match[3])
        return found

    @classmethod
    def usable(cls, keys: Iterator[str] | Sequence[str]) -> list["Checkpoint"]:
        """Returns the checkpoints that are complete and not known to be damaged, the newest first."""
        names = cls.all(keys)
        return sorted((one for one, own in names.items() if MANIFEST in own and DAMAGED not in own), reverse=True)


class Damage(Exception):
    """What was read is not what was written; the message says which part."""


@dataclasses.dataclass(frozen=True)
class Content:
    """What a complete checkpoint holds, by its manifest and indexes.

    Attributes:
        checkpoint: the checkpoint.
        shapes: {key of an array: (shape, dtype's name)}.
        parts: {key: [(host that wrote the piece, the piece)]}.
    """

    checkpoint: Checkpoint
    shapes: dict[str, tuple[tuple[int, ...], str]]
    parts: dict[str, list[tuple[int, Packed]]]

    @classmethod
    def of(cls, store: Store, checkpoint: Checkpoint, sizes: dict[str, int]) -> "Content":
        """Reads the manifest and the indexes.

        Args:
            sizes: {key: bytes} of the objects in the checkpoint's folder.

        Raises:
            Damage: they are not as written, or an object is missing or too small.
            StoreError: the store does not answer.
        """
        shapes, parts = {}, {}
        try:
            digests = json.loads(read_object(store, f"{checkpoint.folder}/{MANIFEST}"))["sha256"]
            for host in range(len(digests)):
                text = read_object(store, checkpoint.index(host))
                if hashlib.sha256(text).hexdigest() != digests[f"index.{host}.json"]:
                    raise Damage(f"index.{host}.json is not as written")
                index = json.loads(text)
                shapes |= packed.shapes_in(index)
                for one in packed.listed(index):
                    parts.setdefault(one.key, []).append((host, one))
            content = cls(checkpoint, shapes, parts)
            content._check(sizes)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Damage(f"its manifest or an index cannot be understood ({type(error).__name__})") from None
        return content

    def _check(self, sizes: dict[str, int]) -> None:
        """Raises Damage if the pieces are not those of the arrays, or do not lie in the objects; the other errors of
        `of` if something has another type."""
        if self.shapes.keys() != self.parts.keys():
            raise Damage("its indexes do not list the pieces of all arrays")
        for key, (shape, _) in self.shapes.items():
            if sum(one.tile.size for _, one in self.parts[key]) != math.prod(shape):
                raise Damage(f"parts of {key} are missing")
            for host, one in self.parts[key]:
                name, places = self.checkpoint.pieces(host), (one.tile.start, one.tile.shape, shape)
                if any(
                    min(start, size) < 0 or start + size > whole for start, size, whole in zip(*places, strict=True)
                ):
                    raise Damage(f"a part of {key} lies outside of it")
                if one.offset < 0 or sizes.get(name, 0) < one.offset + self.bytes_of(one):
                    raise Damage(f"{name} is missing or too small")

    def bytes_of(self, one: Packed) -> int:
        return one.tile.size * np.dtype(self.shapes[one.key][1]).itemsize

    def read(self, store: Store, wanted: Sequence[tuple[int, Packed]]) -> Iterator[tuple[Packed, np.ndarray]]:
        """Yields pieces, which are read in batches of about `BATCH` bytes.

        Raises:
            Damage: a piece is not as written.
        """
        batch: list[tuple[int, Packed]] = []
        for number, part in enumerate(wanted):
            batch.append(part)
            if sum(self.bytes_of(one) for _, one in batch) >= BATCH or number == len(wanted) - 1:
                spans = [
                    (self.checkpoint.pieces(host), one.offset, one.offset + self.bytes_of(one)) for host, one in batch
                ]
                for (host, one), octets in zip(batch, _read_parts(store, spans), strict=True):
                    if len(octets) != self.bytes_of(one):
                        raise Damage(f"{self.checkpoint.pieces(host)} is too small")
                    data = np.frombuffer(octets, np.dtype(self.shapes[one.key][1])).reshape(one.tile.shape)
                    if self.checkpoint.origin.digest(one.key, one.tile, data) != one.digest:
                        raise Damage(f"a part of {one.key} in {self.checkpoint.pieces(host)} is not as written")
                    yield one, data
                batch = []


def steps(store: Store) -> list[int]:
    """Returns the steps of the complete checkpoints, the newest first."""
    return [one.step for one in Checkpoint.usable(list(store.sizes(FOLDER)))]


def read(store: Store, step: int) -> dict[str, Any]:
    """Returns the state of a step as numpy arrays; see `shared.read`.

    Raises:
        CheckpointError: the checkpoint is damaged, cannot be read, or is not there.
    """
    sizes = store.sizes(FOLDER)
    checkpoint = next((one for one in Checkpoint.usable(list(sizes)) if one.step == step), None)
    if checkpoint is None:
        raise CheckpointError(f"{store.name} holds no checkpoint of step {step}; choose another step")
    try:
        content = Content.of(store, checkpoint, sizes)
        arrays = {key: np.empty(shape, np.dtype(dtype)) for key, (shape, dtype) in content.shapes.items()}
        for one, data in content.read(store, [part for parts in content.parts.values() for part in parts]):
            arrays[one.key][one.tile.index] = data
    except Damage as damage:
        raise CheckpointError(
            f"checkpoint {store.name}/{checkpoint.folder} is damaged: {damage}; choose another step"
        ) from None
    return _tree(arrays)


def _tree(arrays: dict[str, Any]) -> Any:
    """Returns the tree whose leaves have these paths: dicts, and lists where all of a node's names are numbers."""
    if "" in arrays:
        return arrays[""]
    branches: dict[str, dict[str, Any]] = {}
    for path, array in arrays.items():
        name, _, rest = path.partition("/")
        branches.setdefault(name, {})[rest] = array
    tree = {name: _tree(branch) for name, branch in branches.items()}
    return [tree[name] for name in sorted(tree, key=int)] if all(name.isdecimal() for name in tree) else tree


def read_object(store: Store, key: str) -> bytes:
    """Returns the bytes of an object that has to be there.

    Raises:
        Damage: there is none.
    """
    content = store.read(key)
    if content is None:
        raise Damage(f"{key} is missing")
    return content


def _read_parts(store: Store, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Returns parts of objects; an array without elements has none, which a store would not read."""
    some = [part for part in parts if part[1] < part[2]]
    read = iter(store.read_parts(some))
    return [next(read) if part[1] < part[2] else b"" for part in parts]
