"""Saves and restores the training state, atomically and in the background. Only this module uses Orbax."""

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as orbax

from bit_jax.checkpoints import objects
from bit_jax.checkpoints.errors import CheckpointError
from bit_jax.scale import hosts, sharding
from input_pipeline.files import DamagedFile, is_unfinished, read_json, write_json
from input_pipeline.terminal import printable

MANIFEST = "sha256.json"  # hashes of a checkpoint's other files; it is written last, so its presence means "complete"
ORBAX = {"_CHECKPOINT_METADATA", "commit_success.txt", "orbax.checkpoint", "state"}  # Orbax's entries in a checkpoint
HALF = ".orbax-checkpoint-tmp"  # suffix, after the step, of a directory that Orbax is writing
LEAVING = ".removing"  # suffix, after the step, of a checkpoint that is being deleted
LOOK = 5.0  # seconds between two looks at the size of a checkpoint that is being written

# If one write fails, Orbax logs pages about each of the others before it raises. CheckpointError says the cause in a
# sentence, so the log is silenced.
log = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.CRITICAL)


def complete_steps(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a run's directory of checkpoints, the newest first."""
    names = (path.parent.name for path in directory.glob(f"*/{MANIFEST}"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def read(directory: Path, step: int) -> dict[str, Any]:
    """Returns the state of a step as numpy arrays, whatever devices and hosts wrote it: a tree of dicts and lists that
    has `TrainState`'s attributes as keys. Nothing is moved or removed, so that a run may be writing beside it.

    Raises:
        CheckpointError: the checkpoint is damaged, cannot be read, or is of another step.
    """
    path = directory.absolute() / str(step)
    try:
        damage = _damage(path)
        if damage is None:
            shapes = orbax.metadata(str(path)).metadata
            state = orbax.load(str(path), jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes))
            damage = None if int(state["step"]) == step else f"it is of step {int(state['step'])}"
    except Exception as error:  # Orbax and TensorStore raise many kinds
        raise CheckpointError(f"checkpoint {path} cannot be read: {_cause(error)}; choose another step") from None
    if damage is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: {damage}; choose another step")
    return state


class Checkpoints:
    """The newest training states of a run, by step.

    Args:
        directory: where they lie.
        keep: number of complete ones that are kept.
        progress: function that threads call while a checkpoint that is being written grows.

    Attributes:
        newest: step of the newest checkpoint, or None if there is none. Damaged checkpoints are set aside first, and
            the log names them.

    Saving copies the state off the devices and returns; a thread writes it. A run that was killed at any moment finds
    its last whole checkpoint, and half-written ones are removed. Several hosts share the directory: the first host that
    has a part of an array writes it, and the first of all writes the manifest. Directories that this program did not
    write are never touched.
    """

    def __init__(self, directory: Path, *, keep: int, progress: Callable[[], object] = lambda: None):
        self._directory, self._keep, self._progress = directory.absolute(), keep, progress
        self._first = hosts.is_first()
        self._behind = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None
        newest = 0
        if self._first:
            with self._reading(directory):
                directory.mkdir(parents=True, exist_ok=True)
                self._clear()
                newest = self._find()
        self.newest = hosts.agree(newest) or None

    def complete(self) -> list[int]:
        """Returns the steps of the complete checkpoints, the newest first."""
        return complete_steps(self._directory)

    def save(self, state: Any) -> None:
        """Starts saving `state` under `state.step`, once the save before has ended; raises if that one failed."""
        self.wait()
        step = int(state.step)
        with self._writing(), _each_part_once():
            response = orbax.save_async(str(self._directory / str(step)), state)
        self._pending = self._behind.submit(self._finish, step, response)
        self.newest = step

    def wait(self) -> None:
        """Waits until everything is written; raises CheckpointError if that failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._writing():
                pending.result()

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Returns the state of that step with the shapes, dtypes, shardings and layouts of `abstract_state`.

        Raises:
            CheckpointError: the checkpoint is of another model or step, or cannot be read.
        """
        path = self._directory / str(step)
        try:
            state = orbax.load(str(path), abstract_state)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise CheckpointError(
                f"checkpoint {path} does not fit this run ({_cause(error)}); its files are as they were written, so "
                "give the flags that it was written with, or another --workdir"
            ) from None
        if int(state.step) != step:
            raise CheckpointError(
                f"checkpoint {path} is of step {int(state.step)}, as where a folder was copied under another name; "
                "move it out of there"
            )
        return sharding.in_layouts(state, abstract_state)  # Orbax ignores layouts

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._behind.shutdown()

    def _clear(self) -> None:
        """Removes what this program was writing or deleting when it was killed, and names foreign entries in the log.

        Raises:
            CheckpointError: a foreign entry has a name that a checkpoint will need.
        """
        foreign = []
        if any(self._directory.glob(f"*.*/{objects.MANIFEST}")):
            raise CheckpointError(
                f"{self._directory} was copied from an object store, and checkpoints have another form in a directory; "
                "give the store's URL as --workdir to continue from them"
            )
        for path in sorted(self._directory.iterdir()):
            if _is_left_over(path):
                shutil.rmtree(path)
            elif not (path / MANIFEST).exists() or not path.name.isdecimal():
                foreign.append(path.name)
        for name in foreign:
            if name.isdecimal():
                raise CheckpointError(
                    f"{self._directory / name} is no checkpoint of this program, and step {name} would need its name; "
                    "move it out of there"
                )
        if foreign:
            log.warning("%s: left alone, as not this run's: %s", self._directory, printable(", ".join(foreign)))

    def _find(self) -> int:
        """Returns the step of the newest undamaged checkpoint, or 0 if there is none, and sets newer ones aside."""
        for step in complete_steps(self._directory):
            path = self._directory / str(step)
            with self._reading(path):
                damage = _damage(path)
            if damage is None:
                return step
            aside = self._directory.with_name("damaged") / f"{step}-{time.time_ns()}"
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
            log.warning(
                "checkpoint %s is damaged: %s; it is now %s, and the one before it is used", path, damage, aside
            )
        return 0

    def _finish(self, step: int, response: Any) -> None:
        with self._growing(step):
            response.result()
        path = self._directory / str(step)
        if self._first:
            write_json(path / MANIFEST, _digests(path, self._progress))
            for old in complete_steps(self._directory)[self._keep :]:
                leaving = self._directory / f"{old}{LEAVING}"
                (self._directory / str(old)).rename(leaving)  # now a kill leaves nothing that looks complete
                shutil.rmtree(leaving)

    @contextlib.contextmanager
    def _growing(self, step: int) -> Iterator[None]:
        """Calls `progress` whenever a file of the checkpoint grows, whichever host writes it. Orbax does not tell."""
        done = threading.Event()

        def look() -> None:
            before: list[int] = []
            while not done.wait(LOOK):
                if (sizes := _sizes(self._directory, step)) != before:
                    self._progress()
                before = sizes

        threading.Thread(target=look, name="growth of a checkpoint", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns any exception of Orbax and TensorStore while writing into a CheckpointError."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"cannot write a checkpoint to {self._directory}: {_cause(error)}; free space or mend the folder, "
                "then start again to continue from the last whole one"
            ) from None

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        """Turns an error of the operating system into a CheckpointError: an unreadable checkpoint may be undamaged."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot use {error.filename or path} ({error.strerror}); nothing was moved or deleted: mend that and "
                "start again"
            ) from None


def _each_part_once() -> orbax.Context:
    """Returns a context in which Orbax takes each part of an array from one of the devices that have it.

    By default it takes a slice from each of them, and JAX compiles a program for every slice: of R50x1 on 8 devices
    there are 224, and the first checkpoint held a run up for 13 s instead of 0.1 (docs/notebook.md).
    """
    context = orbax.Context()
    context.array.saving.use_replica_parallel = False
    return context


def _is_left_over(path: Path) -> bool:
    """Whether a run of this program was writing or deleting the path when it was killed."""
    if re.fullmatch(rf"\d+({re.escape(LEAVING)}|{re.escape(HALF)}.*)", path.name):
        return path.is_dir()
    if not path.name.isdecimal() or not path.is_dir():
        return False
    # the manifest may be half written, under its temporary name
    return {inner.name for inner in path.iterdir() if not is_unfinished(inner, MANIFEST)} <= ORBAX


def _damage(checkpoint: Path) -> str | None:
    """Says which file of a checkpoint has changed since it was written, or returns None.

    Raises:
        OSError: a file exists but cannot be read.
    """
    manifest = checkpoint / MANIFEST
    manifest.read_bytes()  # raises an error of the operating system before `read_json` turns it into another
    try:
        written = read_json(manifest, dict, "")
    except DamagedFile as error:
        return str(error).rstrip("; ")
    present = _digests(checkpoint)
    differing = sorted(name for name in written | present if written.get(name) != present.get(name))
    return f"{differing[0]} is not as written" if differing else None


def _sizes(directory: Path, step: int) -> list[int]:
    """Returns the bytes of every file of a checkpoint that is being written, whatever it is called meanwhile."""
    sizes = []
    for place in (directory / str(step), *directory.glob(f"{step}{HALF}*")):
        for folder, _, names in os.walk(place):
            for name in names:
                with contextlib.suppress(OSError):  # it has just got another name
                    sizes.append(os.stat(os.path.join(folder, name)).st_size)
    return sizes


def _digests(checkpoint: Path, progress: Callable[[], object] = lambda: None) -> dict[str, str]:
    """Returns {relative path: SHA-256} for every file except the manifest, and calls `progress` after each."""
    digests = {}
    for directory, _, names in os.walk(checkpoint, onerror=_raise):
        for path in (Path(directory, name) for name in names if name != MANIFEST):
            with open(path, "rb") as file:
                digests[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
            progress()
    return digests


def _raise(error: OSError) -> None:
    """Raises an error that `os.walk` hands over; it would skip a directory that cannot be listed."""
    raise error


def _cause(error: Exception) -> str:
    """Returns the innermost error's message, without TensorStore's wrappers and its specification in brackets."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    clauses = lines[0].split(" [")[0].split(": ")
    return ": ".join(clauses if len(clauses) <= 3 else [clauses[0], *clauses[-2:]])
