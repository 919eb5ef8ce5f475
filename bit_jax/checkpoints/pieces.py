"""The pieces of a state that a host's devices hold: each part of an array once, wherever it lies, and their copies."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOM_TO_SPARE = 1.1  # a device-side copy is made where this times its bytes was free at the fullest moment so far


@dataclasses.dataclass(frozen=True, order=True)
class Tile:
    """A part of an array: `start` and `shape` by axis; both are () for an array without axes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, index: Sequence[slice], whole: Sequence[int]) -> "Tile":
        """Returns the tile that an index of slices takes of an array of the shape `whole`."""
        ranges = [part.indices(size) for part, size in zip(index, whole, strict=True)]
        return cls(tuple(start for start, _, _ in ranges), tuple(stop - start for start, stop, _ in ranges))

    @property
    def index(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.shape, strict=True))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def touches(self, other: "Tile") -> bool:
        """Whether the two have an element in common."""
        return all(
            first < second + length and second < first + size
            for first, size, second, length in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tile of the array `key`, of the shape `whole`, as a single-device array or NumPy's."""

    key: str
    whole: tuple[int, ...]
    tile: Tile
    array: Any


def keyed(state: Any) -> dict[str, Any]:
    """Returns {path of a leaf, such as "params/head/conv2d/bias": the leaf}, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def host_of(device: Any) -> int:
    """Returns the index of the device's host."""
    return device.process_index


def pieces_here(state: Any, host: int) -> list[Piece]:
    """Returns every distinct piece of the state's arrays that this host's devices hold.

    Where several devices hold the same piece, they take turns, so that each of them gives a part of the state.
    """
    pieces = []
    for number, (key, leaf) in enumerate(keyed(state).items()):
        holders: dict[Tile, list[jax.Array]] = {}
        for shard in (shard for shard in leaf.addressable_shards if host_of(shard.device) == host):
            holders.setdefault(Tile.of(shard.index, leaf.shape), []).append(shard.data)
        pieces += [Piece(key, leaf.shape, tile, arrays[number % len(arrays)]) for tile, arrays in holders.items()]
    return pieces


def pieces_to_write(state: Any, host: int) -> list[Piece]:
    """Returns the pieces that a host writes where all hosts write to the same place: each piece of the state is
    written by one of the hosts that hold it, by the one that has least to write so far."""
    bytes_of: dict[int, int] = {}
    own: set[tuple[str, Tile]] = set()
    for key, leaf in keyed(state).items():
        holders: dict[Tile, list[int]] = {}
        for holder, tiles in sorted(tiles_by_host(leaf).items()):
            for tile in sorted(tiles):
                holders.setdefault(tile, []).append(holder)
        for tile, hosts in holders.items():
            writer = min(hosts, key=lambda one: (bytes_of.get(one, 0), one))
            bytes_of[writer] = bytes_of.get(writer, 0) + tile.size * np.dtype(leaf.dtype).itemsize
            if writer == host:
                own.add((key, tile))
    return [piece for piece in pieces_here(state, host) if (piece.key, piece.tile) in own]


def tiles_by_host(leaf: Any) -> dict[int, set[Tile]]:
    """Returns {host: the tiles that its devices hold} of an array, or of a shape with a sharding."""
    tiles: dict[int, set[Tile]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        tiles.setdefault(host_of(device), set()).add(Tile.of(index, leaf.shape))
    return tiles


def bytes_here(state: Any) -> int:
    """Returns the bytes of `pieces_here`, from arrays or from shapes with shardings."""
    here = jax.process_index()
    return sum(
        tile.size * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(state)
        for tile in tiles_by_host(leaf)[here]
    )


@jax.jit
def _copies(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]


class Copier:
    """Copies pieces, so that the arrays may be donated to the next training step.

    The copies are made on the devices, behind the step that is under way and without waiting for it. A device that has
    no room for its share beside the training step gives it to the host instead, which this then waits for. That is
    settled once, because later the fullest moment of a device includes a copy.
    """

    def __init__(self):
        self._room: dict[Any, bool] = {}

    def __call__(self, pieces: Iterable[Piece]) -> list[Piece]:
        by_device: dict[Any, list[Piece]] = {}
        for piece in pieces:
            by_device.setdefault(piece.array.device, []).append(piece)
        done = []
        for device, own in by_device.items():
            arrays = [piece.array for piece in own]
            copies = _copies(arrays) if self._has_room(device, arrays) else _on_host(arrays)
            done += [dataclasses.replace(piece, array=copy) for piece, copy in zip(own, copies, strict=True)]
        return done

    def _has_room(self, device: Any, arrays: list[jax.Array]) -> bool:
        if device not in self._room:
            jax.block_until_ready(arrays)  # a step has been taken now, and has shown what it needs
            self._room[device] = has_room(device.memory_stats(), sum(array.nbytes for array in arrays))
        return self._room[device]


def has_room(memory: dict[str, int] | None, wanted: int) -> bool:
    """Whether a device with these statistics, None for a CPU, has room for so many bytes beside the training step."""
    if memory is None:
        return True
    return memory.get("bytes_limit", 0) - memory.get("peak_bytes_in_use", 0) >= ROOM_TO_SPARE * wanted


def _on_host(arrays: list[jax.Array]) -> list[np.ndarray]:
    for array in arrays:
        array.copy_to_host_async()
    return [np.array(array) for array in arrays]  # a copy: a CPU's array would be seen through, and is about to change
