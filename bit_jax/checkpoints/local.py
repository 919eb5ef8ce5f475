"""Frequent copies of the training state on each host's own disk or in its memory, behind the shared checkpoints."""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bit_jax.checkpoints import packed
from bit_jax.checkpoints.errors import CheckpointError
from bit_jax.checkpoints.pieces import Copier, Piece, Tile, keyed, pieces_here, tiles_by_host
from bit_jax.scale import hosts, sharding
from input_pipeline.errors import RequestError
from input_pipeline.files import read_json, write_json

MANIFEST = "manifest.json"  # what the other file holds, with digests; it is written last: present means "complete"
PIECES = "pieces"  # the bytes of all pieces, one after the other
LONG = 1.0  # seconds of waiting for a disk that are worth a sentence

log = logging.getLogger(__name__)


def kept() -> int:
    """Returns the number of whole copies that a host has while it writes another.

    Of several hosts one may still be writing a copy that another has finished; only the one before it is surely whole
    everywhere.
    """
    return 1 if jax.process_count() == 1 else 2


@dataclasses.dataclass(frozen=True, order=True)
class Copy:
    """A directory STEP.ATTEMPT.HOST, which holds the pieces that a host's devices had after that step.

    Attributes:
        step: the step after which it was made.
        attempt: text that the hosts of one start share. Pieces of two attempts are never put together: on other devices
            the same step may have been rounded otherwise.
        host: index of the host that wrote it.
        path: the directory.
    """

    step: int
    attempt: str
    host: int
    path: Path = dataclasses.field(compare=False)

    @classmethod
    def all(cls, folder: Path) -> list["Copy"]:
        """Returns the copies in a run's folder, half-written ones too, the oldest first."""
        names = (re.fullmatch(r"(\d+)\.([0-9a-f]+)\.(\d+)", path.name) for path in folder.glob("*"))
        return sorted(cls(int(name[1]), name[2], int(name[3]), folder / name[0]) for name in names if name)

    @property
    def complete(self) -> bool:
        return (self.path / MANIFEST).exists()

    @property
    def origin(self) -> packed.Origin:
        return packed.Origin(self.step, self.attempt)

    def remove(self) -> None:
        """Removes the copy. It is incomplete from the first moment on, and another process may be removing it too."""
        with contextlib.suppress(OSError):
            (self.path / MANIFEST).unlink()
        shutil.rmtree(self.path, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a piece lies on this host."""

    copy: Copy
    offset: int
    digest: str

    def read(self, key: str, tile: Tile, dtype: Any) -> np.ndarray | None:
        """Returns the piece, or None if it cannot be read or is not as it was written."""
        path, count = self.copy.path / PIECES, tile.size
        try:
            if not 0 <= self.offset <= path.stat().st_size - count * np.dtype(dtype).itemsize or count < 0:
                return None
            data = np.fromfile(path, dtype, count, offset=self.offset)
        except OSError:
            return None
        return data.reshape(tile.shape) if self.copy.origin.digest(key, tile, data) == self.digest else None


Places = dict[str, dict[Tile, Place]]  # by the key of an array, and by its part
Offers = list[dict[str, set[Tile]]]  # what each host has, undamaged


class LocalCopies:
    """The local copies of a run: each host writes what its own devices hold, and all of them together are the state.

    They lie in DIRECTORY/RUN, so that several runs may share a directory; nothing outside of that is read or deleted.
    Saving copies the state on the devices and returns; a thread writes it. A copy that cannot be written is dropped.

    Args:
        directory: the directory; of several hosts on one machine, the same one.
        run: text that only this run has.
        attempt: text that only this start of it has, the same on all hosts; hexadecimal.
        shared: function that returns the steps of the complete shared checkpoints; copies that are older than the
            newest of those are removed.
        progress: function that a thread calls after each piece that it writes.

    Raises:
        RequestError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        run: str,
        attempt: str,
        shared: Callable[[], Iterable[int]],
        progress: Callable[[], object] = lambda: None,
    ):
        self._folder, self._attempt, self._shared = directory.absolute() / run, attempt, shared
        self._progress = progress
        self._host = jax.process_index()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except OSError as error:
            raise RequestError(
                f"--local-checkpoints {directory} cannot be written ({error.strerror}); give a directory of this host "
                "that can be"
            ) from None
        self._copied = Copier()
        self._behind = concurrent.futures.ThreadPoolExecutor(1, "local copy")
        self._pending: concurrent.futures.Future | None = None
        self._trouble: str | None = None
        self._slow = False
        self._places: Places = {}
        self._offers: Offers = []

    # the start

    def newest(self, shapes: Any, after: int) -> int | None:
        """Returns the newest step after `after` of which the hosts together have a whole and undamaged copy, or None.
        All hosts have to make this call; copies of later steps are removed.

        Args:
            shapes: shapes and dtypes of the state's arrays.
        """
        mine: dict[tuple[int, str], list[Copy]] = {}
        for copy in Copy.all(self._folder):
            if copy.complete and copy.step > after:
                mine.setdefault((copy.step, copy.attempt), []).append(copy)
        everyone = hosts.exchange("local copies", json.dumps(sorted(mine)))
        candidates = {(step, attempt) for text in everyone for step, attempt in json.loads(text)}
        chosen = next((one for one in sorted(candidates, reverse=True) if self._is_whole(*one, mine, shapes)), None)
        for copy in Copy.all(self._folder):
            if copy.attempt != self._attempt and (not copy.complete or copy.step > (chosen[0] if chosen else after)):
                copy.remove()
        return chosen[0] if chosen else None

    def _is_whole(self, step: int, attempt: str, mine: dict[tuple[int, str], list[Copy]], shapes: Any) -> bool:
        """Whether the hosts together have all of the state after that step; if so, `restore` returns it."""
        arrays = keyed(shapes)
        self._places = {}
        for copy in mine.get((step, attempt), ()):
            self._verify(copy, arrays)
        numbers = {key: number for number, key in enumerate(arrays)}
        own = {numbers[key]: [dataclasses.astuple(tile) for tile in tiles] for key, tiles in self._places.items()}
        self._offers = [
            {
                key: {Tile(tuple(start), tuple(shape)) for start, shape in json.loads(text).get(str(number), ())}
                for key, number in numbers.items()
            }
            for text in hosts.exchange(f"local copy {step}.{attempt}", json.dumps(own))
        ]
        lacking = [
            key
            for key, leaf in arrays.items()
            # tiles of one attempt are of one mesh, so that two of them are equal or apart
            if sum(tile.size for tile in set().union(*(host[key] for host in self._offers))) != math.prod(leaf.shape)
        ]
        if lacking and hosts.is_first():
            what = f"{len(lacking)} of {len(arrays)} arrays, such as {lacking[0]}"
            log.warning("the local copies of step %d lack parts of %s; they are not used", step, what)
        return not lacking

    def _verify(self, copy: Copy, arrays: dict[str, Any]) -> None:
        """Enters the undamaged pieces of a copy in `_places`."""
        try:
            manifest = read_json(copy.path / MANIFEST, dict, "it is left out")
            if packed.shapes_in(manifest) != packed.shapes_of(arrays):
                return self._say(f"{copy.path} holds the state of another model; it is not used")
            pieces = [(one.key, one.tile, Place(copy, one.offset, one.digest)) for one in packed.listed(manifest)]
            whole = {}
            for key, tile, place in pieces:
                if place.read(key, tile, arrays[key].dtype) is not None:
                    whole[key, tile] = place
        except (RequestError, LookupError, TypeError, ValueError, AttributeError) as error:
            return self._say(f"{copy.path} is not used: its {MANIFEST} is damaged ({error})")
        for (key, tile), place in whole.items():
            self._places.setdefault(key, {})[tile] = place
        if damaged := len(pieces) - len(whole):
            self._say(f"{copy.path} is damaged: {damaged} of {len(pieces)} pieces are not as written, and not used")

    def restore(self, like: Any) -> Any:
        """Returns the state of the step that `newest` chose, lying as `like` says. All hosts have to make this call: a
        piece that a host lacks comes from the first host that has it.

        Raises:
            CheckpointError: a copy has changed since `newest` looked at it.
        """
        leaves = [self._restored(key, leaf) for key, leaf in keyed(like).items()]
        return sharding.in_layouts(jax.tree.unflatten(jax.tree.structure(like), leaves), like)

    def _restored(self, key: str, like: Any) -> jax.Array:
        wanted = tiles_by_host(like)
        whole = np.empty(like.shape, like.dtype)
        for tile in sorted(set().union(*(host[key] for host in self._offers))):
            having = [host for host, offer in enumerate(self._offers) if tile in offer[key]]
            wanting = [host for host, tiles in wanted.items() if any(tile.touches(other) for other in tiles)]
            lacked = not set(wanting) <= set(having)
            if self._host in wanting or (lacked and self._host == having[0]):
                whole[tile.index] = self._read(key, tile, like.dtype) if self._host in having else 0
            if lacked:
                whole[tile.index] = hosts.given_by(having[0], whole[tile.index])
        return sharding.place(whole, like)

    def _read(self, key: str, tile: Tile, dtype: Any) -> np.ndarray:
        place = self._places[key][tile]
        if (data := place.read(key, tile, dtype)) is None:
            raise CheckpointError(f"{place.copy.path} changes while it is read; start again")
        return data

    # while the run goes on

    def save(self, step: int, state: Any) -> None:
        """Starts copying the state after `step`, once the copy before is written; the state may be donated afterwards.
        A state that the step left as it was, because it failed, is dropped."""
        began = time.perf_counter()
        self.wait()
        if (waited := time.perf_counter() - began) > LONG and not self._slow:
            self._slow = True
            self._say(
                f"training waited {waited:.1f} s until the local copy before was in {self._folder}; raise --local-every"
            )
        self._pending = self._behind.submit(self._write, step, self._copied(pieces_here(state, self._host)))

    def wait(self) -> None:
        """Waits until everything is written, or dropped."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        self.wait()
        self._behind.shutdown()

    def remove(self) -> None:
        """Removes all copies of the run from this host."""
        self.wait()
        for copy in Copy.all(self._folder):
            copy.remove()
        with contextlib.suppress(OSError):  # not empty, or removed by another process
            self._folder.rmdir()

    def _write(self, step: int, pieces: list[Piece]) -> None:
        copy = Copy(step, self._attempt, self._host, self._folder / f"{step}.{self._attempt}.{self._host}")
        try:
            self._make_room()
            copy.path.mkdir(parents=True, exist_ok=True)
            manifest = packed.write(copy.path / PIECES, pieces, copy.origin, self._progress)
            if manifest is None:
                return copy.remove()
            write_json(copy.path / MANIFEST, manifest)
            self._trouble = None
        except OSError as error:
            copy.remove()
            if self._trouble != error.strerror:  # said once, not every few steps
                self._trouble = error.strerror
                self._say(
                    f"the local copy of step {step} is dropped: cannot write {self._folder} ({error.strerror}); the "
                    "run goes on, and tries again when the next one is due"
                )

    def _make_room(self) -> None:
        """Removes copies that are older than a complete shared checkpoint, and of this host's those before the last
        few."""
        shared = max(self._shared(), default=0)
        own = [copy for copy in Copy.all(self._folder) if copy.host == self._host and copy.complete]
        for copy in {*own[: -kept()], *(copy for copy in Copy.all(self._folder) if copy.step < shared)}:
            copy.remove()

    def _say(self, sentence: str) -> None:
        """Says what became of a copy, on the terminal of the host that it is on."""
        if hosts.is_first():
            log.warning("%s", sentence)
        else:  # the log of this host is quiet
            print(f"host {self._host} of {jax.process_count()}: {sentence}", file=sys.stderr, flush=True)


def sizes(folder: Path) -> Iterator[int]:
    """Yields the bytes of each copy's file in a run's folder."""
    for copy in Copy.all(folder):
        with contextlib.suppress(OSError):
            yield (copy.path / PIECES).stat().st_size
