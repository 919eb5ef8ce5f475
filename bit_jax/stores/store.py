"""The objects below a URL, such as s3://bucket/run, through fsspec. Only this module uses fsspec.

A work directory rests on three promises that a local file system keeps; `Store.require` asks the store for them:

- an object is there whole or not at all, so that nobody reads half a checkpoint;
- what has been written is read and listed by everybody from then on;
- of several that create the same object, one succeeds, so that a work directory has one owner.

Amazon S3, Google Cloud Storage and Azure Blob Storage keep them
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html,
https://cloud.google.com/storage/docs/request-preconditions,
https://learn.microsoft.com/rest/api/storageservices/specifying-conditional-headers-for-blob-service-operations).
"""

import concurrent.futures
import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from input_pipeline.errors import RequestError
from input_pipeline.files import Url, is_url

CREATORS = 8  # threads that create the same object at once, to see whether only one succeeds
TRIALS = ".promises"  # folder of the objects that are written to see what the store keeps
OWN_PROCESS = ("memory",)  # protocols of what other processes do not see


class StoreError(RequestError):
    """The store does not answer, or refuses."""


class Store:
    """The objects below a URL, by their keys, such as "checkpoints/500.1a2b3c4d/manifest.json".

    Args:
        url: the URL, in any protocol that fsspec knows; or a local directory, to read a copy of a store.

    Raises:
        RequestError: no installed package knows the protocol, or the store cannot be used.
    """

    def __init__(self, url: Url | Path):
        import fsspec  # here, because few runs need it

        self.name = str(url)
        protocol = self.name.partition(":")[0] if is_url(self.name) else "file"
        self._local = protocol in ("file", "local")
        if protocol in OWN_PROCESS:
            raise RequestError(
                f"{url} is seen by one process alone; give the URL of a store that keeps what it is given"
            )
        for package in ("aiobotocore", "gcsfs", "s3fs"):
            logging.getLogger(package).setLevel(logging.CRITICAL)  # the sentences below say it
        try:
            # a listing that is remembered does not show what other hosts have written since
            self._files, self._root = fsspec.core.url_to_fs(self.name, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise RequestError(f"{url} cannot be used: {_cause(error)}; install that, or give a directory") from None
        except Exception as error:
            raise self._error("opened", error) from None
        self._root = self._root.rstrip("/")

    def read(self, key: str) -> bytes | None:
        """Returns the content of an object, or None if there is none."""
        with self._asking("read", key):
            try:
                return self._files.cat_file(self._path(key))
            except FileNotFoundError:
                return None

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Returns the bytes from a start to an end of each (key, start, end); several are asked for at once."""
        if not parts:
            return []
        keys, starts, ends = zip(*parts, strict=True)
        with self._asking("read", keys[0]):
            paths = [self._path(key) for key in keys]
            return self._files.cat_ranges(paths, list(starts), list(ends), on_error="raise")

    def write(self, key: str, data: bytes) -> None:
        """Writes an object, in place of one that may be there."""
        with self._asking("written", key):
            self._make_folder(key)
            self._files.pipe_file(self._path(key), data)

    def send(self, path: Path, key: str, progress: Callable[[], object] = lambda: None) -> None:
        """Writes an object with the content of a file.

        Args:
            progress: function that is called, in any thread, whenever a part has been written.
        """
        import fsspec

        class Telling(fsspec.callbacks.Callback):
            def call(self, *_: Any, **__: Any) -> None:
                progress()

        with self._asking("written", key):
            self._make_folder(key)
            self._files.put_file(str(path), self._path(key), callback=Telling())

    def fetch(self, key: str, path: Path) -> None:
        """Writes a file with the content of an object."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._asking("read", key):
            self._files.get_file(self._path(key), str(path))

    def create(self, key: str, data: bytes) -> bool:
        """Writes an object if there is none of that key; returns whether that was so.

        Args:
            data: the content, which nobody else writes, so that the writer of an object is known by it.
        """
        try:
            self._make_folder(key)
            self._files.pipe_file(self._path(key), data, mode="create")
        except FileExistsError:  # it is this one if the answer to a first attempt was lost
            return self.read(key) == data
        except Exception as error:  # each store has its own for an object that is there already
            there = self.read(key)
            if there is None:
                raise self._error("written", error, key) from None
            return there == data
        return True

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Returns {key: bytes} of all objects, or of those whose keys begin with a folder's name and a slash."""
        with self._asking("listed", folder):
            self._files.invalidate_cache()
            try:
                found = self._files.find(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
        begin = len(self._root) + 1
        return {name[begin:]: int(entry["size"] or 0) for name, entry in found.items() if entry["type"] == "file"}

    def remove(self, keys: Iterable[str]) -> None:
        """Removes objects, one after the other; some may be gone already."""
        for key in keys:
            with self._asking("removed", key), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._path(key))

    def require(self) -> None:
        """Sees whether the store keeps the promises that a work directory rests on, and leaves nothing behind.

        Raises:
            RequestError: it does not keep one of them, or cannot be written; the message says which.
        """
        if self._local:  # nothing is to stay behind there, not even folders
            raise self._broken("a file is seen there before it is whole")
        trial = f"{TRIALS}/{secrets.token_hex(8)}"
        try:
            self._require_seen(f"{trial}/seen")
            self._require_whole(f"{trial}/whole")
            self._require_exclusive(f"{trial}/exclusive")
        finally:
            with contextlib.suppress(RequestError):
                self.remove(self.sizes(trial))

    def _require_seen(self, key: str) -> None:
        for data in (b"one", b"another"):
            self.write(key, data)
            if self.read(key) != data or self.sizes(key.rpartition("/")[0]).get(key) != len(data):
                raise self._broken("what has been written is not read or listed at once")

    def _require_whole(self, key: str) -> None:
        with self._asking("written", key):
            self._make_folder(key)
            file: Any = self._files.open(self._path(key), "wb")
            with file:
                file.write(b"half")
                file.flush()
                seen = self.read(key) is not None
        if seen:
            raise self._broken("a file is seen there before it is whole")

    def _require_exclusive(self, key: str) -> None:
        """Several threads at once, because one after the other finds nothing where a store looks first and then
        writes."""
        ready = threading.Barrier(CREATORS)

        def create(number: int) -> bool:
            ready.wait()
            return self.create(key, f"creator {number}".encode())

        with concurrent.futures.ThreadPoolExecutor(CREATORS) as threads:
            created = sum(threads.map(create, range(CREATORS)))
        if created != 1 or self.create(key, b"a late one"):
            raise self._broken("several processes can create the same object, so that two runs could write there")

    def _broken(self, what: str) -> RequestError:
        return RequestError(
            f"{self.name} cannot be a work directory: {what}; give a directory, or a store with conditional writes, "
            "such as Amazon S3, Google Cloud Storage or Azure Blob Storage"
        )

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _make_folder(self, key: str) -> None:
        """Makes the folder of an object where a store has folders, as a local directory has."""
        if not getattr(self._files, "async_impl", False):
            self._files.makedirs(self._path(key).rpartition("/")[0], exist_ok=True)

    @contextlib.contextmanager
    def _asking(self, done: str, key: str) -> Iterator[None]:
        try:
            yield
        except RequestError:
            raise
        except Exception as error:  # each store has its own
            raise self._error(done, error, key) from None

    def _error(self, done: str, error: Exception, key: str = "") -> StoreError:
        name = f"{self.name}/{key}" if key else self.name
        return StoreError(f"{name} cannot be {done}: {_cause(error)}; mend that and start again")


def _cause(error: BaseException) -> str:
    """Returns the first line of an error's message, or of the one behind it."""
    while not str(error).strip() and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    if isinstance(error, FileNotFoundError) and lines:
        return f"not found: {lines[0]}"
    return lines[0].rstrip(".") if lines else type(error).__name__
