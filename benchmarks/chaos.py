"""Disturbs training for some minutes, at random moments, and compares the result with an undisturbed run's.

    python benchmarks/chaos.py --minutes 10

Two runs are disturbed, for a quarter and for three quarters of the time, under `python -m bit_jax.launch --restarts`:
one of one host with one device, which has to end with the same bytes as if it had been left alone, and one of three
hosts, which has to end within 1e-10 of it, in float64, on whatever hosts were left. As root, the three hosts have a
network namespace each, so that their cables can be cut.

Disturbances: a host is killed; a host is frozen, until the launcher kills it; a host's cable is cut for a while; a
host's disk is full; one device's copy of a parameter loses a bit. The last one must be found before it is saved. The
program also checks that every second of the run is accounted for.
"""

import contextlib
import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
from rich.table import Table

from bit_jax.accounts import goodput, starts
from bit_jax.accounts.goodput import Account
from input_pipeline import terminal
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.exits import exit_code
from input_pipeline.files import write_json
from input_pipeline.flags import UserPath, require_positive

ROOT = Path(__file__).parent.parent
PROGRAM = "benchmarks/flipped/train.py"
FLIP = signal.SIGRTMIN  # has it flip a bit
HOST_TIMEOUT = 10  # seconds without a sign of life
CALM = (5.0, 20.0)  # seconds of progress between two disturbances
CUT = 1.6 * HOST_TIMEOUT  # seconds without a cable
RUN = (
    "digits --precision fp64 --resize-to 36 --crop 32 --global-batch 12 --mixup 0.3 --warmup-steps 5 --log-every 1 "
    f"--eval-every 50 --checkpoint-every 10 --host-timeout {HOST_TIMEOUT}"
).split()
LIMIT = 1e-10  # largest difference of a parameter between runs on different meshes, in float64
TRIAL = 40  # steps from which the speed is measured


@dataclasses.dataclass(frozen=True)
class Arguments:
    minutes: float = 10.0
    """Minutes in which the two runs are disturbed, in all. The undisturbed runs take about as long again."""
    seed: int = 0
    """Seed of the moments and kinds of the disturbances."""
    json: UserPath | None = None
    """File that receives the result as JSON, too."""


@dataclasses.dataclass
class Place:
    """A host's place: this machine, or a network namespace with an address and a cable of its own."""

    address: str = ""
    namespace: str = ""
    link: str = ""
    up: bool = True

    def cable(self, up: bool) -> None:
        """Cuts the cable, or mends it."""
        self.up = up
        _ip(f"link set {self.link} {'up' if up else 'down'}")


def main(arguments: Arguments) -> None:
    require_positive({"--minutes": arguments.minutes})
    began, spans = time.time(), {"one host": 15 * arguments.minutes, "three hosts": 45 * arguments.minutes}
    console = terminal.console(width=140)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, places(3) as three:
        work = Path(folder)
        rate = undisturbed(work / "trial", TRIAL)[1]
        steps = max(int(0.6 * rate * spans["one host"]), TRIAL)
        console.print(f"{rate:.1f} steps/s alone; {steps} steps")
        alone, _ = undisturbed(work / "alone", steps)
        found = {}
        for name, where in {"one host": [Place()], "three hosts": three}.items():
            disturbing = Disturbing(random.Random(arguments.seed), where, work / name.replace(" ", "-"))
            found[name] = disturbing.run(steps, spans[name])
            found[name]["difference"] = difference(alone, disturbing.workdir)
            show(console, name, found[name])
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "when": time.strftime("%Y-%m-%d %H:%M", time.gmtime(began)),
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "steps": steps,
        "runs": found,
    }
    if arguments.json is not None:
        write_json(arguments.json, result)
    wrong = [f"{name}: {sentence}" for name, run in found.items() for sentence in complaints(name, run)]
    if wrong:
        raise RunFailed("; ".join(wrong))


def complaints(name: str, run: dict[str, Any]) -> list[str]:
    """Returns what is wrong with a disturbed run; nothing, if it is as it has to be."""
    limit = 0.0 if name == "one host" else LIMIT
    said = []
    if not run["difference"] <= limit:
        said.append(f"its parameters differ by {run['difference']:.1e}, more than {limit:.0e}")
    if run["unaccounted"] > 1.0 or run["beyond"] > 1.0:
        said.append(f"{run['unaccounted']:.1f} s are not accounted for, {run['beyond']:.1f} s twice")
    return said


def undisturbed(workdir: Path, steps: int) -> tuple[Path, float]:
    """Trains on one device, and returns the work directory and the steps a second."""
    command = [sys.executable, "train.py", *RUN, *_length(steps), "--workdir", str(workdir)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=_environment())
    result = json.loads((workdir / "result.json").read_text())
    return workdir, steps / result["train_seconds"]


def difference(one: Path, other: Path) -> float:
    """Returns the largest difference between the parameters of two runs; 0 only if the files' bytes are the same."""
    first, second = one / "final.npz", other / "final.npz"
    if first.read_bytes() == second.read_bytes():
        return 0.0
    arrays, others = dict(np.load(first)), dict(np.load(second))
    largest = max(float(np.abs(arrays[key] - others[key]).max(initial=0.0)) for key in arrays)
    return max(largest, float(np.finfo(np.float64).tiny))  # the bytes differ, so they are not equal


class Disturbing:
    """A run and what happens to it.

    Args:
        chance: source of the moments and kinds.
        places: a place for each host.
        workdir: the run's work directory.
    """

    def __init__(self, chance: random.Random, places: list[Place], workdir: Path):
        self.workdir = workdir
        self._chance, self._places = chance, places
        self._said: list[str] = []
        self._done: Counter[str] = Counter()
        self._mending: list[threading.Timer] = []
        kinds: dict[str, Callable[[psutil.Process], None]] = {"kill": _kill, "disk": self._fill_disk}
        if len(places) > 1:
            kinds |= {"freeze": _freeze, "flip": self._flip}
            if places[0].namespace:
                kinds["cut"] = self._cut
        self._kinds = kinds

    def run(self, steps: int, seconds: float) -> dict[str, Any]:
        """Trains, disturbed for so many seconds and then left alone, and returns what came of it.

        Raises:
            RunFailed: the launcher gave the run up.
        """
        began = time.time()
        hosts = len(self._places)
        command = [sys.executable, "-m", "bit_jax.launch", "--hosts", str(hosts), "--devices", "1"]
        command += ["--restarts", "1000", "--min-hosts", str(max(hosts - 1, 1))]
        command += ["--back-off", "0.5", "--back-off-limit", "2", "--grace", str(2 * HOST_TIMEOUT)]
        if self._places[0].namespace:
            command += ["--on", *(place.address for place in self._places), "--rsh", str(self._rsh())]
        command += ["--", PROGRAM, *RUN, *_length(steps), "--workdir", str(self.workdir)]
        pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=ROOT, env=_environment(), **pipes) as launcher:
            listener = threading.Thread(target=self._listen, args=(launcher.stderr,), daemon=True)
            listener.start()
            try:
                self._disturb(launcher, time.monotonic() + seconds)
                for timer in self._mending:  # one that came later would find no namespaces
                    timer.cancel()
                for place in self._places:
                    if not place.up:
                        place.cable(True)
                code = launcher.wait()
            finally:
                launcher.terminate()
        listener.join()
        if code != 0:
            raise RunFailed("the launcher ended with exit code " + str(code) + ": " + "\n".join(self._said[-20:]))
        account = goodput.read(self.workdir / starts.NAME)
        assert account is not None
        return self._result(account, time.time() - began)

    def _result(self, account: Account, seconds: float) -> dict[str, Any]:
        """Returns the account, and how far it is from the seconds that the launcher ran."""
        return {
            "disturbances": dict(self._done),
            "seconds": seconds,
            "over_all_starts": account.described(),
            "ends": dict(Counter(line.ended or "no word of it" for line in account.starts)),
            "hosts": dict(Counter(str(line.hosts) for line in account.starts)),
            # the account begins where the first process does, and ends before the last one does
            "unaccounted": max(seconds - account.wall - _starting(account), 0.0),
            "beyond": max(account.wall - seconds, 0.0),
            # one whose host is killed or cut off before the next checkpoint is lost with it, and named by nobody
            "flips_named": sum("which all should hold alike" in line.why for line in account.starts),
        }

    def _disturb(self, launcher: subprocess.Popen, until: float) -> None:
        """Disturbs the run again and again, each time after some seconds of progress."""
        before, kinds = self._step(), []
        while launcher.poll() is None and time.monotonic() < until:
            if self._step() <= before:
                time.sleep(0.05)
                continue
            time.sleep(self._chance.uniform(*CALM))
            before = self._step()
            if processes := self._hosts(launcher):
                kinds = kinds or self._chance.sample(sorted(self._kinds), len(self._kinds))  # each once, in any order
                kind = kinds.pop()
                with contextlib.suppress(psutil.Error):
                    self._kinds[kind](self._chance.choice(processes))
                    self._done[kind] += 1
                    print(f"{kind} after step {before}", file=sys.stderr, flush=True)

    def _step(self) -> int:
        """Returns the last step that is known to have been taken."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return json.loads((self.workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return 0

    def _hosts(self, launcher: subprocess.Popen) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(launcher.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = process.cmdline()
                    if PROGRAM in words and "--host" in words and "-m" not in words:
                        found.append(process)
        return found

    def _cut(self, _: psutil.Process) -> None:
        """Cuts a host's cable, and mends it a while later."""
        place = self._chance.choice([place for place in self._places if place.up])
        place.cable(False)
        self._mending.append(threading.Timer(CUT, place.cable, (True,)))
        self._mending[-1].start()

    def _flip(self, process: psutil.Process) -> None:
        process.send_signal(FLIP)

    def _fill_disk(self, process: psutil.Process) -> None:
        """Lets the host write no byte more."""
        subprocess.run(["prlimit", "--pid", str(process.pid), "--fsize=0"], check=True)

    def _listen(self, stream: Any) -> None:
        for line in stream:
            self._said.append(line.rstrip())

    def _rsh(self) -> Path:
        """Returns a script that runs a command in the namespace of an address, as ssh does on a machine; not while its
        cable is cut."""
        script = self.workdir.with_suffix(".rsh")
        cases = "\n".join(
            f"{place.address}) ip link show {place.link} | grep -q 'state UP' || exit 255; "
            f'exec ip netns exec {place.namespace} sh -c "$2";;'
            for place in self._places
        )
        script.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}\n*) exit 255;;\nesac\n')
        script.chmod(0o755)
        return script


def _kill(process: psutil.Process) -> None:
    process.kill()


def _freeze(process: psutil.Process) -> None:
    process.suspend()


def _starting(account: Account) -> float:
    """Returns the seconds between the launcher's start and its end that belong to no process of the run: the launcher's
    own start and its guards, and the end of the last process."""
    return 6.0 + account.starts[0].seconds.get("starting", 0.0)


def _length(steps: int) -> list[str]:
    return ["--steps", str(steps), "--decay-steps", str(max(steps // 2, 6)), str(max(steps * 3 // 4, 7))]


def _environment() -> dict[str, str]:
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def places(count: int) -> Iterator[list[Place]]:
    """Yields so many places: as root, network namespaces on a bridge; else all on this machine, without cables."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        print("not root, or no iproute2: no cable is cut", file=sys.stderr)
        yield [Place() for _ in range(count)]
        return
    bridge = f"chaos{os.getpid() % 100000}"
    made = [Place(f"10.78.0.{number + 1}", f"{bridge}n{number}", f"{bridge}v{number}"[:15]) for number in range(count)]
    try:
        _ip(f"link add {bridge} type bridge")
        _ip(f"link set {bridge} up")
        for place in made:
            _ip(f"netns add {place.namespace}")
            _ip(f"link add {place.link} type veth peer name eth0 netns {place.namespace}")
            _ip(f"link set {place.link} master {bridge}")
            _ip(f"link set {place.link} up")
            _ip(f"-n {place.namespace} address add {place.address}/24 dev eth0")
            for device in ("lo", "eth0"):
                _ip(f"-n {place.namespace} link set {device} up")
        yield made
    finally:
        for place in made:
            subprocess.run(["ip", "netns", "delete", place.namespace], capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


def _ip(line: str) -> None:
    done = subprocess.run(["ip", *line.split()], capture_output=True, text=True)
    if done.returncode:
        raise RequestError(f"ip {line}: {done.stderr.strip()}; start it without root to do without cut cables")


def show(console: Any, name: str, run: dict[str, Any]) -> None:
    """Prints a run's disturbances and its account."""
    table = Table(title=f"{name}: parameters differ by {run['difference']:.1e}")
    for column in ("", "s", "share"):
        table.add_column(column, justify="left" if not column else "right")
    account = run["over_all_starts"]
    for row, seconds in account["seconds"].items():
        table.add_row(row, f"{seconds:,.1f}", f"{seconds / account['e2e_time']:.1%}")
    console.print(table)
    counts = ", ".join(f"{kind} {count}" for kind, count in sorted(run["disturbances"].items()))
    console.print(
        f"disturbed: {counts}; wrong bits named: {run['flips_named']}; {account['starts']} starts; "
        f"goodput {account['goodput']:.1%}"
    )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(tyro.cli(Arguments, description=__doc__))))
