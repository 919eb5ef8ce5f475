"""Claims on directories: a file in the directory names host, process and time, so that a second writer is refused.

Claims work on shared disks without locks. On the machine that made it, a claim is alive as long as its process. From
any other machine or container it is watched: the owner writes a new number into the file every few seconds, and if
the number stands still for `PATIENCE` seconds the owner is taken for dead. No clocks are compared.
"""

import contextlib
import json
import os
import platform
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from input_pipeline.errors import RequestError
from input_pipeline.terminal import printable

CLAIM = ".owner.json"  # the claim of a whole directory
BEAT = 5.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without a sign of life after which an owner on another machine is taken for dead
LOST = 2  # readings in a row with another owner after which the claim is lost
ABANDONED = 60.0  # seconds after which a `.removing` directory is stale; long, because this compares two clocks
UNKNOWN: dict[str, Any] = {"host": "?", "process": 0, "since": "?", "command": "?"}


class InUse(RequestError):
    """Another process owns the directory or file; the message names it."""


@contextlib.contextmanager
def claimed(
    claim: Path,
    name: object,
    remedy: str,
    *,
    wait: bool = False,
    lost: Callable[[str], None] | None = None,
    patience: float = PATIENCE,
) -> Iterator[None]:
    """Holds the claim while the `with` block runs, and removes it afterwards.

    Args:
        claim: the claim's file, such as DIRECTORY / `CLAIM`; its directory exists.
        name: the name of what is owned, for messages.
        remedy: the last clause of the refusal: what the reader can do instead of waiting.
        wait: whether to wait until the owner ends instead of refusing.
        lost: function that is called with a sentence, in a thread, if another process took the claim because this one
            showed no sign of life; by default it ends the process with exit code 1, so that no two processes write.
        patience: seconds to watch an owner on another machine.

    Raises:
        InUse: another process, which is alive, owns the claim.
        OSError: the claim cannot be written.
    """
    token = secrets.token_hex(8)
    file = _acquire(claim, token, name, remedy, wait, patience)
    try:
        with kept(token, lambda: _read(claim), lambda beat: _write(file, token, beat), name, lost):
            yield
    finally:
        os.close(file)
        if (_read(claim) or {}).get("token") == token:
            claim.unlink(missing_ok=True)


@contextlib.contextmanager
def kept(
    token: str,
    read: Callable[[], dict[str, Any] | None],
    write: Callable[[int], object],
    name: object,
    lost: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Gives signs of life for a claim while the `with` block runs, wherever the claim lies.

    Args:
        token: the claim's token.
        read: function that returns the content of the claim that holds now, or None if there is none.
        write: function that writes the claim with the number of a sign of life.
        name, lost: see `claimed`.
    """
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(token, read, write, ended, name, lost or _end), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()


def _acquire(claim: Path, token: str, name: object, remedy: str, wait: bool, patience: float) -> int:
    """Makes this process's claim and returns its open file."""
    announced = False
    while True:
        try:
            file = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        except FileExistsError:
            owner = _read(claim)
            if owner is None:  # it has just ended
                continue
            if not is_alive(owner, lambda: _read(claim), claim.parent, patience):
                _remove(claim, owner)
            elif wait or owner["host"] == "?":  # a claim that was just being written says in a moment whose it is
                if wait and not announced:
                    print(f"waiting for process {owner['process']}, which owns {printable(name)}", file=sys.stderr)
                announced = True
                time.sleep(0.1)
            else:
                raise in_use(owner, name, remedy) from None
        else:
            try:
                _write(file, token, 0)
            except OSError:
                os.close(file)
                claim.unlink(missing_ok=True)
                raise
            return file


def in_use(owner: dict[str, Any], name: object, remedy: str) -> InUse:
    """Returns the refusal that names the owner of a claim."""
    return InUse(
        f"{name} is in use by process {owner['process']} on {owner['host']} since {owner['since']} "
        f"({owner['command']}); wait for its end, or {remedy}"
    )


def text_of(token: str, beat: int) -> bytes:
    """Returns the text of this process's claim, of the same length at every sign of life."""
    content = {
        "token": token,
        "beat": f"{beat:012d}",
        "host": platform.node(),
        "machine": _machine(),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "since": _SINCE,
        "command": shlex.join(sys.argv)[:200],
    }
    return (json.dumps(content) + "\n").encode()


def content_of(text: bytes) -> dict[str, Any]:
    """Returns the content of a claim. If its text cannot be read as one, the owner is `UNKNOWN` and the text serves as
    its beat."""
    try:
        return UNKNOWN | {"token": "", "beat": "", "machine": "", "started": ""} | json.loads(text)
    except (ValueError, TypeError):  # the claim is just being written, or damaged
        return UNKNOWN | {"token": text.hex(), "beat": text.hex(), "machine": "", "started": ""}


def _write(file: int, token: str, beat: int) -> None:
    """Writes the claim's text over the one before, so that nobody reads it half old and half new."""
    os.pwrite(file, text_of(token, beat), 0)
    os.fsync(file)


def _read(claim: Path) -> dict[str, Any] | None:
    """Returns the content of a claim, or None if there is no claim."""
    try:
        return content_of(claim.read_bytes())
    except FileNotFoundError:
        return None


def is_alive(
    owner: dict[str, Any], read: Callable[[], dict[str, Any] | None], place: object, patience: float = PATIENCE
) -> bool:
    """Whether the owner of a claim is alive, or the claim has changed hands. An owner on another machine is watched.

    Args:
        owner: the content of the claim.
        read: function that returns the content of the claim that holds now, or None if there is none.
        place: what is claimed, for a sentence about the waiting.
        patience: seconds to watch an owner on another machine.
    """
    if owner["machine"] == _machine():
        return _started(owner["process"]) == owner["started"]
    until = time.monotonic() + patience
    announced = False
    while time.monotonic() < until:
        now = read()
        if now is None or now["token"] != owner["token"] or now["beat"] != owner["beat"]:
            return True
        if not announced and owner["host"] != "?":
            print(
                f"{printable(place)} is claimed by process {owner['process']} on {printable(owner['host'])}; "
                f"watching for {patience:.0f} s whether that is alive",
                file=sys.stderr,
            )
            announced = True
        time.sleep(min(BEAT / 10, patience / 10))
    return False


def _remove(claim: Path, owner: dict[str, Any]) -> None:
    """Removes a dead owner's claim, even while another process tries to do the same."""
    removing = claim.with_name(f"{claim.name}.removing")  # only its maker removes: the claim is still the one it read
    try:
        removing.mkdir()
    except FileExistsError:
        time.sleep(0.1)
        with contextlib.suppress(OSError):  # its claimant was killed in the instant between
            if time.time() - removing.stat().st_mtime > ABANDONED:
                removing.rmdir()
        return
    try:
        if (_read(claim) or {}).get("token") == owner["token"]:
            claim.unlink()
    finally:
        removing.rmdir()


def _beat(
    token: str,
    read: Callable[[], dict[str, Any] | None],
    write: Callable[[int], object],
    ended: threading.Event,
    name: object,
    lost: Callable[[str], None],
) -> None:
    count, gone = 0, 0
    while not ended.wait(BEAT):
        count += 1
        try:
            owner = read()
            gone = gone + 1 if (owner or {}).get("token") != token else 0
            if gone >= LOST:
                by = f"process {owner['process']} on {owner['host']}" if owner else "somebody who removed its claim"
                return lost(f"{name} was taken over by {by}; this process ends and writes no more")
            if not gone:
                write(count)
        except (OSError, RequestError):  # a disk or a store that does not answer now may do so at the next beat
            continue


def _end(sentence: str) -> None:
    sys.stderr.write(f"error: {sentence}\n")
    sys.stderr.flush()
    os._exit(1)


def _machine() -> str:
    """Identifies the machine, its boot and the container: where all three are equal, process numbers are comparable."""
    parts = [platform.node()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            parts.append(read())
    return " ".join(parts)


def _started(process: int) -> str:
    """Returns the start time of a process, in the system's own unit; empty if the process has ended."""
    try:
        # The start is the 22nd field. The second is the program's name in parentheses, which may contain anything.
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else fields[18]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return ""
    except OSError:
        return ""
    with contextlib.suppress(psutil.Error):  # no /proc: not Linux
        return str(psutil.Process(process).create_time())
    return ""


_SINCE = time.strftime("%Y-%m-%d %H:%M:%S")
