"""Asks both sides for a task and judges their answers: in float64 first, then in the precision asked for.

An array that exceeds its limit, by chance perhaps, is looked at again on other images; see `verdict.look_again`.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bit_jax.training.steps import FIRST_SCALE
from parity.ladder import verdict
from parity.ladder.ladder import ROLES, ULP, Ladder, RungResult
from parity.ladder.verdict import LIMIT, MULTIPLE, Line
from parity.sides.worker import Arrays

NOT_COMPARED = "not compared:"
NO_MODULE, NO_UNITS = "no module of its own", "no units can be seen"
SHOWN = 3  # array names in the sentence that announces a further look
LEAST_SCALE = 1.0  # smallest loss scale in float16: gradients that overflow without any scaling are wrong
LOSS_SCALE = "loss scale"  # name of the line that compares both sides' loss scales
# Largest ratio of two correct sides' loss scales. PyTorch's autocast keeps the gradient of the head's kernel in float16
# and JAX in float32, so the two overflow at different scales: with a random R14x0.5, only PyTorch does at 2^16 and
# neither at 2^14. If one side scales its loss twice, the scales are 2^9 times apart.
SCALES_APART = 64.0
DISTURBED_ULPS = 16.0  # disturbance, in float64's ulps, that shows how far a chaotic curve carries rounding

Readers = dict[str, list[Callable[[], np.ndarray]]]  # {name: functions that read the array, one for each batch}


def one_batch(arrays: Arrays) -> Readers:
    """Returns the readers of an answer's arrays, each of which is of one batch."""
    return {name: [lambda name=name: arrays[name]] for name in arrays.names}


def by_batch(arrays: Arrays) -> Readers:
    """Returns the readers of an answer whose array names begin with the number of the batch, as in `0/KEY`."""
    batches = defaultdict(list)
    for name in arrays.names:
        batches[name.split("/", 1)[1]].append(lambda name=name: arrays[name])
    return dict(batches)


@dataclasses.dataclass(frozen=True)
class Question:
    """A task that both sides are asked for, and how their answers are judged.

    Attributes:
        ladder: comparison whose sides are asked.
        rung, task: names of the rung and of the task.
        arguments: function (number of the look) -> the task's arguments; every look has other images.
        group: function that finds the arrays of each name in an answer, one array for each batch.
        disturb: whether the task can be disturbed to measure what rounding explains; otherwise MULTIPLE
            ulps of float32 are allowed.
        chaotic: whether the task may amplify rounding beyond the float64 limit; if it does, float64 is disturbed too.
        differentiates: whether the task takes gradients, which are those of the scaled loss in float16.
    """

    ladder: Ladder
    rung: str
    task: str
    arguments: Callable[[int], dict[str, Any]]
    group: Callable[[Arrays], Readers] = one_batch
    _: dataclasses.KW_ONLY
    disturb: bool = True
    chaotic: bool = False
    differentiates: bool = False

    def judge(self) -> RungResult:
        """Judges the answers in float64 and, if the sides agree there, in the precision asked for.

        If a side is an exported file, it has no float64 of its own, and the first of these two questions is left out.
        """
        exported = self.ladder.exported is not None
        first = "fp64" if len(self.ladder.roles("fp64")) == len(ROLES) else self.ladder.options.precision
        reference, candidate = self.ladder.both(first, self.task, **self.arguments(0))
        lines = self._judge_float64(reference, candidate) if first == "fp64" else []
        absent = absent_lines(self.rung, first, reference, candidate, why=NO_UNITS if exported else NO_MODULE)
        result = RungResult(self.rung, lines + absent)
        if "losses" in reference.names:
            result.details["losses"] = {"fp64": [reference["losses"].tolist(), candidate["losses"].tolist()]}
        if result.verdict != "bug" and self.ladder.options.precision != "fp64":
            self._judge_precision(result)
        return result

    def _judge_float64(self, reference: Arrays, candidate: Arrays) -> list[Line]:
        lines = float64_lines(
            self.rung, self.group(reference), self.group(candidate), fail_fast=self.ladder.options.fail_fast
        )
        beyond = [line.name for line in lines if line.verdict == "bug" and np.isfinite(line.difference)]
        if not (self.chaotic and beyond):
            return lines
        judged = verdict.look_again(
            self._growth(0, beyond),
            self._further(self._growth),
            lambda name, looks: _allow_for_growth(self.rung, name, looks),
        )
        allowed = {line.name: line for line in judged}
        return [allowed.get(line.name, line) for line in lines]

    def _judge_precision(self, result: RungResult) -> None:
        """Adds the lines, findings and losses of the precision asked for to the rung's result."""
        precision = self.ladder.options.precision
        lines = verdict.look_again(
            self._look(0),
            self._further(self._look),
            lambda name, looks: verdict.calibrated(self.rung, name, precision, looks),
        )
        if scales := self._loss_scales(0):
            lines.insert(0, line := scale_line(self.rung, precision, scales))
            result.findings += [line.note] if line.note else []
        failed = next((place for place, line in enumerate(lines) if line.verdict == "bug"), len(lines))
        result.lines += lines[: failed + 1] if self.ladder.options.fail_fast else lines
        if "losses" in result.details:
            answers = self.ladder.both(precision, self.task, **self.arguments(0), **self._scaled(0))
            result.details["losses"][precision] = [arrays["losses"].tolist() for arrays in answers]

    def _look(self, number: int, names: Sequence[str] | None = None) -> dict[str, verdict.Look]:
        """Returns one look at the arrays of those names, by default at all, in the precision asked for."""
        ladder, arguments, scaled = self.ladder, self.arguments(number), self._scaled(number)
        exact = self.group(ladder.ask(ladder.oracle, "fp64", self.task, **arguments).arrays)
        answers = ladder.disturbed(self.task, MULTIPLE * ladder.amplitude, number, **arguments) if self.disturb else []
        disturbed = [self.group(arrays) for arrays in answers]
        reference, candidate = (
            self.group(arrays) for arrays in ladder.both(ladder.options.precision, self.task, **arguments, **scaled)
        )
        return {
            name: verdict.look(
                _read(batches),
                _read(reference[name]),
                _read(candidate[name]),
                [_read(readers[name]) for readers in disturbed],
            )
            for name, batches in exact.items()
            if name in reference and name in candidate and (names is None or name in names)
        }

    def _growth(self, number: int, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Returns {name: (relative difference of the two sides, difference that float64's own rounding grows to)} of
        one look."""
        ladder, arguments = self.ladder, self.arguments(number)
        reference, candidate = ladder.both("fp64", self.task, **arguments)
        disturbed = ladder.disturbed(self.task, DISTURBED_ULPS * ULP["fp64"], number, **arguments)
        return {
            name: (
                verdict.relative_difference(reference[name], candidate[name]),
                max(verdict.relative_difference(reference[name], arrays[name]) for arrays in disturbed),
            )
            for name in names
        }

    def _further(self, look: Callable[[int, list[str]], dict[str, Any]]) -> Callable[[int, list[str]], dict[str, Any]]:
        """Returns `look` as a further look, which is announced and whose files are not kept."""

        def further(number: int, doubtful: list[str]) -> dict[str, Any]:
            self.ladder.say(
                f"beyond its limit, by chance perhaps: {', '.join(doubtful[:SHOWN])}; looking at other images"
            )
            with self.ladder.forgetting():
                return look(number, doubtful)

        return further

    def _scaled(self, number: int) -> dict[str, float]:
        """Returns the loss scale that both sides are given besides the arguments, if the task takes one."""
        scales = self._loss_scales(number)
        return {"scale": min(scales.values())} if scales else {}

    def _loss_scales(self, number: int) -> dict[str, float]:
        """Returns `loss_scales` of a look; {} if the loss is not scaled."""
        if not (self.differentiates and self.ladder.options.precision == "fp16"):
            return {}
        return loss_scales(self.ladder, self.task, self.arguments(number))


def float64_lines(rung: str, reference: Readers, candidate: Readers, *, fail_fast: bool) -> list[Line]:
    """Judges in float64 every array that both sides have, by the worst of its batches; `fail_fast` ends at a bug."""
    lines = []
    for name, batches in reference.items():
        if name not in candidate:
            continue
        pairs = zip(batches, candidate[name], strict=True)
        of_batches = [verdict.in_float64(rung, name, ours(), theirs()) for ours, theirs in pairs]
        lines.append(max(of_batches, key=lambda line: (line.verdict == "bug", line.difference)))
        if fail_fast and lines[-1].verdict == "bug":
            break
    return lines


def absent_lines(
    rung: str, precision: str, reference: Arrays, candidate: Arrays, *, why: str = NO_MODULE
) -> list[Line]:
    """Judges the arrays that only one side has: a bug, except in the forward rung, where a model without a module of
    its own for a unit only cannot be observed there. `why` says so."""
    names = [(name, "candidate") for name in reference.names if name not in candidate]
    names += [(name, "reference") for name in candidate.names if name not in reference]
    if rung == "forward":
        return [
            Line(rung, name, precision, "equal", 0.0, np.inf, note=f"{NOT_COMPARED} {why} in the {who}")
            for name, who in names
        ]
    return [Line(rung, name, precision, "bug", np.inf, 0.0, note=f"the {who} has none") for name, who in names]


def loss_scales(ladder: Ladder, task: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Returns {role: the largest loss scale at which no gradient of that side overflows in float16}.

    The scales tried are train.py's first one and its halves. Training halves its scale in the same way; both sides are
    judged at the smaller of their two scales.
    """
    scales = {}
    for role in ROLES:
        scale = FIRST_SCALE
        while scale > LEAST_SCALE:
            answer = ladder.ask(role, ladder.options.precision, task, **arguments, scale=scale)
            if not answer.info["overflows"]:
                break
            answer.discard()
            scale /= 2
        scales[role] = scale
    return scales


def scale_line(rung: str, precision: str, scales: dict[str, float]) -> Line:
    """Judges the two sides' loss scales: a bug if one is more than SCALES_APART times the other.

    The note gives both scales, unless neither side had to lower its own.
    """
    reference, candidate = (scales[role] for role in ROLES)
    apart = max(reference, candidate) / min(reference, candidate)
    note = ""
    if (reference, candidate) != (FIRST_SCALE, FIRST_SCALE):
        note = (
            f"gradients are finite up to a loss scale of {reference:g} on the reference, {candidate:g} on the candidate"
        )
    judged = "equal" if apart == 1 else "rounding" if apart <= SCALES_APART else "bug"
    return Line(rung, LOSS_SCALE, precision, judged, apart - 1, SCALES_APART - 1, note=note)


def _allow_for_growth(rung: str, name: str, looks: Sequence[tuple[float, float]]) -> Line:
    """Judges an array beyond the float64 limit by what float64's own rounding grows to; see `Question._growth`."""
    difference = min(apart for apart, _ in looks)
    grown = sorted(grown for _, grown in looks)[(len(looks) - 1) // 2]
    limit = max(grown, LIMIT)
    note = f"{DISTURBED_ULPS:g} ulp of float64 grow to {grown:.1e} here; a lower --base-lr would tell more"
    judged = "rounding" if difference <= limit else "bug"
    return Line(rung, name, "fp64", judged, difference, limit, disturbed_error=grown, note=note, looks=len(looks))


def _read(batches: Sequence[Callable[[], np.ndarray]]) -> list[np.ndarray]:
    return [read() for read in batches]
