"""Save and restore the training state, atomically and in the background. The only file that knows Orbax."""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as orbax

from bit_jax import hosts
from bit_jax import mesh as meshes
from input_pipeline.errors import RequestError
from input_pipeline.files import write_json

MANIFEST = "sha256.json"  # of every other file of a checkpoint; written last, so its presence says that it is whole

# Where one write fails Orbax logs pages about each of the others before it raises. What it raises says all of it, and
# CheckpointError says that in a sentence.
log = logging.getLogger(__name__)
logging.getLogger("absl").setLevel(logging.CRITICAL)


class CheckpointError(RequestError):
    """A checkpoint cannot be written, or is not what was written."""


class Checkpoints:
    """The newest few training states of a run, by step.

    Attributes:
        newest: step of the newest one, None where there is none. Damaged ones are set aside before, which the log says.

    Saving copies the state off the devices and returns; writing goes on behind. A run killed at any moment finds its
    last whole checkpoint; what it was writing is cleared away. Several hosts share the directory: each writes its part,
    the first what says that it is whole.
    """

    def __init__(self, directory: Path, *, keep: int):
        self._directory = directory
        self._first = hosts.is_first()
        self._behind = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future | None = None
        with self._writing():
            if hosts.is_first():
                directory.mkdir(parents=True, exist_ok=True)
                for path in directory.iterdir():
                    if path.is_dir() and not (path / MANIFEST).exists():
                        shutil.rmtree(path)
            self.newest = hosts.agree(self._find() if hosts.is_first() else 0) or None
            keep_newest: Any = orbax.training.preservation_policies.LatestN(n=keep)
            self._orbax = orbax.training.Checkpointer(str(directory.absolute()), preservation_policy=keep_newest)

    def _find(self) -> int:
        """Step of the newest whose files are as they were written; newer ones are set aside. 0 where there is none."""
        steps = sorted((int(path.parent.name) for path in self._directory.glob(f"*/{MANIFEST}")), reverse=True)
        for step in steps:
            path = self._directory / str(step)
            if (damage := _damage(path)) is None:
                return step
            aside = self._directory.with_name("damaged") / f"{step}-{time.time_ns()}"
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
            log.warning(
                "checkpoint %s is damaged: %s; it is now %s, and the one before it is used", path, damage, aside
            )
        return 0

    def save(self, state: Any) -> None:
        """Starts saving `state` under `state.step`; waits for the save before, and raises if that one failed."""
        self.wait()
        step = int(state.step)
        with self._writing():
            response = self._orbax.save_async(step, state, force=True)
        assert response is not None  # None is for a save that a policy declined; force leaves none to decline
        self._pending = self._behind.submit(self._finish, step, response)
        self.newest = step

    def wait(self) -> None:
        """Returns once everything is written; raises CheckpointError if it was not."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._writing():
                pending.result()

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of that step, lying as `abstract_state` says (shapes, dtypes, shardings and layouts).

        Raises:
            CheckpointError: it is of another model.
        """
        path = self._directory / str(step)
        try:
            state = self._orbax.load(step, abstract_state)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise CheckpointError(
                f"checkpoint {path} does not fit this run ({_cause(error)}); "
                "delete that folder to continue from the checkpoint before it, or from the start"
            ) from None
        return jax.device_put(state, meshes.formats(abstract_state), donate=True)  # Orbax knows no layouts

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._behind.shutdown()
            with self._writing():
                self._orbax.close()

    def _finish(self, step: int, response: Any) -> None:
        response.result()
        path = self._directory / str(step)
        if self._first:
            write_json(path / MANIFEST, _digests(path))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns whatever Orbax and TensorStore raise while writing into a CheckpointError."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"cannot write a checkpoint to {self._directory}: {_cause(error)}; free space or mend the folder, "
                "then start again to continue from the last whole one"
            ) from None


def _damage(checkpoint: Path) -> str | None:
    """What of it is not as it was written."""
    try:
        written, found = json.loads((checkpoint / MANIFEST).read_text()), _digests(checkpoint)
    except (OSError, ValueError) as error:
        return str(error)
    differing = sorted(name for name in written | found if written.get(name) != found.get(name))
    return f"{differing[0]} is not as written" if differing else None


def _digests(checkpoint: Path) -> dict[str, str]:
    """{relative path: SHA-256} of every file but the manifest."""
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with open(path, "rb") as file:
                digests[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _cause(error: Exception) -> str:
    """What the innermost error says, without TensorStore's chain of wrappers and its specification in brackets."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    clauses = lines[0].split(" [")[0].split(": ")
    return ": ".join(clauses if len(clauses) <= 3 else [clauses[0], *clauses[-2:]])
