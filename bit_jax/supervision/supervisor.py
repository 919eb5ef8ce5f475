"""Starts a command as several hosts, and again on the hosts that are left, until it has finished or is given up."""

import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from bit_jax.supervision import command as commands
from bit_jax.supervision.causes import REFUSED, Cause, End, cause_of
from bit_jax.supervision.machines import Ended, Guard, Machine, Ready
from bit_jax.supervision.records import RunFolder
from bit_jax.supervision.sizes import Sizes
from input_pipeline import exits
from input_pipeline.errors import RunFailed, Stopped
from input_pipeline.terminal import printable

ANSWERS = 60.0  # seconds in which a machine answers, or is taken to be away


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be run, where, and how often.

    Attributes:
        command: the command, without the flags that tell hosts apart.
        machines: where a host can run, one on each; the first that answer are taken.
        hosts: number of hosts.
        min_hosts: number of hosts with which the run may go on.
        devices: devices of each host; None if it takes all that it sees.
        port: port of host 0 in the first start, and the next one in each further start; None: a free one.
        restarts: number of starts after the first.
        back_off, back_off_limit: seconds before the second start; twice as many before each further one without
            progress between, up to the limit.
        grace: seconds that hosts have to end after the first one has, before they are killed.
        silence: seconds without a sign of life after which a host that has given some is killed; 0: it is not.
        as_it_is: whether the command starts the hosts itself, like srun; it is run once, and no flags are added.
    """

    command: list[str]
    machines: tuple[Machine, ...]
    hosts: int
    min_hosts: int
    devices: int | None = None
    port: int | None = None
    restarts: int = 0
    back_off: float = 5.0
    back_off_limit: float = 300.0
    grace: float = 90.0
    silence: float = 120.0
    as_it_is: bool = False


@dataclasses.dataclass(frozen=True)
class Start:
    """A start that has failed: when it began, on how many hosts, the step that it reached if that is known, and why it
    ended."""

    began: str
    hosts: int
    step: int | None
    cause: Cause


def supervise(wanted: Wanted) -> int:
    """Runs the command until it has finished, and returns its exit code: 0, or 2 if its request was refused, or that of
    its end by a signal, which is passed on to all hosts.

    Raises:
        RunFailed: it is given up; what ended each start stands on standard error.
        Stopped: a signal came while no host was running.
    """
    return Supervisor(wanted).run()


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A signal of this number has asked this process to end."""

    number: int


class Supervisor:
    """The starts of one command. All that happens comes through one queue, which a signal's handler may write to."""

    def __init__(self, wanted: Wanted):
        self.wanted = wanted
        self.folder = RunFolder(commands.flag(wanted.command, "--workdir"))
        self.failed: list[Start] = []
        self._events: SimpleQueue[Ready | Ended | _Asked] = SimpleQueue()
        self._asked = 0

    def run(self) -> int:
        """See `supervise`."""
        for number in exits.ASKING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, _: self._events.put(_Asked(number)))
        while True:
            began, length = time.strftime("%Y-%m-%d %H:%M:%S"), self.folder.length()
            ends, cause = self._start()
            if self._asked:
                return next((end.code for end in ends if end.code), 0)
            record = self.folder.last_start(length)
            cause = cause or cause_of(ends, record)
            if cause is None:
                return 0
            self.failed.append(Start(began, len(ends), None if record is None else record.step, cause))
            if cause.fault == "request":
                say(f"{cause.sentence}: the request is wrong, and would be at every start")
                return REFUSED
            self._give_up_if_due()
            self._wait(seconds_before_next(self.failed, self.wanted.back_off, self.wanted.back_off_limit))

    def _give_up_if_due(self) -> None:
        """Raises RunFailed if the last start was the last one that is allowed, or its fault has come twice."""
        last, restarts = self.failed[-1], self.wanted.restarts
        if has_returned(self.failed):
            where = "" if last.step is None else f" after step {last.step}"
            reason = f"a fault of the run's own has returned{where}, and would return again: {last.cause.sentence}"
        elif len(self.failed) > restarts:
            after = f" after {restarts} restart{'s' if restarts > 1 else ''}" if restarts else ""
            reason = f"given up{after}: {last.cause.sentence}"
        else:
            return
        if len(self.failed) > 1:
            for line in table(self.failed):
                say(line)
        raise RunFailed(reason)

    def _wait(self, seconds: float) -> None:
        """Says what ended the last start, and returns when the next one is due."""
        last = self.failed[-1]
        where = "" if last.step is None else f" after step {last.step}"
        number = f"restart {len(self.failed)} of {self.wanted.restarts}"
        say(f"start {len(self.failed)} ended{where}: {last.cause.sentence}; {number} is in {seconds:g} s")
        until = time.monotonic() + seconds
        while self._next(until) is not None:
            if self._asked:
                raise Stopped(self._asked, "ended by a signal before the next start; the same command continues")

    def _next(self, until: float) -> Ready | Ended | _Asked | None:
        """Returns the next thing that happens; None if that is nothing until then, by `time.monotonic`."""
        try:
            event = self._events.get(timeout=max(until - time.monotonic(), 0))
        except Empty:
            return None
        if isinstance(event, _Asked):
            self._asked = self._asked or event.number
        return event

    def _start(self) -> tuple[list[End], Cause | None]:
        """Starts the hosts once, and returns how they ended, the first one first; or a cause why none was started."""
        guards = [Guard(machine, self._events) for machine in self.wanted.machines]
        try:
            ready, away = self._answering(guards)
            if self._asked:
                raise Stopped(self._asked, "ended by a signal before the hosts were started")
            chosen = self._choice(ready)
            if isinstance(chosen, Cause):
                return [], chosen if not away else dataclasses.replace(
                    chosen, sentence=f"{chosen.sentence}; {'; '.join(away)}"
                )
            if self.failed or away:
                say(self._description(chosen, away))
            self._run(chosen)
            return self._ends(chosen), None
        finally:
            for guard in guards:
                guard.let_go()
            for guard in guards:
                guard.end()

    def _answering(self, guards: Sequence[Guard]) -> tuple[list[Guard], list[str]]:
        """Returns the guards whose machines answer, and a sentence on each of the others. It does not wait for spare
        machines."""
        until = time.monotonic() + ANSWERS
        waiting = set(guards)
        while waiting and not self._asked:
            event = self._next(until)
            if event is None:
                break
            if isinstance(event, Ready | Ended):
                waiting.discard(event.guard)
            if sum(guard.port is not None and guard.code is None for guard in guards) == self.wanted.hosts:
                break
        ready = [guard for guard in guards if guard.port is not None and guard.code is None]
        return ready, [
            f"{guard.machine.name or 'this machine'} does not answer"
            + ("" if guard.code is None else f" (exit code {guard.code})")
            for guard in guards
            if guard not in ready and len(ready) < self.wanted.hosts
        ]

    def _choice(self, ready: Sequence[Guard]) -> list[Guard] | Cause:
        """Returns the guards to run the hosts with, or why there are too few of them.

        A run begins on all hosts: with fewer, --batch-per-device would make another global batch.
        """
        wanted, available = self.wanted, min(len(ready), self.wanted.hosts)
        begins = commands.trains(wanted.command) and self.folder.config() is None
        at_least = wanted.hosts if begins else wanted.min_hosts
        if available < at_least:
            why = "a run begins on all of them" if begins else f"--min-hosts is {at_least}"
            return Cause("machine", f"{available} of {wanted.hosts} hosts can be started, and {why}")
        if wanted.as_it_is:
            return list(ready)
        sizes = Sizes.of(wanted.command, wanted.devices)
        number = sizes.largest(available, at_least)
        if number is None:
            return Cause(
                "machine",
                f"{available} hosts can be started, but their devices do not divide the run's global batch of "
                f"{sizes.global_batch} as its --mesh and --microbatches ask for, and no smaller number from {at_least} "
                "does",
            )
        return list(ready[:number])

    def _description(self, chosen: Sequence[Guard], away: Sequence[str]) -> str:
        names = [guard.machine.name for guard in chosen if guard.machine.name]
        hosts = f"{len(chosen)} host{'s' if len(chosen) > 1 else ''}{': ' if names else ''}{', '.join(names)}"
        where = "" if self.wanted.as_it_is else f" is on {hosts}"
        return "; ".join([f"start {len(self.failed) + 1}{where}", *away])

    def _run(self, chosen: Sequence[Guard]) -> None:
        """Has each of the guards start its host."""
        wanted, first = self.wanted, chosen[0]
        port = first.port if wanted.port is None else wanted.port + len(self.failed)
        for host, guard in enumerate(chosen):
            place = 0 if guard.machine.name else host
            guard.run(
                commands.runnable(wanted.command)
                if wanted.as_it_is
                else commands.of_host(wanted.command, f"{first.machine.address}:{port}", len(chosen), host),
                {} if wanted.devices is None else commands.environment(place, wanted.devices),
                0.0 if wanted.as_it_is else wanted.silence,  # whose signs of life they were would not be known
            )

    def _ends(self, chosen: Sequence[Guard]) -> list[End]:
        """Returns how the hosts ended, once all have. Signals are passed on to them. Those that have not ended so many
        seconds after the first failure are killed."""
        names = {guard: self._name(host, guard) for host, guard in enumerate(chosen)}
        ends: list[End] = []
        until = float("inf")
        while len(ends) < len(chosen):
            event = self._next(min(until, time.monotonic() + 3600))
            if isinstance(event, _Asked):
                for guard in chosen:
                    guard.send(event.number)
            elif isinstance(event, Ended) and event.guard in names:
                guard = event.guard
                end = End(names.pop(guard), guard.code or 0, far=bool(guard.machine.name), silent=guard.silent)
                ends.append(end)
                if end.code and until == float("inf"):
                    until = time.monotonic() + self.wanted.grace
                    if names and end.lost and not self._asked:
                        say(f"{end.lost}; the other hosts have {self.wanted.grace:g} s to end")
            elif event is None and time.monotonic() >= until:
                for guard, name in names.items():
                    say(f"{name} has not ended in {self.wanted.grace:g} s and is killed")
                    guard.let_go()
                for guard, name in names.items():
                    guard.end()
                    ends.append(End(name, 128 + signal.SIGKILL, far=bool(guard.machine.name), killed=True))
                names.clear()
        return ends

    def _name(self, host: int, guard: Guard) -> str:
        if self.wanted.as_it_is:
            return "the command"
        return f"host {host}{' on ' if guard.machine.name else ''}{guard.machine.name}"


def seconds_before_next(failed: Sequence[Start], back_off: float, limit: float) -> float:
    """Returns how long to wait before the next start: twice as long after each start that reached no higher step than
    all before it did, up to the limit."""
    best, seconds = -1, back_off / 2
    for start in failed:
        progress = start.step is not None and start.step > best
        seconds = back_off if progress and start is not failed[0] else min(2 * seconds, limit)
        best = max(best, -1 if start.step is None else start.step)
    return min(seconds, limit)


def has_returned(failed: Sequence[Start]) -> bool:
    """Whether the last start ended by the same fault of the run's own, after the same step, as one before it."""
    *before, last = failed
    return last.cause.fault == "run" and any(
        (start.cause.fault, start.cause.kind, start.step) == ("run", last.cause.kind, last.step) for start in before
    )


def table(failed: Sequence[Start]) -> list[str]:
    """Returns a line for each start, below a line of titles."""
    rows = [("start", "began", "hosts", "step", "cause")]
    for number, start in enumerate(failed, 1):
        step = "?" if start.step is None else str(start.step)
        rows.append((str(number), start.began, str(start.hosts), step, start.cause.sentence))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows]


def say(sentence: str) -> None:
    """Writes a sentence to standard error, which the hosts write to as well."""
    print(f"launch: {printable(sentence)}", file=sys.stderr, flush=True)
