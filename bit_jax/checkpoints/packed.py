"""Pieces of a state in one file, one after the other, with a list of where each of them lies and of its digest."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bit_jax.checkpoints.pieces import Piece, Tile

STEP = "step"  # key of the state's number of steps


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a state comes from: the step after which it was, and the start of the run that computed it, by a text that
    the hosts of this start share. Pieces of two starts are never put together: on other devices the same step may have
    been rounded otherwise."""

    step: int
    attempt: str

    def digest(self, key: str, tile: Tile, data: np.ndarray) -> str:
        """Returns the SHA-256 of a piece and of all that says where it belongs."""
        place = json.dumps([self.step, self.attempt, key, tile.start, tile.shape, str(data.dtype)])
        digest = hashlib.sha256(place.encode())
        digest.update(octets(data))
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tile of the array `key` in a file, from the byte `offset` on, and its digest."""

    key: str
    tile: Tile
    offset: int
    digest: str


def octets(data: np.ndarray) -> memoryview:
    """Returns the array's bytes, in the order of its elements."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data


def write(
    path: Path, pieces: list[Piece], origin: Origin, progress: Callable[[], object] = lambda: None
) -> dict[str, Any] | None:
    """Writes the bytes of the pieces to a file, and empties the list. Returns what `listed` reads, as JSON's types;
    None if the pieces are not of the origin's step.

    Args:
        progress: function that is called after each piece.

    Raises:
        OSError: the file cannot be written.
    """
    arrays, written = {}, []
    with open(path, "wb") as file:
        while pieces:
            piece = pieces.pop()  # its memory is free as soon as it is written
            data = np.asarray(piece.array)
            if piece.key == STEP and int(data) != origin.step:
                return None
            digest = origin.digest(piece.key, piece.tile, data)
            written.append((piece.key, *dataclasses.astuple(piece.tile), file.tell(), digest))
            arrays.setdefault(piece.key, (piece.whole, data.dtype.name))
            file.write(octets(data))
            progress()
    return {"arrays": arrays, "pieces": written}


def shapes_in(content: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns {key: (shape, dtype's name)} of the arrays that the pieces are parts of.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is not what `write` has returned.
    """
    return {key: (tuple(shape), dtype) for key, (shape, dtype) in content["arrays"].items()}


def listed(content: Mapping[str, Any]) -> list[Packed]:
    """Returns what lies in a file.

    Raises:
        LookupError, TypeError, ValueError: it is not what `write` has returned.
    """
    return [
        Packed(key, Tile(tuple(start), tuple(shape)), offset, digest)
        for key, start, shape, offset, digest in content["pieces"]
    ]


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Returns {key: (shape, dtype's name)} of arrays, or of their shapes and dtypes."""
    return {key: (tuple(leaf.shape), np.dtype(leaf.dtype).name) for key, leaf in arrays.items()}
