"""The process beside a host: it starts the host when told to, passes signals on to it, and kills it if the host stands
still, and once nobody is left who could.

It runs on the host's machine, and `machines.Guard` holds the other ends of its pipes, through ssh if that machine is
another one. It needs nothing but Python's standard library, and says and is told, in lines:

    it writes   ready PORT                                         the machine answers; the port is free there
    it reads    {"command": [...], "environment": {...}, "folder": "...", "silence": SECONDS}
    it reads    signal NUMBER                                      as often as one is sent to the host

From then on its output is the host's, and it ends with the host's exit code, or 128 plus the number of the signal that
killed the host. When its input ends, because the supervisor has closed it, has died, or is cut off, it kills the host.

The host may give signs that it runs (`process/signs.py`). If it has begun to, and gives none for so many seconds, it is
stopped or hangs with Python's lock; it is killed, and the guard ends with exit code `SILENT`. A program that gives no
signs may be silent for as long as it likes; no silence (0) is for a command that starts hosts elsewhere.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

from bit_jax.process.signs import TRACES, VARIABLE
from bit_jax.process.stillness import BEAT, Stillness
from bit_jax.supervision.command import free_port

SILENT = 254  # the exit code after a silence: no signal has that number, and ssh itself ends with 255
TRACING = 2.0  # seconds for the host to write where its threads stand
DYING = 5.0  # seconds after which a process that was killed is held by the system, as by a disk that does not answer
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies


def main() -> int:
    print(f"ready {free_port()}", flush=True)
    line = sys.stdin.readline()
    if not line:  # this machine is not needed
        return 0
    told = json.loads(line)
    os.environ.pop(VARIABLE, None)  # of a guard that has started this one
    signs, silent = None, threading.Event()
    if told["silence"]:
        with contextlib.suppress(OSError):  # a disk without room for the file
            signs = tempfile.NamedTemporaryFile(prefix="bit-jax-signs-")  # noqa: SIM115 (it is there until the end)
    try:
        host = subprocess.Popen(
            told["command"],
            cwd=told["folder"],
            env=os.environ | told["environment"] | ({} if signs is None else {VARIABLE: signs.name}),
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_die_with_parent,
        )
    except OSError as error:
        print(f"error: cannot run {told['command'][0]}: {error.strerror}; mend that and start again", file=sys.stderr)
        return 2
    threading.Thread(target=_obey, args=(host,), daemon=True).start()
    if signs is not None:
        threading.Thread(target=_watch, args=(host, signs.fileno(), told["silence"], silent), daemon=True).start()
    code = host.wait()
    if signs is not None:
        signs.close()
    if silent.is_set():
        return SILENT
    return code if code >= 0 else 128 - code


def _obey(host: subprocess.Popen) -> None:
    """Sends the host the signals that come, and kills it and what it has started when none can come any more."""
    for line in sys.stdin:
        host.send_signal(int(line.removeprefix("signal ")))
    _kill(host)


def _kill(host: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(host.pid, signal.SIGKILL)


def _watch(host: subprocess.Popen, signs: int, silence: float, silent: threading.Event) -> None:
    """Kills the host once the process that touches the file `signs` has not done so for more than `silence` seconds,
    and says so. First that process is asked where its threads stand, which it cannot say if it is stopped."""
    process = _silent_process(signs, silence)
    silent.set()
    print(f"launch: process {process} has given no sign of life for {silence:g} s, and is killed", file=sys.stderr)
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.kill(process, TRACES)
        time.sleep(TRACING)
    _kill(host)
    time.sleep(DYING)
    os._exit(SILENT)  # `main` has not: the host cannot even be killed


def _silent_process(signs: int, silence: float) -> int:
    """Returns the number of the process that gives signs, once it has given none for more than `silence` seconds."""
    still = Stillness()
    while True:
        time.sleep(BEAT)
        process, touched = _signing(signs)
        if still((process, touched)) > silence and process and _lives(process):
            return process


def _signing(signs: int) -> tuple[int, int]:
    """Returns the number of the process that gives signs, 0 if none does, and when it last did."""
    text = os.pread(signs, 20, 0)
    return int(text) if text.isdigit() else 0, os.fstat(signs).st_mtime_ns


def _lives(process: int) -> bool:
    """Whether there is a process of that number, which may be a part of a host that goes on without it."""
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def _die_with_parent() -> None:
    """Has Linux kill this process when the guard itself is killed; elsewhere the host would live on."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread still reads the input
