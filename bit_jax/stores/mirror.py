"""The local copy of a work directory that lies in a store: a run reads and writes it, and what changes is sent."""

import contextlib
import functools
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from bit_jax.stores import lease
from bit_jax.stores.store import TRIALS, Store, StoreError
from input_pipeline.errors import RequestError
from input_pipeline.files import Url

EVERY = 20.0  # seconds between two times that what has changed is sent
SHARE = 100  # later, it is sent every 100th part of the time: growing files are sent whole each time
CHECKPOINTS = "checkpoints"  # a folder with a form of its own in a store, see checkpoints/objects.py
LEFT = (CHECKPOINTS, lease.FOLDER, TRIALS, "tensorboard", "profile")  # folders of which a start needs nothing
LARGE = ("final.npz",)  # files of which it is enough for a start to know that they are there
LAST = ("final.npz", "result.json")  # what says that a run has finished is sent last, in this order
TEMPORARY = ".tmp"  # suffix of files that are still being written
LINES = ".jsonl"  # suffix of files that grow line by line

log = logging.getLogger(__name__)


class Mirror:
    """The local copy of what lies below a URL, except for checkpoints.

    Each host has its own. It lies in the directory for temporary files, and goes with the process.

    Attributes:
        store: the store.
        path: the directory with the copy.
    """

    def __init__(self, url: Url):
        self.store = Store(url)
        self.path = Path(tempfile.mkdtemp(prefix="bit_jax-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self._there: dict[str, int] = {}
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of change of the files that the store has
        self._lock = threading.Lock()
        self.pull()

    @staticmethod
    @functools.cache
    def of(url: Url) -> "Mirror":
        """Returns this process's mirror of the URL; what it begins with is fetched at the first call.

        Raises:
            RequestError: the store cannot be used.
        """
        return Mirror(url)

    def holds(self, name: str) -> bool:
        """Whether there is a file or a folder of this name, here or, when it was last looked at, in the store."""
        if (self.path / name).exists():
            return True
        return any(key == name or key.startswith(f"{name}/") for key in self._there)

    def pull(self) -> None:
        """Makes the local copy what the store holds, as far as a run that starts needs it."""
        with self._lock:
            self._there = self.store.sizes()
            for key in set(self._sent) - set(self._there):
                (self.path / key).unlink(missing_ok=True)
                del self._sent[key]
            for key in self._there:
                if key.partition("/")[0] not in LEFT and key not in LARGE:
                    self.store.fetch(key, self.path / key)
                    self._sent[key] = _stamp(self.path / key)

    def push(self) -> None:
        """Sends every file that has changed since it was last sent or fetched, and removes those that are gone here.

        Raises:
            StoreError: the store does not answer.
        """
        with self._lock:
            files = {str(path.relative_to(self.path)): path for path in self.path.rglob("*") if _is_result(path)}
            self.store.remove(gone := sorted(set(self._sent) - set(files)))
            for key in gone:
                del self._sent[key]
            for key in sorted(files, key=lambda key: (LAST.index(key) + 1 if key in LAST else 0, key)):
                with contextlib.suppress(FileNotFoundError):  # it was removed in this moment
                    stamp = _stamp(files[key])
                    if self._sent.get(key) != stamp:
                        self._send(key, files[key])
                        self._sent[key], self._there[key] = stamp, stamp[0]

    def _send(self, key: str, path: Path) -> None:
        if path.suffix != LINES:
            return self.store.send(path, key)
        content = path.read_bytes()
        self.store.write(key, content[: content.rfind(b"\n") + 1])  # the last line may be only half written

    @contextlib.contextmanager
    def owned(self, remedy: str) -> Iterator[None]:
        """Claims the store for this process while the `with` block runs. The copy is as new as the claim, and what
        changes is sent now and then, and in the end.

        Raises:
            RequestError: another process owns it, or the store cannot be used as a work directory.
            StoreError: in the end, something cannot be sent; then the local copy stays.
        """
        self.store.require()
        with lease.leased(self.store, remedy):
            self.pull()
            with self.sending():
                yield

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Sends what changes now and then while the `with` block runs, and in the end.

        Raises:
            StoreError: in the end, something cannot be sent; then the local copy stays.
        """
        ended = threading.Event()
        sender = threading.Thread(target=self._send_now_and_then, args=(ended,), name="mirror", daemon=True)
        sender.start()
        try:
            yield
        finally:
            ended.set()
            sender.join()
            self._push_in_the_end()

    def _push_in_the_end(self) -> None:
        try:
            self.push()
        except StoreError as error:
            kept = Path(tempfile.mkdtemp(prefix="bit_jax-kept-")) / self.path.name
            shutil.copytree(self.path, kept)
            raise StoreError(f"{str(error).partition(';')[0]}; what could not be sent is in {kept}") from None

    def push_soon(self, seconds: float) -> None:
        """Sends what has changed, as far as that is done within so many seconds, for a process that is about to end
        abruptly."""

        def push() -> None:
            with contextlib.suppress(RequestError):
                self.push()

        sender = threading.Thread(target=push, name="last push", daemon=True)
        sender.start()
        sender.join(seconds)

    def _send_now_and_then(self, ended: threading.Event) -> None:
        began, said = time.monotonic(), False
        while not ended.wait(max(EVERY, (time.monotonic() - began) / SHARE)):
            try:
                self.push()
            except StoreError as error:  # the next time it may answer; a checkpoint that cannot be sent ends the run
                if not said:
                    log.warning("%s is behind: %s", self.store.name, error)
                said = True


def local(place: Path | Url) -> Path:
    """Returns the directory, or the local copy of what lies below the URL."""
    return Mirror.of(place).path if isinstance(place, Url) else place


def _is_result(path: Path) -> bool:
    return path.is_file() and not path.name.endswith(TEMPORARY)


def _stamp(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
