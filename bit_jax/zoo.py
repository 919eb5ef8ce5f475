"""Every published BiT file, and how it comes here: found in the cache, or fetched, resumed, verified and kept.

python -m bit_jax.zoo list [TEXT]    the files whose name contains TEXT
python -m bit_jax.zoo fetch NAME     into the cache; prints the path
"""

import base64
import contextlib
import dataclasses
import difflib
import fcntl
import hashlib
import http
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bit_jax.config import EMBEDDED
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code

BASE_URL = "https://storage.googleapis.com/bit_models"
EMBEDDED_FILE = Path(__file__).parent.parent / "assets" / "fashion-mnist-R14x0.5" / "final.npz"
ARCHITECTURES = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
VTAB_ARCHITECTURES = ("R50x1", "R101x1", "R50x3", "R101x3", "R152x4")

# The 19 VTAB-1k tasks by the names in the files, with their classes (Zhai et al., arXiv:1910.04867).
VTAB_TASKS = {
    "caltech101": 102,
    "cifar100": 100,
    "clevr-count": 8,
    "clevr-distance": 6,
    "diabetic_retinopathy": 5,
    "dmlab": 6,
    "dsprites-orientation": 16,
    "dsprites-xpos": 16,
    "dtd": 47,
    "eurosat": 10,
    "kitti-distance": 4,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "patch_camelyon": 2,
    "resisc45": 45,
    "smallnorb-azimuth": 18,
    "smallnorb-elevation": 9,
    "sun397": 397,
    "svhn": 10,
}

ATTEMPTS = 5  # a dropped connection is resumed this often before giving up
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20


class FetchError(RequestError):
    """A published file could not be had; what has arrived of it is kept and resumed."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A file below https://storage.googleapis.com/bit_models/."""

    name: str
    architecture: str
    num_classes: int
    path: str  # below the base address

    @property
    def url(self) -> str:
        return f"{base_url()}/{self.path}"


def _published() -> Iterator[Published]:
    for architecture in ARCHITECTURES:
        for name, classes in (
            (f"BiT-S-{architecture}", 1000),
            (f"BiT-M-{architecture}", 21_843),
            (f"BiT-M-{architecture}-ILSVRC2012", 1000),
        ):
            yield Published(name, architecture, classes, f"{name}.npz")
    for architecture in VTAB_ARCHITECTURES:
        for run in range(3):
            for task, classes in VTAB_TASKS.items():
                name = f"BiT-M-{architecture}-run{run}-{task}"
                yield Published(name, architecture, classes, f"vtab/{name}.npz")
    for name in ("R50x1_224", "R50x1_160", "R152x2_T_224", "R152x2_T_384"):
        yield Published(name, name.split("_")[0], 1000, f"distill/{name}.npz")


ZOO = {published.name: published for published in _published()}


def base_url() -> str:
    """Where files are fetched from: $BIT_JAX_MIRROR, or the authors' bucket."""
    return os.environ.get("BIT_JAX_MIRROR", BASE_URL).rstrip("/")


def cache_dir() -> Path:
    """Where fetched files are kept: $BIT_JAX_CACHE, or bit_jax below the user's cache directory."""
    if own := os.environ.get("BIT_JAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bit_jax"


def find(model: str) -> Path:
    """The weight file that `--model` names: `embedded`, the path of an .npz, or a published name (fetched if need be).

    Raises:
        RequestError: no such name; the nearest are listed.
        FetchError: it is not in the cache and cannot be fetched.
    """
    if model == EMBEDDED:
        return EMBEDDED_FILE
    if model in ZOO:
        return fetch(ZOO[model])
    if model.endswith(".npz") or Path(model).is_file():
        return Path(model)
    nearest = difflib.get_close_matches(model, ZOO, 3, cutoff=0.4)
    hint = f"near it: {', '.join(nearest)}; " if nearest else ""
    raise RequestError(
        f"unknown model {model!r}; {hint}`python -m bit_jax.zoo list` names all {len(ZOO)}, and a path must end in .npz"
    )


def fetch(published: Published) -> Path:
    """The file in the cache, fetched unless it is there.

    A partial download is resumed; size and MD5 are verified against what the server announces; the MD5 is kept beside
    the file (NAME.npz.md5, as `md5sum -c` reads it), and the file gets its name only when all of that holds.

    Raises:
        FetchError: the server cannot be reached, does not have the file, or sends something else than it announces.
    """
    target = cache_dir() / published.path
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _sole(target.with_name(target.name + ".lock")):
            if not target.exists():  # another process may just have fetched it
                _download(published.url, target)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise FetchError(
            f"cannot fetch {published.url} ({reason}); fetch it elsewhere and put it at {target}, "
            "or start again with a connection: what has arrived is kept"
        ) from None
    except OSError as error:
        raise FetchError(
            f"cannot write {error.filename or target} ({error.strerror}); free space or set BIT_JAX_CACHE elsewhere"
        ) from None
    return target


@contextlib.contextmanager
def _sole(lock: Path) -> Iterator[None]:
    """One process at a time; the others wait and then find the file."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            announced = _receive(url, part)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 or attempt == ATTEMPTS:
                raise FetchError(
                    f"{url} answers {error.code} {error.reason}; see whether a mirror (BIT_JAX_MIRROR) has it, "
                    f"or put the file at {target}"
                ) from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError):
            if attempt == ATTEMPTS:
                raise
        time.sleep(min(2.0 ** (attempt - 2), 10))
    if announced.md5 is None:
        print(f"warning: {url} announces no MD5; only the size was verified", file=sys.stderr)
    with open(part, "rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
        os.fsync(file.fileno())
    if announced.md5 not in (None, md5):
        part.unlink()  # nothing in it can be trusted, so nothing of it can be resumed
        raise FetchError(
            f"{url} arrived with MD5 {md5}, not {announced.md5} as announced; it was deleted: fetch it again"
        )
    target.with_name(target.name + ".md5").write_text(f"{md5}  {target.name}\n")
    os.replace(part, target)


@dataclasses.dataclass(frozen=True)
class _Announced:
    size: int | None
    md5: str | None  # hexadecimal


def _receive(url: str, part: Path) -> _Announced:
    """Appends what `part` lacks of the file, and returns what the server says of the whole.

    Raises ConnectionError where fewer bytes arrive than were announced.
    """
    etag = part.with_name(part.name + ".etag")  # of the version that `part` is a part of
    have = part.stat().st_size if part.exists() and etag.exists() else 0
    request = urllib.request.Request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", etag.read_text())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()
        part.unlink()  # longer than the file, or all of it without our knowing: start over
        return _receive(url, part)
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        size = have + int(length) if length is not None else None
        if announced_etag := response.headers.get("ETag"):
            etag.write_text(announced_etag)
        with open(part, "ab" if resumed else "wb") as file, _progress(target_name(part), have, size) as advance:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                advance(have)
            file.flush()
            os.fsync(file.fileno())
        if size is not None and have != size:
            raise ConnectionError(f"{have} of {size} bytes arrived")
        etag.unlink(missing_ok=True)
        return _Announced(size, _md5(response.headers))


def target_name(part: Path) -> str:
    return part.name.removesuffix(".part")


def _md5(headers) -> str | None:
    """From Google's `x-goog-hash: crc32c=...,md5=BASE64`, in one header or several."""
    for value in headers.get_all("x-goog-hash", []):
        for item in value.split(","):
            kind, _, digest = item.strip().partition("=")
            if kind == "md5":
                return base64.b64decode(digest).hex()
    return None


@contextlib.contextmanager
def _progress(name: str, have: int, size: int | None):
    """Yields a function of the bytes arrived so far."""
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("fetch", total=size, completed=have)
        yield lambda arrived: progress.update(task, completed=arrived)


def _list(text: Annotated[str, tyro.conf.Positional] = "") -> None:
    """Lists the published files whose name contains TEXT."""
    for published in ZOO.values():
        if text in published.name:
            kept = "  (in the cache)" if (cache_dir() / published.path).exists() else ""
            size = f"{published.architecture:7} {published.num_classes:>6} classes"
            print(f"{published.name:44} {size}  {published.url}{kept}")


def _fetch(name: Annotated[str, tyro.conf.Positional]) -> None:
    """Fetches a published file into the cache and prints where it is."""
    print(find(name))


if __name__ == "__main__":
    commands = {"list": _list, "fetch": _fetch}
    sys.exit(exit_code(lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)))
