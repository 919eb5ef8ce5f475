"""WORKDIR/starts.jsonl: what each start of a run did with its time, so far.

Each line is the whole account of one start up to a moment; a later line of the same start replaces it, except that the
lines in between say how much time the training up to their steps had taken. Host 0 writes them: where a checkpoint is
saved, at the end, and every `BEAT` seconds, after an hour and a half every 500th part of the time. So much of the time
of a start that was killed may be missing. A line that was cut off, as by a full disk, is left out when the file is
read.
"""

import dataclasses
import functools
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from bit_jax.accounts.timeline import Timeline
from bit_jax.process.reporter import Reporter
from input_pipeline.errors import RequestError, RunFailed, Stopped
from input_pipeline.files import DamagedFile, end_line, is_number, parse_json

NAME = "starts.jsonl"
BEAT = 10.0  # seconds between two lines
LINES = 500  # later, lines are written every 500th part of the time: a month has about three thousand
LATEST = 253402300799  # the last second of the year 9999; what is later cannot be shown as a date
LOST_HOST = "lost host"
STALLED = "stalled"  # nothing went on for too long
ENDS = ("finished", "stopped", "failed", "refused", LOST_HOST, STALLED, "defect")


@dataclasses.dataclass(frozen=True)
class Line:
    """The account of a start up to a moment.

    Attributes:
        began: when its process began, in seconds since 1970; it tells one start from another.
        elapsed: seconds since then; the sum of `seconds`.
        seconds: {activity: seconds in which it was the innermost one}.
        activity, since: the innermost activity, and the seconds since it began or last went on.
        hosts, devices, global_batch: numbers of hosts and devices, and of examples in a step.
        start: the step that it continues from, or None as long as that is not known.
        step: the last finished step.
        trains, trained: seconds from `began` to the beginning of training, and to its end, or None before.
        ended: one of `ENDS`, or None while it runs, or where it was killed.
        why: the sentence that it ended with.
    """

    began: float
    elapsed: float
    seconds: dict[str, float]
    activity: str
    since: float
    hosts: int
    devices: int
    global_batch: int
    start: int | None = None
    step: int = 0
    trains: float | None = None
    trained: float | None = None
    ended: str | None = None
    why: str = ""


class Start:
    """Writes the lines of this start. A disk that is full or stuck neither ends nor blocks the run; as each line is the
    whole account, nothing is missing once the disk takes lines again.

    Args:
        path: the file, to which lines are appended; None: nothing is written, as on all hosts but the first.
        timeline: this process's time since it began.
        hosts, devices, global_batch: see `Line`.
        after: function that is called once the last line is written, on all hosts; the process may be about to end
            abruptly.

    Attributes:
        earlier: the lines of the starts before, as `read` returns them; None if they cannot be read.
        step: the last finished step.
        failure: why the newest line could not be written; empty if it was.
    """

    def __init__(
        self,
        path: Path | None,
        timeline: Timeline,
        *,
        hosts: int,
        devices: int,
        global_batch: int,
        after: Callable[[], object] = lambda: None,
    ):
        self.step = 0
        self._continued: int | None = None
        self._path, self._timeline = path, timeline
        self._constant = {"hosts": hosts, "devices": devices, "global_batch": global_batch}
        self._began = time.time() - timeline.elapsed
        self.earlier = _earlier(path)
        self.failure = ""
        self._written = 0.0  # seconds from the beginning to the last line
        self._ended, self._lock, self._after = threading.Event(), threading.RLock(), after
        self._reporter = Reporter("starts")

    @property
    def steps(self) -> int:
        """Number of steps that this start has finished."""
        return 0 if self._continued is None else self.step - self._continued

    def __enter__(self) -> "Start":
        if self._path is not None:
            self.mark()
            threading.Thread(target=self._beat, name="starts", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.end(_end_of(error), "" if error is None else (str(error).splitlines() or [type(error).__name__])[0])

    def mark(self, **more: Any) -> None:
        """Writes a line of the time so far, unless the last one is written."""
        with self._lock:
            if self._path is None or (self._ended.is_set() and not more):
                return
            line = self.line(**more)
            self._written = line.elapsed
            text = json.dumps(dataclasses.asdict(line)) + "\n"
            self._reporter(functools.partial(self._append, text))

    def continues_from(self, step: int) -> None:
        """Enters the step that the run continues from."""
        self._continued = self.step = step
        self.mark()

    def end(self, ended: str, why: str) -> None:
        """Writes the last line, and waits until it is written."""
        with self._lock:
            if not self._ended.is_set():
                self._ended.set()
                self.mark(ended=ended, why=why)
        self._reporter.close()
        self._after()

    def line(self, **more: Any) -> Line:
        """Returns the account so far."""
        seconds, activity, since = self._timeline.own()
        trains, took = self._timeline.began.get("whole"), self._timeline.seconds.get("whole")
        return Line(
            began=self._began,
            elapsed=sum(seconds.values()),
            seconds=seconds,
            activity=activity,
            since=since,
            start=self._continued,
            step=self.step,
            trains=trains,
            trained=None if trains is None or took is None else trains + took,
            **self._constant,
            **more,
        )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            elapsed = self._timeline.elapsed
            if elapsed - self._written >= elapsed / LINES:
                self.mark()

    def _append(self, text: str) -> None:
        assert self._path is not None
        try:
            end_line(self._path)  # which a start before, or a disk that was full, may have left without an end
            with open(self._path, "a") as file:
                file.write(text)
            self.failure = ""
        except OSError as error:
            self.failure = error.strerror or type(error).__name__


def _end_of(error: BaseException | None) -> str:
    """Returns which of `ENDS` an exception is."""
    kinds: tuple[tuple[type, str], ...] = ((Stopped, "stopped"), (RunFailed, "failed"), (RequestError, "refused"))
    if error is None:
        return "finished"
    return next((end for kind, end in kinds if isinstance(error, kind)), "defect")


def _earlier(path: Path | None) -> list[list[Line]] | None:
    try:
        return read(path) if path is not None and path.exists() else []
    except OSError:
        return None


def read(path: Path) -> list[list[Line]]:
    """Returns the lines of each start, without those that are damaged. The starts are in the order of their first
    lines, which is that in which they began even where the time of day was set back, or differs between hosts.

    Raises:
        OSError: the file cannot be read.
    """
    starts: dict[float, list[Line]] = {}
    for text in path.read_bytes().splitlines():
        if (line := _parsed(text, path)) is not None:
            starts.setdefault(line.began, []).append(line)
    return list(starts.values())


def _parsed(text: bytes, path: Path) -> Line | None:
    """Returns a line, or None if it is damaged."""
    try:
        line = Line(**parse_json(text, dict, path, ""))
    except (DamagedFile, TypeError):
        return None
    optional = [value for value in (line.start, line.trains, line.trained) if value is not None]
    if not isinstance(line.seconds, dict) or not isinstance(line.activity, str) or not isinstance(line.why, str):
        return None
    numbers = (line.began, line.elapsed, line.since, line.hosts, line.devices, line.global_batch, line.step, *optional)
    if not all(is_number(value) for value in (*numbers, *line.seconds.values())) or line.ended not in (None, *ENDS):
        return None
    adds_up = math.isclose(sum(line.seconds.values()), line.elapsed, rel_tol=1e-6, abs_tol=1e-3)
    return line if adds_up and abs(line.began) <= LATEST and line.elapsed >= 0 else None
