"""Downloads over a connection that may drop: what has arrived is kept, and only the rest is asked for."""

import contextlib
import dataclasses
import http
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bit_jax.published.errors import MIRROR, NOTHING_KEPT, Dropped, FetchError
from bit_jax.published.headers import Announced, announced, combined, strong_etag, why_not_the_rest
from input_pipeline.files import DamagedFile, read_json, write_json
from input_pipeline.terminal import console

TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """The file as far as it has arrived, and beside it what was announced of the whole."""

    target: Path

    @property
    def path(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def note(self) -> Path:
        return self.target.with_name(self.target.name + ".part.json")

    def resumable(self) -> tuple[int, Announced | None]:
        """Returns the number of bytes that are there, and what was announced of the whole.

        Returns (0, None) where it is not known which file they are a part of.
        """
        if self.path.exists() and self.note.exists():
            with contextlib.suppress(DamagedFile, TypeError):
                noted = Announced(**read_json(self.note, dict, "it is not used"))
                if strong_etag(noted.etag) and isinstance(noted.size, int | None):
                    return self.path.stat().st_size, noted
        return 0, None

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def keep(self) -> None:
        """Gives the file its name."""
        os.replace(self.path, self.target)
        self.note.unlink(missing_ok=True)


def download(url: str, part: Part, limit: int) -> Announced:
    """Appends what `part` lacks of the file, and returns what the server says of the whole.

    Raises:
        Dropped: it could not be had this time; what is kept in `part` is a beginning of the file.
        FetchError: the server does not have it, or sends what cannot be it.
    """
    have, earlier = part.resumable()
    if earlier is not None and have == earlier.size:
        return earlier
    request = urllib.request.Request(url)
    if earlier is not None and earlier.etag is not None:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", earlier.etag)
    with _opened(request, part) as response:
        now = announced(url, response, have)
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            if reason := why_not_the_rest(response, now, have, earlier):
                part.discard()
                raise Dropped(f"it was asked for the rest from byte {have} on, and {reason}")
            now = combined(now, earlier)
        elif response.status == http.HTTPStatus.OK:
            part.discard()
            have = 0
        else:
            raise FetchError(f"{url} answers {response.status}; {MIRROR}")
        if now.size is not None and now.size > limit:
            part.discard()
            raise FetchError(f"{url} announces {now.size:,} bytes, {_too_long(limit)}")
        if now.etag:
            write_json(part.note, dataclasses.asdict(now))
        with open(part.path, "ab") as file, _progress(part.target.name, have, now.size) as advance:
            while chunk := _next_chunk(response):
                file.write(chunk)
                have += len(chunk)
                advance(have)
                if have > limit:
                    part.discard()
                    raise FetchError(f"{url} sends more than {have - 1:,} bytes, {_too_long(limit)}")
            file.flush()
            os.fsync(file.fileno())
    if now.size not in (None, have):
        if have > now.size:
            part.discard()
        raise Dropped(f"{have:,} of {now.size:,} bytes arrived")
    return now


def _too_long(limit: int) -> str:
    return f"and no such file has more than {limit:,}; {NOTHING_KEPT}"


def _opened(request: urllib.request.Request, part: Part) -> Any:
    """Returns the server's answer, or raises as `download` does."""
    url = request.full_url
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and request.has_header("Range"):
            part.discard()  # longer than the file, or all of it without our knowing: start over
            raise Dropped("there is less of it than had arrived") from None
        answer = f"{error.code} {' '.join(str(error.reason).split())}"
        if error.code >= 500:
            raise Dropped(f"it answers {answer}") from None
        raise FetchError(f"{url} answers {answer}; {MIRROR}, or put the file at {part.target}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host's name that cannot be
        raise Dropped(str(getattr(error, "reason", None) or error or type(error).__name__)) from None


def _next_chunk(response: Any) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: the length of a chunk
        raise Dropped(str(error) or type(error).__name__) from None


@contextlib.contextmanager
def _progress(name: str, have: int, size: int | None) -> Iterator[Callable[[int], None]]:
    """Shows a bar, and yields a function that is told how many bytes have arrived so far."""
    columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task("fetch", total=size, completed=have)
        yield lambda arrived: progress.update(task, completed=arrived)
