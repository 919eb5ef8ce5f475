"""Reads what a server's answer says of a file: its size, MD5 and version, none of them believed unchecked."""

import base64
import binascii
import contextlib
import dataclasses
import http
import re
from typing import Any

from bit_jax.published.errors import MIRROR, FetchError


@dataclasses.dataclass(frozen=True)
class Announced:
    """A server says this of a whole file; None where it does not."""

    size: int | None  # bytes
    md5: str | None  # hexadecimal
    etag: str | None  # of this version, in its quotation marks; None where it does not stand for the very bytes


def announced(url: str, response: Any, have: int) -> Announced:
    """Reads what an answer's headers say of the whole file, of which `have` bytes were here earlier.

    Raises:
        FetchError: the Content-Length is not a number of bytes.
    """
    headers, size = response.headers, None
    length = headers.get("Content-Length")
    if length is not None:
        if not re.fullmatch(r"[0-9]{1,15}", length.strip()):
            raise FetchError(f"{url} announces a Content-Length of {length!r}; {MIRROR}")
        size = int(length) + (have if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0)
    return Announced(size, _md5(headers), strong_etag(headers.get("ETag")))


def why_not_the_rest(response: Any, now: Announced, have: int, earlier: Announced | None) -> str | None:
    """Says why an answer 206 is not what was asked for, the bytes from `have` on of the same version of the file.

    Returns None where it is.
    """
    if earlier is None:
        return "it sends a part that was not asked for"
    content_range = response.headers.get("Content-Range") or "none"
    match = re.fullmatch(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15}|\*)", content_range.strip())
    if match is None or int(match[1]) != have:
        return f"it sends a Content-Range of {content_range!r}"
    total, known = match[3], earlier.size
    if total != "*" and int(total) != int(match[2]) + 1:
        return f"it sends a Content-Range of {content_range!r}, which is not all of the rest"
    if known is not None and (int(match[2]) + 1 != known or now.size not in (None, known)):
        return f"it sends a Content-Range of {content_range!r} of a file of {known:,} bytes"
    etag = response.headers.get("ETag")
    if etag is not None and etag != earlier.etag:
        return f"it sends the ETag {etag!r}, not {earlier.etag!r}"
    if now.md5 != earlier.md5 and None not in (now.md5, earlier.md5):
        return "it announces another MD5"
    return None


def combined(now: Announced, earlier: Announced | None) -> Announced:
    """Combines what two answers say about the same version of a file."""
    if earlier is None:
        return now
    return Announced(now.size or earlier.size, now.md5 or earlier.md5, earlier.etag)


def strong_etag(etag: Any) -> str | None:
    """Returns an ETag that stands for the very bytes of a file (RFC 9110), else None.

    By other ones, such as W/"1", a download cannot be resumed.
    """
    return etag if isinstance(etag, str) and re.fullmatch(r'"[!#-~]*"', etag) else None


def _md5(headers: Any) -> str | None:
    """Finds the MD5 in Google's `x-goog-hash: crc32c=...,md5=BASE64`, which may be one header or several.

    Returns None where none is valid.
    """
    for value in headers.get_all("x-goog-hash", []):
        for item in value.split(","):
            kind, _, digest = item.strip().partition("=")
            if kind == "md5":
                with contextlib.suppress(binascii.Error, ValueError):
                    decoded = base64.b64decode(digest, validate=True)
                    return decoded.hex() if len(decoded) == 16 else None
    return None
