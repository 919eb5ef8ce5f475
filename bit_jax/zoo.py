"""Every published BiT file, and how it comes here: found in the cache, or fetched, resumed, verified and kept.

python -m bit_jax.zoo list [TEXT]    the files whose name contains TEXT
python -m bit_jax.zoo fetch NAME     into the cache; prints the path
"""

import base64
import binascii
import contextlib
import dataclasses
import difflib
import hashlib
import http
import http.client
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bit_jax.config import EMBEDDED
from bit_jax.model import formats, weights
from bit_jax.model.architecture import Architecture
from bit_jax.model.weights import WeightsError
from input_pipeline.claims import CLAIM, claimed
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import DamagedFile, is_url, read_json, replacing, user_path, write_json
from input_pipeline.terminal import console, printable

BASE_URL = "https://storage.googleapis.com/bit_models"
EMBEDDED_FILE = Path(__file__).parent / "assets" / "fashion-mnist-R14x0.5" / "final.npz"
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

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before a dropped connection is tried again; after the last we give up
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20
MIRROR = "see whether a mirror (BIT_JAX_MIRROR) has it"
NOTHING_KEPT = f"nothing of it was kept, {MIRROR}"
SLACK = 2  # no file is longer than its float32 parameters by this factor; what is longer is cut off


class FetchError(RequestError):
    """A published file could not be had; what has arrived of it, and can be trusted, is kept and resumed."""


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

    @property
    def promised(self) -> Architecture:
        """The architecture and number of classes that the name stands for."""
        return Architecture.parse(self.architecture, self.num_classes)

    @property
    def limit(self) -> int:
        """Bytes that no file of this architecture exceeds."""
        return SLACK * sum(4 * math.prod(shape) for shape in self.promised.layout.values())


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
    return (os.environ.get("BIT_JAX_MIRROR") or BASE_URL).rstrip("/")


def cache_dir() -> Path:
    """Where fetched files are kept: $BIT_JAX_CACHE, or bit_jax below the user's cache directory. It may not exist yet.

    Raises:
        RequestError: the home directory is not known, as for a user number without an account.
    """
    if own := os.environ.get("BIT_JAX_CACHE"):
        return user_path(own)
    try:
        return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bit_jax"
    except RequestError as error:
        raise RequestError(f"no cache directory ({error}); set BIT_JAX_CACHE to one that you can write to") from None


def published(model: str) -> Published | None:
    """The published file of this name, or of this address: the authors', or the mirror's as `list` prints it."""
    if model in ZOO:
        return ZOO[model]
    addresses = {f"{base}/{each.path}": each for each in ZOO.values() for base in (BASE_URL, base_url())}
    return addresses.get(model)


def find(model: str) -> Path:
    """The weight file that `--model` names; a published one is fetched if need be.

    Raises:
        RequestError: as `located`.
        FetchError: it is not in the cache and cannot be fetched.
    """
    place = located(model)
    return fetch(place) if isinstance(place, Published) else place


def located(model: str) -> Published | Path:
    """What `--model` names: `embedded`, a published name or address, or a path. Nothing is fetched.

    Raises:
        RequestError: no such name, of which the nearest are listed, or an address of something else.
    """
    if model == EMBEDDED:
        return EMBEDDED_FILE
    if known := published(model):
        return known
    if is_url(model):
        raise RequestError(
            f"{model} is the address of no published file; `python -m bit_jax.zoo list` names all {len(ZOO)}, and "
            "other files are fetched first and named by their path"
        )
    path = user_path(model)
    if path.suffix == ".npz" or os.path.exists(path):
        return path
    nearest = difflib.get_close_matches(model, ZOO, 3, cutoff=0.4)
    hint = f"near it: {', '.join(nearest)}; " if nearest else ""
    raise RequestError(
        f"unknown model {model!r}; {hint}`python -m bit_jax.zoo list` names all {len(ZOO)}, and a path must end in .npz"
    )


def fetch(published: Published) -> Path:
    """The file in the cache, fetched unless it is there.

    A partial download is resumed. The file gets its name only when it is verified: against the MD5 that the server
    announces, which is then kept beside it (NAME.npz.md5, as `md5sum -c` reads it), or, where none is announced, by
    reading it whole as the weights that its name promises.

    Raises:
        FetchError: the server cannot be reached, does not have the file, or sends something else.
        RequestError: there is no cache directory.
    """
    target = cache_dir() / published.path
    try:
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        claim = target.with_name(f".{target.name}{CLAIM}")
        with claimed(claim, f"the download of {published.name}", "set BIT_JAX_CACHE elsewhere", wait=True):
            if not target.exists():  # another process may just have fetched it
                _download(published, target)
    except OSError as error:
        raise FetchError(
            f"cannot write {error.filename or target} ({error.strerror}); free space or set BIT_JAX_CACHE elsewhere"
        ) from None
    return target


class _Dropped(Exception):
    """The server could not be reached, broke off or was in trouble: worth another attempt."""


def _download(published: Published, target: Path) -> None:
    url, part = published.url, _Part(target)
    if not url.startswith(("https://", "http://")):
        raise RequestError(f"BIT_JAX_MIRROR {base_url()} is no http address; for a directory, set BIT_JAX_CACHE to it")
    for pause in (*PAUSES, None):
        try:
            announced = _receive(url, part, published.limit)
            break
        except _Dropped as dropped:
            if pause is None:
                raise FetchError(
                    f"cannot fetch {url} ({dropped}); fetch it elsewhere and put it at {target}, {MIRROR}, "
                    "or start again later: what has arrived and can be trusted is kept"
                ) from None
            time.sleep(pause)
    try:
        _verify(published, part, announced)
    except FetchError:
        part.discard()  # nothing in it can be trusted, so nothing of it can be resumed
        raise
    checksum = target.with_name(target.name + ".md5")
    if announced.md5 is None:
        checksum.unlink(missing_ok=True)  # an earlier file's
    else:
        with replacing(checksum) as file:
            file.write(f"{announced.md5}  {target.name}\n".encode())
    part.keep()


@dataclasses.dataclass(frozen=True)
class _Announced:
    """What a server says of a whole file."""

    size: int | None  # bytes
    md5: str | None  # hexadecimal
    etag: str | None  # of this version, in its quotation marks; None where it does not stand for the very bytes


@dataclasses.dataclass(frozen=True)
class _Part:
    """The file as far as it has arrived, and beside it what was announced of the whole."""

    target: Path

    @property
    def path(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def note(self) -> Path:
        return self.target.with_name(self.target.name + ".part.json")

    def resumable(self) -> tuple[int, _Announced | None]:
        """(bytes that are there, what was announced); (0, None) where it is not known what they are a part of."""
        if self.path.exists() and self.note.exists():
            with contextlib.suppress(DamagedFile, TypeError):
                announced = _Announced(**read_json(self.note, dict, "it is not used"))
                if _strong(announced.etag) and isinstance(announced.size, int | None):
                    return self.path.stat().st_size, announced
        return 0, None

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def keep(self) -> None:
        """Gives the file its name."""
        os.replace(self.path, self.target)
        self.note.unlink(missing_ok=True)


def _receive(url: str, part: _Part, limit: int) -> _Announced:
    """Appends what `part` lacks of the file, and returns what the server says of the whole.

    Raises:
        _Dropped: it could not be had this time; what is kept in `part` is a beginning of the file.
        FetchError: the server does not have it, or sends what cannot be it.
    """
    have, before = part.resumable()
    if before is not None and have == before.size:
        return before
    request = urllib.request.Request(url)
    if before is not None and before.etag is not None:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", before.etag)
    with _opened(request, part) as response:
        announced = _announced(url, response, have)
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            if reason := _not_the_rest(response, announced, have, before):
                part.discard()
                raise _Dropped(f"it was asked for the rest from byte {have} on, and {reason}")
            announced = _together(announced, before)
        elif response.status == http.HTTPStatus.OK:
            part.discard()
            have = 0
        else:
            raise FetchError(f"{url} answers {response.status}; {MIRROR}")
        if announced.size is not None and announced.size > limit:
            part.discard()
            raise FetchError(f"{url} announces {announced.size:,} bytes, {_too_long(limit)}")
        if announced.etag:
            write_json(part.note, dataclasses.asdict(announced))
        with open(part.path, "ab") as file, _progress(part.target.name, have, announced.size) as advance:
            while chunk := _next_chunk(response):
                file.write(chunk)
                have += len(chunk)
                advance(have)
                if have > limit:
                    part.discard()
                    raise FetchError(f"{url} sends more than {have - 1:,} bytes, {_too_long(limit)}")
            file.flush()
            os.fsync(file.fileno())
    if announced.size not in (None, have):
        if have > announced.size:
            part.discard()
        raise _Dropped(f"{have:,} of {announced.size:,} bytes arrived")
    return announced


def _too_long(limit: int) -> str:
    return f"and no such file has more than {limit:,}; {NOTHING_KEPT}"


def _opened(request: urllib.request.Request, part: _Part) -> Any:
    """The server's answer."""
    url = request.full_url
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and request.has_header("Range"):
            part.discard()  # longer than the file, or all of it without our knowing: start over
            raise _Dropped("there is less of it than had arrived") from None
        answer = f"{error.code} {' '.join(str(error.reason).split())}"
        if error.code >= 500:
            raise _Dropped(f"it answers {answer}") from None
        raise FetchError(f"{url} answers {answer}; {MIRROR}, or put the file at {part.target}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host's name that cannot be
        raise _Dropped(str(getattr(error, "reason", None) or error or type(error).__name__)) from None


def _next_chunk(response: Any) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: the length of a chunk
        raise _Dropped(str(error) or type(error).__name__) from None


def _announced(url: str, response: Any, have: int) -> _Announced:
    """What the answer's headers say of the whole file.

    Raises FetchError where they cannot be.
    """
    headers, size = response.headers, None
    length = headers.get("Content-Length")
    if length is not None:
        if not re.fullmatch(r"[0-9]{1,15}", length.strip()):
            raise FetchError(f"{url} announces a Content-Length of {length!r}; {MIRROR}")
        size = int(length) + (have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0)
    return _Announced(size, _md5(headers), _strong(headers.get("ETag")))


def _not_the_rest(response: Any, announced: _Announced, have: int, before: _Announced | None) -> str | None:
    """Why an answer 206 is not what was asked for: the bytes from `have` on of the same version of the file."""
    if before is None:
        return "it sends a part that was not asked for"
    found = response.headers.get("Content-Range") or "none"
    match = re.fullmatch(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15}|\*)", found.strip())
    if match is None or int(match[1]) != have:
        return f"it sends a Content-Range of {found!r}"
    total, known = match[3], before.size
    if total != "*" and int(total) != int(match[2]) + 1:
        return f"it sends a Content-Range of {found!r}, which is not all of the rest"
    if known is not None and (int(match[2]) + 1 != known or announced.size not in (None, known)):
        return f"it sends a Content-Range of {found!r} of a file of {known:,} bytes"
    etag = response.headers.get("ETag")
    if etag is not None and etag != before.etag:
        return f"it sends the ETag {etag!r}, not {before.etag!r}"
    if announced.md5 != before.md5 and None not in (announced.md5, before.md5):
        return "it announces another MD5"
    return None


def _together(announced: _Announced, before: _Announced | None) -> _Announced:
    """What two answers about the same version of a file say of it."""
    if before is None:
        return announced
    return _Announced(announced.size or before.size, announced.md5 or before.md5, before.etag)


def _strong(etag: Any) -> str | None:
    """An ETag that stands for the very bytes of a file (RFC 9110): other ones, such as W/"1", cannot be resumed by."""
    return etag if isinstance(etag, str) and re.fullmatch(r'"[!#-~]*"', etag) else None


def _md5(headers: Any) -> str | None:
    """The MD5 in Google's `x-goog-hash: crc32c=...,md5=BASE64`, in one header or several; None where none is valid."""
    for value in headers.get_all("x-goog-hash", []):
        for item in value.split(","):
            kind, _, digest = item.strip().partition("=")
            if kind == "md5":
                with contextlib.suppress(binascii.Error, ValueError):
                    decoded = base64.b64decode(digest, validate=True)
                    return decoded.hex() if len(decoded) == 16 else None
    return None


def _verify(published: Published, part: _Part, announced: _Announced) -> None:
    """Raises FetchError where the file is not what the server announced, or else not what its name promises."""
    url = published.url
    if announced.md5 is not None:
        with open(part.path, "rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != announced.md5:
            raise FetchError(
                f"{url} has MD5 {md5}, not {announced.md5} as announced; nothing of it was kept, fetch it again"
            )
        return
    try:
        if other := formats.recognize(part.path):
            raise FetchError(f"what {url} sends {other.partition(';')[0]}; {NOTHING_KEPT}")
        architecture, arrays = weights.read(part.path)
        for _ in arrays:
            pass
    except WeightsError as error:
        reason = str(error).removesuffix(f"; {weights.AGAIN}").replace(f"{part.path} ", "it ")
        raise FetchError(f"what {url} sends is not {published.promised}: {reason}; {NOTHING_KEPT}") from None
    if architecture != published.promised:
        raise FetchError(f"{url} sends {architecture}, not {published.promised} as its name promises; {NOTHING_KEPT}")
    print(
        printable(f"{url} announces no MD5; instead the file was read whole as {architecture}, and its CRC-32s hold"),
        file=sys.stderr,
    )


@contextlib.contextmanager
def _progress(name: str, have: int, size: int | None):
    """Yields a function of the bytes arrived so far."""
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task("fetch", total=size, completed=have)
        yield lambda arrived: progress.update(task, completed=arrived)


def _list(text: Annotated[str, tyro.conf.Positional] = "") -> None:
    """Lists the published files whose name contains TEXT."""
    cache = None
    with contextlib.suppress(RequestError):  # without one, nothing is in it
        cache = cache_dir()
    for each in ZOO.values():
        if text in each.name:
            kept = "  (in the cache)" if cache is not None and os.path.exists(cache / each.path) else ""
            size = f"{each.architecture:7} {each.num_classes:>6} classes"
            print(f"{each.name:44} {size}  {each.url}{kept}")


def _fetch(name: Annotated[str, tyro.conf.Positional]) -> None:
    """Fetches a published file into the cache and prints where it is."""
    print(printable(find(name)))


def main() -> None:
    tyro.extras.subcommand_cli_from_dict({"list": _list, "fetch": _fetch}, description=__doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
