"""The machines that hosts run on, each behind a guard: the same on this machine and, through ssh, on another."""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from queue import SimpleQueue

from bit_jax.supervision.guard import SILENT

GUARD = "bit_jax.supervision.guard"
CARRIED = ("JAX_", "XLA_", "NCCL_", "GLOO_", "PYTHON")  # beginnings of the variables that go to other machines too
PATIENCE = 5.0  # seconds for a guard to kill its host, and for the last output to arrive


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine that a host can run on.

    Attributes:
        name: its name or address, with USER@ before it if need be; empty for this machine.
        rsh: the words that run a command there, before the name; ssh's.
    """

    name: str = ""
    rsh: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """The address at which other machines reach it."""
        return self.name.rpartition("@")[2] or "127.0.0.1"

    def running_guard(self) -> list[str]:
        """Returns the command line that runs the guard there, with the same Python from the same folder as here."""
        guard = [sys.executable, "-m", GUARD]
        if not self.name:
            return guard
        carried = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(CARRIED)]
        return [*self.rsh, self.name, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *carried, *guard])}"]


@dataclasses.dataclass(frozen=True, eq=False)
class Ready:
    """A machine answers."""

    guard: "Guard"


@dataclasses.dataclass(frozen=True, eq=False)
class Ended:
    """A guard, and with it its host, has ended."""

    guard: "Guard"


class Guard:
    """The near end of a guard. What happens to it is put into `events`: `Ready` at most once, and `Ended` once.

    Attributes:
        machine: where it runs.
        port: a free port there, once it is ready; before, None.
        code: exit code of the host, or 128 plus a signal's number, once it has ended; that of ssh if ssh failed.
        silent: whether the guard has killed the host because it gave no sign of life any more.
    """

    def __init__(self, machine: Machine, events: SimpleQueue):
        self.machine = machine
        self.port: int | None = None
        self.code: int | None = None
        self.silent = False
        self._events = events
        self._process = subprocess.Popen(
            machine.running_guard(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C is for the supervisor, which passes it on
        )
        self._output = threading.Thread(target=self._listen, name="output of a host", daemon=True)
        self._output.start()
        threading.Thread(target=self._wait, name="end of a host", daemon=True).start()

    def run(self, command: list[str], environment: dict[str, str], silence: float) -> None:
        """Starts the host, which is killed if it has given signs of life and gives none for `silence` seconds; 0: it is
        not."""
        told = {"command": command, "environment": environment, "folder": os.getcwd(), "silence": silence}
        self._write(json.dumps(told))

    def send(self, number: int) -> None:
        """Sends the host a signal."""
        self._write(f"signal {int(number)}")

    def let_go(self) -> None:
        """Has the guard kill its host, if that runs, and end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def end(self) -> None:
        """Kills the host if it runs, and returns once the guard has ended."""
        self.let_go()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:  # the guard is frozen too, or its machine cut off
            self._process.kill()
        self._output.join(PATIENCE)

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, and `Ended` says so
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output, contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            for line in output:
                if self.port is not None:
                    sys.stdout.buffer.write(line)  # whole lines, because several hosts may print
                    sys.stdout.buffer.flush()
                elif match := re.fullmatch(rb"ready (\d+)\n", line):  # a login shell may greet first
                    self.port = int(match[1])
                    self._events.put(Ready(self))

    def _wait(self) -> None:
        code = self._process.wait()
        self._output.join(PATIENCE)
        self.silent = code == SILENT
        self.code = 128 + signal.SIGKILL if self.silent else code if code >= 0 else 128 - code
        self._events.put(Ended(self))
