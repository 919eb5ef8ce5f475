"""An account of every second since a run first started: which of it trained, and where the rest went.

The name is from Google's ML Goodput Measurement: the share of the time that made progress which was kept. Here nothing
is sampled or estimated but the time of training up to a step that has no line of its own, as where a run continues
from a copy on a local disk; it is interpolated between the lines around it. What a killed start did after its last line
counts as `DOWN`.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bit_jax.accounts import starts
from bit_jax.accounts.starts import LOST_HOST, STALLED, Line
from bit_jax.accounts.timeline import OTHER, STARTING

KEPT, LOST = "training that counts", "training done again"
DOWN, STILL = "not running", "standing still"
# {activity of `Timeline`: what the account calls it}; an activity that is not here is `OTHER`
NAMES = {
    STARTING: "starting",
    "joining": "waiting for hosts",
    "compilation": "compilation",
    "initial parameters": "initial parameters",
    "restore": "restore",
    "steps": KEPT,
    "dispatch": KEPT,
    "reading": KEPT,
    "input": "waiting for input",
    "evaluation": "evaluation",
    "evaluation before training": "evaluation",
    "saving": "saving",
    "watching": "watching",
}
ROWS = (*dict.fromkeys(NAMES.values()), LOST, STILL, DOWN, OTHER)


@dataclasses.dataclass(frozen=True)
class Account:
    """Where the time went, over all starts.

    Attributes:
        starts: the last line of each start.
        seconds: {row of `ROWS`: seconds}; their sum is the time from the first start's beginning to the last line.
        figures: FlagPerf's figures over all starts; see `_figures`.
    """

    starts: tuple[Line, ...]
    seconds: dict[str, float]
    figures: dict[str, float | None]

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time in which training made progress that was kept."""
        return self.seconds[KEPT] / self.wall if self.wall else 0.0

    def described(self) -> dict[str, Any]:
        """Returns what result.json says of it."""
        return {
            "goodput": self.goodput,
            "seconds": {row: seconds for row, seconds in self.seconds.items() if seconds},
            "starts": len(self.starts),
            **self.figures,
        }


def read(path: Path) -> Account | None:
    """Returns the account of the run whose starts.jsonl this is, or None if the file has no whole line.

    Raises:
        OSError: the file cannot be read.
    """
    lines = starts.read(path)
    return of(lines) if lines else None


def of(lines: Sequence[Sequence[Line]]) -> Account:
    """Returns the account of starts, of which there is at least one, given the lines of each, in order."""
    seconds = _seconds(lines)
    return Account(tuple(start[-1] for start in lines), seconds, _figures(lines, seconds))


def _seconds(lines: Sequence[Sequence[Line]]) -> dict[str, float]:
    seconds = dict.fromkeys(ROWS, 0.0)
    for index, start in enumerate(lines):
        last = start[-1]
        for activity, taken in last.seconds.items():
            seconds[NAMES.get(activity, OTHER)] += taken
        if _stood_still(last):
            seconds[NAMES.get(last.activity, OTHER)] -= last.since
            seconds[STILL] += last.since
        lost = _training(last) - _kept(start, lines[index + 1 :])
        seconds[KEPT] -= lost
        seconds[LOST] += lost
    for start, following in itertools.pairwise(lines):
        # less than 0 where the time of day was set back between them, or differs between their hosts
        seconds[DOWN] += max(following[0].began - start[-1].began - start[-1].elapsed, 0.0)
    return seconds


def _training(line: Line) -> float:
    """Returns the seconds of training up to a line, with those that are lost, and without those in which a start stood
    still before its end."""
    still = line.since if _stood_still(line) and NAMES.get(line.activity) == KEPT else 0.0
    return sum(taken for activity, taken in line.seconds.items() if NAMES.get(activity) == KEPT) - still


def _stood_still(line: Line) -> bool:
    """Whether a start ended because it hung or a host was lost, so that its last activity was in vain."""
    return line.ended in (LOST_HOST, STALLED)


def _kept(start: Sequence[Line], later: Sequence[Sequence[Line]]) -> float:
    """Returns the seconds of a start's training up to the step that every later start continued from or after."""
    continued = [line.start for following in later for line in following if line.start is not None]
    points = [(line.step, _training(line)) for line in start if line.start is not None]
    kept, whole = min(continued, default=math.inf), _training(start[-1])
    if not points or kept > points[-1][0]:  # it is the last, or the next found a step that is in none of its lines
        return whole
    before, trained_before = start[-1].start or 0, 0.0
    for step, trained in points:
        if step >= kept:
            share = (kept - before) / (step - before) if step > before else 1.0
            # lines that were written while a dead host was awaited count that as training
            return min(max(trained_before + (trained - trained_before) * share, 0.0), whole)
        before, trained_before = step, trained
    raise AssertionError("a step at or after the kept one is in the last line")


def _figures(lines: Sequence[Sequence[Line]], seconds: dict[str, float]) -> dict[str, float | None]:
    """Returns FlagPerf's figures over all starts: seconds, and images/s of the images whose training counts.

    The clock of raw_train_time and of p_whole starts where training first began and does not stop before its end, so
    starting again, compiling again and the time between two starts are in it. p_train leaves out evaluations; p_core
    also leaves out waiting for input.
    """
    wall = sum(seconds.values())
    first = next((index for index, start in enumerate(lines) if start[-1].trains is not None), None)
    if first is None:
        return {"e2e_time": wall, "raw_train_time": None, "p_whole": None, "p_train": None, "p_core": None}
    # what was before the clock starts: earlier starts, which never came to train, and the beginning of this one
    began = next(line for line in lines[first] if line.trains is not None)
    earlier, up_to = _seconds(lines[:first]), _seconds(lines[: first + 1])
    raw = wall - (sum(up_to.values()) - sum(lines[first][-1].seconds.values()) + (began.trains or 0.0))
    evaluation = seconds["evaluation"] - earlier["evaluation"] - began.seconds.get("evaluation before training", 0.0)
    if (last := lines[-1][-1]).trained is not None:
        raw -= last.elapsed - last.trained
    spans = {"p_whole": raw, "p_train": raw - evaluation, "p_core": raw - evaluation - seconds["waiting for input"]}
    # a newest start that does not know yet, or never learned, from where it continues has changed nothing
    known = [line for start in lines for line in start if line.start is not None]
    images = (known[-1].step - min(line.start or 0 for line in known)) * known[-1].global_batch if known else 0
    return {"e2e_time": wall, "raw_train_time": raw} | {
        name: images / span if images > 0 and span > 0 else None for name, span in spans.items()
    }
