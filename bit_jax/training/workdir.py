"""A run's work directory: its config.json identifies the run, and a run of another configuration is refused."""

import contextlib
import dataclasses
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bit_jax.accounts import starts
from bit_jax.checkpoints.shared import Checkpoints
from bit_jax.checkpoints.stored import StoredCheckpoints
from bit_jax.config import Config, identity
from bit_jax.scale import hosts
from bit_jax.stores.mirror import Mirror, local
from bit_jax.training.hyperrule import Recipe
from bit_jax.watching import spikes
from input_pipeline import claims
from input_pipeline.errors import RequestError
from input_pipeline.files import Url, is_unfinished, read_json, write_json

OTHER = "choose another --workdir"
SEEN_WITHIN = 60.0  # seconds after which a file is seen on all hosts that share a disk
OWN = (
    "config.json",
    "run.json",
    "metrics.jsonl",
    "result.json",
    "final.npz",
)  # files that a run writes by `files.replacing`


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The work directory of one run.

    Attributes:
        path: the directory; of a work directory in an object store, the local copy.
        content: the content of its config.json.
        mirror: keeps the store and the local copy alike; None where the work directory is a directory.
    """

    path: Path
    content: dict[str, Any]
    mirror: Mirror | None = None

    @classmethod
    def of(cls, cfg: Config, **derived: Any) -> "Workdir":
        """Returns the work directory of the configured run.

        Args:
            cfg: the run's configuration.
            derived: values that follow from it and from the machine or dataset (recipe, global batch, class names);
                config.json keeps them too, and they are compared as well.
        """
        content = json.loads(json.dumps({"config": identity(cfg), **derived}, default=_plain))
        place = cfg.run.workdir
        return cls(local(place), content, Mirror.of(place) if isinstance(place, Url) else None)

    @property
    def name(self) -> str:
        """What the work directory is called, as --workdir names it."""
        return str(self.path) if self.mirror is None else self.mirror.store.name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def starts(self) -> Path:
        return self.path / starts.NAME

    @property
    def spikes(self) -> Path:
        return self.path / spikes.NAME

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def programs(self) -> Path:
        return self.path / "programs"

    @property
    def final(self) -> Path:
        return self.path / "final.npz"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def _run(self) -> Path:
        return self.path / "run.json"

    @property
    def known_run(self) -> str | None:
        """The text of `run`, if it was drawn already.

        Raises:
            RequestError: run.json cannot be read, or is damaged.
        """
        if not self._run.exists():
            return None
        remedy = "move it away to continue without the local copies"
        run = read_json(self._run, dict, remedy).get("run")
        if not re.fullmatch(r"[0-9a-f]{16}", str(run)):
            raise RequestError(f"{self._run} is damaged (it names no run); {remedy}")
        return run

    def run(self) -> str:
        """Returns a text that only this run has, drawn when it is first asked for, the same on all hosts. All of them
        have to make this call. What is kept outside of the directory is known by it as this run's."""
        text = ""
        if hosts.is_first():
            if self.known_run is None:
                write_json(self._run, {"run": secrets.token_hex(8)})
            text = self.known_run or ""
        return hosts.exchange("run", text)[0]

    def open_checkpoints(
        self, keep: int, attempt: str, progress: Callable[[], object] = lambda: None
    ) -> Checkpoints | StoredCheckpoints:
        """Opens the checkpoints. All hosts have to make this call.

        Args:
            keep: number of checkpoints to keep.
            attempt: text that only this start of the run has, the same on all hosts; hexadecimal.
            progress: function that threads call while a checkpoint is being written.
        """
        if self.mirror is None:
            return Checkpoints(self.checkpoints, keep=keep, progress=progress)
        store, before = self.mirror.store, self.mirror.push
        return StoredCheckpoints(store, self.path, keep=keep, attempt=attempt, before=before, progress=progress)

    def push_soon(self, seconds: float) -> None:
        """Sends to the store what has changed, if there is one, for a process that is about to end abruptly."""
        if self.mirror is not None:
            self.mirror.push_soon(seconds)

    def forget_run(self) -> None:
        """Makes `run` return another text from the next start on."""
        if hosts.is_first():
            self._run.unlink(missing_ok=True)

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Claims the directory for this run while the `with` block runs, and writes config.json if it is missing.
        Host 0 holds the claim for all hosts.

        Raises:
            RequestError: the directory cannot be written, belongs to another process, or holds a run of another
                configuration.
        """
        if not hosts.is_first():
            hosts.wait_for_all("work directory")
            with self._sending():
                if not _appears(self.config):
                    raise RequestError(
                        f"{self.name} is not the first host's; put --workdir on a disk that all hosts share"
                    )
                self.check()
                yield
            return
        owning = contextlib.ExitStack()
        try:
            owning.enter_context(self._claimed())
        except OSError as error:
            raise RequestError(f"cannot use work directory {self.name}: {error.strerror}; {OTHER}") from None
        with owning:
            try:
                self.check()
                self._clear()
                if not self.config.exists():
                    write_json(self.config, self.content)
                if self.mirror is not None:
                    self.mirror.push()
            finally:
                hosts.wait_for_all("work directory")
            yield

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[None]:
        """Holds the claim while the `with` block runs."""
        if self.mirror is not None:
            with self.mirror.owned(OTHER):
                yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with claims.claimed(self.path / claims.CLAIM, self.path, OTHER):
            yield

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        """On another host than the first: sends what this one writes while the `with` block runs."""
        if self.mirror is None:
            yield
            return
        self.mirror.pull()
        with self.mirror.sending():
            yield

    def _clear(self) -> None:
        """Removes files that a run was writing when it was killed, because half a final.npz may be large."""
        for path in self.path.iterdir():
            if any(is_unfinished(path, name) for name in OWN):
                path.unlink()

    def _has(self, name: str) -> bool:
        return (self.path / name).exists() if self.mirror is None else self.mirror.holds(name)

    def check(self) -> None:
        """Compares config.json, if it exists, with this run.

        Raises:
            RequestError: config.json belongs to another configuration, or is damaged, or is missing beside results.
        """
        if not self.config.exists():
            stray = [name for name in ("checkpoints", "final.npz", "result.json") if self._has(name)]
            if stray:
                raise RequestError(
                    f"{self.name} holds {stray[0]} but no config.json to say of which run; choose another --workdir"
                )
            return
        differing = _differences(read_json(self.config, dict, OTHER), self.content)
        if differing:
            raise RequestError(
                f"{self.name} holds a run of another configuration ({'; '.join(differing)}); "
                "choose another --workdir, or the same flags to continue that run"
            )

    def finished(self) -> dict[str, Any] | None:
        """Returns the result of this run if the run has finished, else None.

        Raises:
            RequestError: result.json is damaged, or `check` fails.
        """
        self.check()
        if self.result.exists() and self._has(self.final.name):
            return read_json(self.result, dict, "move it away to have it written again")
        return None


def _appears(path: Path) -> bool:
    """Whether a file that another host has written is seen here. A network file system may remember for a while that it
    was not there: NFS by default up to a minute (acdirmax in nfs(5))."""
    until = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(SEEN_WITHIN / 100)
    return True


def begun_in(workdir: Path | Url) -> dict[str, Any] | None:
    """Returns the content of the work directory's config.json, or None if no run has begun there.

    Raises:
        RequestError: config.json is damaged, or the store cannot be used.
    """
    path = local(workdir) / "config.json"
    return read_json(path, dict, OTHER) if path.exists() else None


def _plain(value: Any) -> Any:
    """Converts values that JSON cannot express: the recipe to an object, paths to text."""
    return value.described() if isinstance(value, Recipe) else str(value)


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Returns a clause for every value in which the directory's config.json and this run's content differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = list(here) + [key for key in there if key not in here]
        return [line for key in keys for line in _differences(there.get(key), here.get(key), f"{name}{key}: ")]
    return [] if there == here else [f"{name}{there} there, {here} here"]
