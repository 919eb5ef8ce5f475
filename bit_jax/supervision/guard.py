"""The process beside a host: it starts the host when told to, passes signals on to it, and kills it once nobody is left
who could.

It runs on the host's machine, and `machines.Guard` holds the other ends of its pipes, through ssh if that machine is
another one. It needs nothing but Python's standard library, and says and is told, in lines:

    it writes   ready PORT                                         the machine answers; the port is free there
    it reads    {"command": [...], "environment": {...}, "folder": "..."}
    it reads    signal NUMBER                                      as often as one is sent to the host

From then on its output is the host's, and it ends with the host's exit code, or 128 plus the number of the signal that
killed the host. When its input ends, because the supervisor has closed it, has died, or is cut off, it kills the host.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading

from bit_jax.supervision.command import free_port

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent dies


def main() -> int:
    print(f"ready {free_port()}", flush=True)
    line = sys.stdin.readline()
    if not line:  # this machine is not needed
        return 0
    told = json.loads(line)
    try:
        host = subprocess.Popen(
            told["command"],
            cwd=told["folder"],
            env=os.environ | told["environment"],
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=_die_with_parent,
        )
    except OSError as error:
        print(f"error: cannot run {told['command'][0]}: {error.strerror}; mend that and start again", file=sys.stderr)
        return 2
    threading.Thread(target=_obey, args=(host,), daemon=True).start()
    code = host.wait()
    return code if code >= 0 else 128 - code


def _obey(host: subprocess.Popen) -> None:
    """Sends the host the signals that come, and kills it and what it has started when none can come any more."""
    for line in sys.stdin:
        host.send_signal(int(line.removeprefix("signal ")))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(host.pid, signal.SIGKILL)


def _die_with_parent() -> None:
    """Has Linux kill this process when the guard itself is killed; elsewhere the host would live on."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread still reads the input
