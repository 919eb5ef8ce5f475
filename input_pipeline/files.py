"""Files that are written whole or not at all, JSON files, and paths as people type them."""

import contextlib
import dataclasses
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from input_pipeline.errors import RequestError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that gets `path`'s name once it is complete and on disk; after an error nothing of it remains.
    Folders that are missing on the way to it are made.

    A symbolic link stays, and the file that it leads to is replaced. What is no file, such as /dev/null or a pipe, is
    written to as it is: to replace it, as root can, would take it away from everybody.
    """
    if is_stream(path):
        with open(path, "wb") as stream:
            yield stream
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Yields a path in an empty folder. What is written there, a file or directory of `path`'s name and others beside
    it, takes the places of those names beside `path` once all of it is complete and on disk; after an error everything
    there is as it was.

    A symbolic link stays, and what it leads to is replaced. The folder lies in a directory that is removed in the end.

    Raises:
        RequestError: the operating system refuses.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    new, old = temporary / "new", temporary / "old"
    try:
        try:
            for folder in (temporary, new, old):
                folder.mkdir()
            yield new / path.name
            for file in (file for file in new.rglob("*") if file.is_file()):
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
            _exchange(new, old, path.parent)
            shutil.rmtree(old)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            with contextlib.suppress(OSError):  # what could not be put back is kept
                old.rmdir()
            with contextlib.suppress(OSError):
                temporary.rmdir()
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}; mend that and start again") from None


def _exchange(new: Path, old: Path, folder: Path) -> None:
    """Moves what is in `new` to `folder`, and what has the same names there to `old` before: all of it or nothing."""
    names = sorted(os.listdir(new), reverse=True)  # a name with a suffix more first: without it the other is of no use
    there = [name for name in reversed(names) if os.path.lexists(folder / name)]
    if len(names) == 1 and not (folder / names[0]).is_dir():
        there = []  # a file is replaced in one step
    moves = [(folder / name, old / name) for name in there] + [(new / name, folder / name) for name in names]
    with contextlib.ExitStack() as undo:
        for source, target in moves:
            os.replace(source, target)
            undo.callback(os.replace, target, source)
        undo.pop_all()


def is_stream(path: Path) -> bool:
    """Whether something that is neither a file nor a directory has this path."""
    return path.exists() and not path.is_file() and not path.is_dir()


def writable(path: Path) -> None:
    """Tries to write where a file will be written later, and leaves nothing there.

    Raises:
        RequestError: nothing can be written there; it is better to know at the start than after an hour.
    """
    if path.is_dir():
        raise RequestError(f"{path} is a directory, and a file is to be written there; give another path")
    if is_stream(path):  # to open a pipe would wait for its reader
        if not os.access(path, os.W_OK):
            raise RequestError(f"{path} cannot be written (Permission denied); give another path")
        return
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(_Tried), replacing(path):
            raise _Tried
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}); give another path") from None
    finally:
        for parent in made:  # nothing stays behind if the work is refused or fails
            with contextlib.suppress(OSError):
                parent.rmdir()


class _Tried(Exception):
    """Ends the attempt to write before the file is put in its place."""


def is_unfinished(path: Path, name: str) -> bool:
    """Whether `path` is a temporary file for `name` that a process left when it was killed within `replacing`."""
    return re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{8}}\.tmp", path.name) is not None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; see `json_text`."""
    with replacing(path) as file:
        file.write((json_text(content, indent=2) + "\n").encode())


def json_text(content: Any, indent: int | None = None) -> str:
    """Returns JSON that every reader takes: NaN and infinities, which JSON does not have, become null, and other values
    that it cannot express, such as paths, become text."""
    try:
        return json.dumps(content, indent=indent, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(content), indent=indent, default=str, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def end_line(path: Path) -> None:
    """Ends the last line of a file of lines, if a process was killed, or the disk was full, in the middle of it. A file
    that does not exist stays so."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")


class DamagedFile(RequestError):
    """A file could be read, but its content is not what this program writes."""


def parse_json(text: bytes | str, kind: type, name: object, remedy: str) -> Any:
    """Returns the value in a JSON text, which must be of `kind`.

    Args:
        text: the text; bytes are UTF-8.
        kind: the Python type that the outermost value must have, such as `dict`.
        name: the text's name in the message.
        remedy: the message's last clause: what the reader can do.

    Raises:
        DamagedFile: the text is not UTF-8, not JSON, nested too deeply, or another kind of value.
    """
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are both ValueErrors
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise DamagedFile(f"{name} is damaged ({reason}); {remedy}") from None
    if not isinstance(value, kind):
        raise DamagedFile(f"{name} is damaged (it holds a {type(value).__name__}, not a {kind.__name__}); {remedy}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that can be shown: not NaN, no whole number beyond all floats."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_json(path: Path, kind: type, remedy: str) -> Any:
    """Returns the value in a JSON file; see `parse_json`.

    Raises:
        DamagedFile: the file could be read, but its content is wrong.
        RequestError: the file cannot be read; the message says why, and its advice does not risk losing the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise RequestError(f"cannot read {path}: it is no regular file; {remedy}")
        text = path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}; mend that and start again") from None
    return parse_json(text, kind, path, remedy)


def is_url(text: str) -> bool:
    """Whether the text begins with a scheme, such as `https://` or `gs://`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text) is not None


@dataclasses.dataclass(frozen=True)
class Url:
    """The address of something that is not on a disk of this machine, such as `s3://bucket/run`."""

    text: str

    def __str__(self) -> str:
        return self.text


def place(text: str | os.PathLike) -> Path | Url:
    """Returns the path or the URL that a person typed; a slash at the end of a URL does not matter.

    Raises:
        RequestError: the URL names nothing behind its scheme, or the home directory is not known.
    """
    typed = os.fspath(text)
    if not is_url(typed):
        return user_path(typed)
    if not typed.partition(":")[2].strip("/"):
        raise RequestError(f"{typed} names nothing; write the bucket and a folder in it, such as s3://BUCKET/RUN")
    return Url(typed.rstrip("/"))


def user_path(text: str | os.PathLike) -> Path:
    """Returns the path that a person typed, with `~` and `~user` expanded.

    Raises:
        RequestError: the text is a URL, or the home directory is not known.
    """
    typed = os.fspath(text)
    if is_url(typed):
        raise RequestError(f"{typed} is a URL, and a path on this machine is needed; mount or copy it first")
    try:
        return Path(typed).expanduser()
    except RuntimeError:  # a uid without an entry in /etc/passwd, and no $HOME
        raise RequestError(f"{typed} names a home directory that is not known here; write the whole path") from None
