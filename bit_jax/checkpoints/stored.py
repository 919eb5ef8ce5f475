"""Saves and restores the training state in an object store: each host writes its part, and a manifest comes last."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bit_jax.checkpoints import packed
from bit_jax.checkpoints.errors import CheckpointError
from bit_jax.checkpoints.objects import DAMAGED, FOLDER, MANIFEST, Checkpoint, Content, Damage, read_object, steps
from bit_jax.checkpoints.packed import Packed
from bit_jax.checkpoints.pieces import Copier, Piece, keyed, pieces_to_write, tiles_by_host
from bit_jax.scale import hosts, sharding
from bit_jax.stores.store import Store, StoreError
from input_pipeline.terminal import printable

OF_A_DIRECTORY = re.compile(r"\d+/sha256\.json")  # what a run with a directory as its --workdir writes
LISTED = 60.0  # seconds; local copies ask for the complete checkpoints every few steps, and each listing is paid for
PATIENCE = 0.5  # seconds between two looks whether the other hosts have written their parts

log = logging.getLogger(__name__)


class StoredCheckpoints:
    """The newest training states of a run in a store; see `shared.Checkpoints`, whose place it takes.

    All hosts have to make each call. At the start the hosts share the work of reading the newest checkpoint whole; if
    anything of it is not as written, it is marked, and the one before it is used.

    Args:
        store: the store.
        scratch: a local directory, for the part of a checkpoint that this host is about to send.
        keep: number of checkpoints to keep.
        attempt: text that only this start of the run has, the same on all hosts; hexadecimal.
        before: function that is called on host 0 before a checkpoint is complete: what a run that continues from it
            needs besides has to be in the store by then.
        progress: function that a thread calls while it writes a checkpoint.

    Raises:
        CheckpointError: the store does not answer, or holds checkpoints of another form.
    """

    def __init__(
        self,
        store: Store,
        scratch: Path,
        *,
        keep: int,
        attempt: str,
        before: Callable[[], None],
        progress: Callable[[], object] = lambda: None,
    ):
        self._store, self._scratch, self._keep = store, scratch, keep
        self._attempt, self._before, self._progress = attempt, before, progress
        self._host, self._count = hosts.position()
        self._copied = Copier()
        self._behind = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._content: Content | None = None
        self._complete: list[int] = []
        self._listed_until = 0.0
        with self._reading():
            if self._host == 0:
                self._clear()
            self._content = self._find()
        self.newest = self._content.checkpoint.step if self._content else None

    def complete(self) -> list[int]:
        """Returns the steps of the complete checkpoints, the newest first, as they were within the last `LISTED`
        seconds, or when the store last answered."""
        if time.monotonic() >= self._listed_until:
            with contextlib.suppress(StoreError):
                self._complete = steps(self._store)
            self._listed_until = time.monotonic() + LISTED
        return self._complete

    def save(self, state: Any) -> None:
        """Starts saving `state` under `state.step`, once the save before has ended; raises if that one failed. The
        state may be donated afterwards."""
        self.wait()
        step = int(state.step)
        pieces = self._copied(pieces_to_write(state, self._host))
        self._pending = self._behind.submit(self._write, Checkpoint(step, self._attempt), pieces)
        self.newest = step

    def wait(self) -> None:
        """Waits until this host's part is written, on host 0 until the checkpoint is complete; raises CheckpointError
        if that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except (OSError, StoreError) as error:
                cause = error.strerror if isinstance(error, OSError) else str(error).partition("; ")[0]
                raise CheckpointError(
                    f"cannot write a checkpoint to {self._store.name}: {cause}; mend that, then start again to "
                    "continue from the last whole one"
                ) from None

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Returns the state of that step, the one that was found at the start, with the shapes, dtypes, shardings and
        layouts of `abstract_state`.

        Raises:
            CheckpointError: the checkpoint is of another model, or cannot be read.
        """
        content = self._content
        assert content is not None
        assert content.checkpoint.step == step, "what was found at the start is restored"
        like = keyed(abstract_state)
        if content.shapes != packed.shapes_of(like):
            raise CheckpointError(
                f"checkpoint {self._store.name}/{content.checkpoint.folder} does not fit this run; it is as it was "
                "written, so give the flags that it was written with, or another --workdir"
            )
        arrays: dict[str, np.ndarray] = {}
        missing: dict[str, int] = {}  # pieces of each array that are still to come
        restored: dict[str, jax.Array] = {}
        wanted = []
        for key, leaf in like.items():
            here = tiles_by_host(leaf).get(self._host, set())
            own = [part for part in content.parts[key] if any(part[1].tile.touches(tile) for tile in here)]
            arrays[key], missing[key] = np.empty(leaf.shape, leaf.dtype), len(own)
            wanted += own
        with self._reading():
            try:
                for one, data in content.read(self._store, wanted):
                    arrays[one.key][one.tile.index] = data
                    missing[one.key] -= 1
                    if not missing[one.key]:  # its memory is free before the next ones come
                        restored[one.key] = sharding.place(arrays.pop(one.key), like[one.key])
            except Damage as damage:
                raise CheckpointError(
                    f"checkpoint {self._store.name}/{content.checkpoint.folder} changes while it is read ({damage}); "
                    "start again"
                ) from None
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [restored[key] for key in like])
        return sharding.in_layouts(state, abstract_state)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._behind.shutdown()

    # what the thread does

    def _write(self, checkpoint: Checkpoint, pieces: list[Piece]) -> None:
        with tempfile.NamedTemporaryFile(dir=self._scratch, suffix=".tmp") as file:
            index = packed.write(Path(file.name), pieces, checkpoint.origin, self._progress)
            assert index is not None, "a state is saved after its step is finished"
            self._store.send(Path(file.name), checkpoint.pieces(self._host), self._progress)
        self._store.write(checkpoint.index(self._host), json.dumps(index).encode())
        if self._host == 0:
            self._finish(checkpoint)

    def _finish(self, checkpoint: Checkpoint) -> None:
        """Writes the manifest once all hosts have written their parts, and removes the oldest checkpoints."""
        indexes = {checkpoint.index(host) for host in range(self._count)}
        while not indexes <= set(self._store.sizes(checkpoint.folder)):
            time.sleep(PATIENCE)  # if another host dies meanwhile, `Watch` ends this one
        digests = {key.rpartition("/")[2]: hashlib.sha256(read_object(self._store, key)).hexdigest() for key in indexes}
        self._before()
        self._store.write(f"{checkpoint.folder}/{MANIFEST}", json.dumps({"sha256": digests}).encode())
        keys = list(self._store.sizes(FOLDER))
        for old in Checkpoint.usable(keys)[self._keep :]:
            self._remove(old, keys)

    # the start

    def _clear(self) -> None:
        """Removes what earlier starts of the run had half written, and names foreign objects in the log.

        Raises:
            CheckpointError: the checkpoints are those of a directory.
        """
        keys = list(self._store.sizes(FOLDER))
        if any(OF_A_DIRECTORY.fullmatch(key.removeprefix(f"{FOLDER}/")) for key in keys):
            raise CheckpointError(
                f"{self._store.name}/{FOLDER} was copied from a directory, and checkpoints have another form in a "
                "store; copy it back to a directory and give that as --workdir"
            )
        found = Checkpoint.all(keys)
        for one, names in found.items():
            if not names & {MANIFEST, DAMAGED}:
                self._remove(one, keys)
        foreign = sorted({key.split("/")[1] for key in keys} - {one.folder.split("/")[1] for one in found})
        if foreign:
            where = f"{self._store.name}/{FOLDER}"
            log.warning("%s: left alone, as not this run's: %s", where, printable(", ".join(foreign)))

    def _remove(self, checkpoint: Checkpoint, keys: Sequence[str]) -> None:
        """Removes a checkpoint, which is incomplete from the first moment on."""
        own = [key for key in keys if key.startswith(f"{checkpoint.folder}/")]
        self._store.remove(sorted(own, key=lambda key: not key.endswith(f"/{MANIFEST}")))

    def _find(self) -> Content | None:
        """Returns the newest undamaged checkpoint, or None if there is none; marks newer ones as damaged."""
        sizes = self._store.sizes(FOLDER)
        known = [dataclasses.astuple(one) for one in Checkpoint.usable(list(sizes))]
        for step, attempt in json.loads(hosts.exchange("stored checkpoints", json.dumps(known))[0]):
            checkpoint, content, damage = Checkpoint(step, attempt), None, ""
            try:
                content = Content.of(self._store, checkpoint, sizes)
                for _ in content.read(self._store, self._share(content)):
                    pass
            except Damage as error:
                damage = str(error)
            damage = next(filter(None, hosts.exchange(f"stored checkpoint {step}.{attempt}", damage)), "")
            if not damage:
                return content
            if self._host == 0:
                self._store.write(f"{checkpoint.folder}/{DAMAGED}", f"{damage}\n".encode())
                name = f"{self._store.name}/{checkpoint.folder}"
                log.warning(
                    "checkpoint %s is damaged: %s; it is marked with %s, and the one before it is used",
                    name,
                    damage,
                    DAMAGED,
                )
        return None

    def _share(self, content: Content) -> list[tuple[int, Packed]]:
        """Returns the pieces that this host verifies, so that all of them together verify all."""
        return [part for parts in content.parts.values() for part in parts if part[0] % self._count == self._host]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns an error of the store into a CheckpointError: what cannot be read may be undamaged."""
        try:
            yield
        except StoreError as error:
            cause = str(error).partition("; ")[0]
            raise CheckpointError(f"{cause}; nothing was removed: mend that and start again") from None
