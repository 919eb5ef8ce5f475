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
        seconds: {row of `ROWS`: seconds}; their sum is the wall clock from the first start's beginning.
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
        return self.seconds[KEPT] / self.wall

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
    """Returns the account of starts, of which there is at least one, given the lines of each."""
    seconds = dict.fromkeys(ROWS, 0.0)
    for index, start in enumerate(lines):
        last = start[-1]
        for activity, taken in last.seconds.items():
            seconds[NAMES.get(activity, OTHER)] += taken
        if _stood_still(last):
            seconds[NAMES.get(last.activity, OTHER)] -= last.since
            seconds[STILL] += last.since
        lost = _trained(start) - _kept(start, lines[index + 1 :])
        seconds[KEPT] -= lost
        seconds[LOST] += lost
    for start, following in itertools.pairwise(lines):
        seconds[DOWN] += max(following[0].began - start[-1].began - start[-1].elapsed, 0.0)
    return Account(tuple(start[-1] for start in lines), seconds, _figures(lines, seconds))


def _training(line: Line) -> float:
    """Returns the seconds of training up to a line, those that are lost included."""
    return sum(taken for activity, taken in line.seconds.items() if NAMES.get(activity) == KEPT)


def _trained(start: Sequence[Line]) -> float:
    """Returns the seconds of a start's training, without those in which it stood still before its end."""
    last = start[-1]
    still = last.since if _stood_still(last) and NAMES.get(last.activity) == KEPT else 0.0
    return _training(last) - still


def _stood_still(last: Line) -> bool:
    """Whether a start ended because it hung or a host was lost, so that its last activity was in vain."""
    return last.ended in (LOST_HOST, STALLED)


def _kept(start: Sequence[Line], later: Sequence[Sequence[Line]]) -> float:
    """Returns the seconds of a start's training up to the step that every later start continued from or after."""
    continued = [line.start for following in later for line in following if line.start is not None]
    points = [(line.step, _training(line)) for line in start if line.start is not None]
    kept = min(continued, default=math.inf)
    if not points or kept > points[-1][0]:  # it is the last, or the next found a step that is in none of its lines
        return _trained(start)
    before, trained_before = start[-1].start or 0, 0.0
    for step, trained in points:
        if step >= kept:
            share = (kept - before) / (step - before) if step > before else 1.0
            return max(trained_before + (trained - trained_before) * share, 0.0)
        before, trained_before = step, trained
    raise AssertionError("a step at or after the kept one is in the last line")


def _figures(lines: Sequence[Sequence[Line]], seconds: dict[str, float]) -> dict[str, float | None]:
    """Returns FlagPerf's figures over all starts: seconds, and images/s of the images whose training counts.

    The clock of raw_train_time and of p_whole starts where training first began and does not stop before its end, so
    starting again, compiling again and the time between two starts are in it. p_train leaves out evaluations; p_core
    also leaves out waiting for input.
    """
    last = lines[-1][-1]
    began = next((line for start in lines for line in start if line.trains is not None), None)
    first = next((line for start in lines for line in start if line.start is not None), None)
    wall = sum(seconds.values())
    if began is None or began.trains is None or first is None or first.start is None:
        return {"e2e_time": wall, "raw_train_time": None, "p_whole": None, "p_train": None, "p_core": None}
    images = (last.step - first.start) * last.global_batch
    raw = wall - (began.began + began.trains - lines[0][0].began)
    if last.trained is not None:
        raw -= last.elapsed - last.trained
    training = raw - (seconds["evaluation"] - began.seconds.get("evaluation before training", 0.0))
    spans = {"p_whole": raw, "p_train": training, "p_core": training - seconds["waiting for input"]}
    return {"e2e_time": wall, "raw_train_time": raw} | {
        name: images / span if images > 0 and span > 0 else None for name, span in spans.items()
    }
