"""Fetches a published file into the cache: one process claims it, downloads it, verifies it, and only then names it."""

import hashlib
import os
import sys
import time
from pathlib import Path

from bit_jax.formats import recognize, weights
from bit_jax.formats.official import AGAIN
from bit_jax.formats.weights import WeightsError
from bit_jax.published.catalogue import PublishedFile, base_url
from bit_jax.published.download import Part, download
from bit_jax.published.errors import MIRROR, NOTHING_KEPT, Dropped, FetchError
from bit_jax.published.headers import Announced
from input_pipeline.claims import CLAIM, claimed
from input_pipeline.errors import RequestError
from input_pipeline.files import replacing, user_path
from input_pipeline.terminal import printable

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before a dropped connection is tried again; after the last we give up


def cache_dir() -> Path:
    """Returns where fetched files are kept: $BIT_JAX_CACHE, or bit_jax below the user's cache directory.

    It may not exist yet.

    Raises:
        RequestError: the home directory is not known, as for a user number without an account.
    """
    if own := os.environ.get("BIT_JAX_CACHE"):
        return user_path(own)
    try:
        return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bit_jax"
    except RequestError as error:
        raise RequestError(f"no cache directory ({error}); set BIT_JAX_CACHE to one that you can write to") from None


def fetch(file: PublishedFile) -> Path:
    """Returns the file in the cache, fetched unless it is there.

    A partial download is resumed. The file gets its name only when it is verified: against the MD5 that the server
    announces, which is then kept beside it (NAME.npz.md5, as `md5sum -c` reads it), or, where none is announced, by
    reading it whole as the weights that its name promises.

    Raises:
        FetchError: the server cannot be reached, does not have the file, or sends something else.
        RequestError: there is no cache directory.
    """
    target = cache_dir() / file.path
    try:
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        claim = target.with_name(f".{target.name}{CLAIM}")
        with claimed(claim, f"the download of {file.name}", "set BIT_JAX_CACHE elsewhere", wait=True):
            if not target.exists():  # another process may just have fetched it
                _download_and_verify(file, target)
    except OSError as error:
        raise FetchError(
            f"cannot write {error.filename or target} ({error.strerror}); free space or set BIT_JAX_CACHE elsewhere"
        ) from None
    return target


def _download_and_verify(file: PublishedFile, target: Path) -> None:
    part = Part(target)
    announced = _download_with_retries(file, part)
    try:
        _verify(file, part, announced)
    except FetchError:
        part.discard()  # nothing in it can be trusted, so nothing of it can be resumed
        raise
    checksum = target.with_name(target.name + ".md5")
    if announced.md5 is None:
        checksum.unlink(missing_ok=True)  # an earlier file's
    else:
        with replacing(checksum) as line:
            line.write(f"{announced.md5}  {target.name}\n".encode())
    part.keep()


def _download_with_retries(file: PublishedFile, part: Part) -> Announced:
    """Downloads, again after each of the `PAUSES` where the connection drops."""
    url = file.url
    if not url.startswith(("https://", "http://")):
        raise RequestError(f"BIT_JAX_MIRROR {base_url()} is no http address; for a directory, set BIT_JAX_CACHE to it")
    for pause in PAUSES:
        try:
            return download(url, part, file.limit)
        except Dropped:
            time.sleep(pause)
    try:
        return download(url, part, file.limit)
    except Dropped as dropped:
        raise FetchError(
            f"cannot fetch {url} ({dropped}); fetch it elsewhere and put it at {part.target}, {MIRROR}, "
            "or start again later: what has arrived and can be trusted is kept"
        ) from None


def _verify(file: PublishedFile, part: Part, announced: Announced) -> None:
    """Raises FetchError where the file is not what the server announced, or else not what its name promises."""
    url = file.url
    if announced.md5 is not None:
        with open(part.path, "rb") as content:
            md5 = hashlib.file_digest(content, "md5").hexdigest()
        if md5 != announced.md5:
            raise FetchError(
                f"{url} has MD5 {md5}, not {announced.md5} as announced; nothing of it was kept, fetch it again"
            )
        return
    try:
        if other := recognize.recognize(part.path):
            raise FetchError(f"what {url} sends {other.partition(';')[0]}; {NOTHING_KEPT}")
        architecture, arrays = weights.read(part.path)
        for _ in arrays:
            pass
    except WeightsError as error:
        reason = str(error).removesuffix(f"; {AGAIN}").replace(f"{part.path} ", "it ")
        raise FetchError(f"what {url} sends is not {file.promised}: {reason}; {NOTHING_KEPT}") from None
    if architecture != file.promised:
        raise FetchError(f"{url} sends {architecture}, not {file.promised} as its name promises; {NOTHING_KEPT}")
    print(
        printable(f"{url} announces no MD5; instead the file was read whole as {architecture}, and its CRC-32s hold"),
        file=sys.stderr,
    )
