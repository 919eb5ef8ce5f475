"""Asks both sides for a task and judges the candidate's answer by the reference's: in float64 first, then in the
precision asked for.

An array that exceeds its limit, by chance perhaps, is looked at again on other images; see `verdict.look_again`.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from bit_jax.training.steps import FIRST_SCALE
from parity.ladder import verdict
from parity.ladder.kept import Whole
from parity.ladder.ladder import ROLES, Ladder, RungResult
from parity.ladder.reference import DISTURBED_ULPS, Readers, loss_scale, one_batch
from parity.ladder.verdict import LIMIT, Line
from parity.sides.worker import Answer, Arrays

NOT_COMPARED = "not compared:"
NO_MODULE, NO_UNITS = "no module of its own", "no units can be seen"
SHOWN = 3  # array names in the sentence that announces a further look
LOSS_SCALE = "loss scale"  # name of the line that compares both sides' loss scales
# Largest ratio of two correct sides' loss scales. PyTorch's autocast keeps the gradient of the head's kernel in float16
# and JAX in float32, so the two overflow at different scales: with a random R14x0.5, only PyTorch does at 2^16 and
# neither at 2^14. If one side scales its loss twice, the scales are 2^9 times apart.
SCALES_APART = 64.0


@dataclasses.dataclass(frozen=True)
class Question:
    """A task that both sides are asked for, and how the candidate's answer is judged.

    Attributes:
        ladder: comparison whose sides are asked.
        rung, task: names of the rung and of the task.
        arguments: function (number of the look) -> the task's arguments; every look has other images.
        group: function that finds the arrays of each name in an answer, one array for each batch.
        disturb: whether the task can be disturbed to measure what rounding explains; otherwise MULTIPLE
            ulps of float32 are allowed.
        chaotic: whether the task may amplify rounding beyond the float64 limit; if it does, float64 is disturbed too.
        differentiates: whether the task takes gradients, which are those of the scaled loss in float16.
        judged: whether the task is judged in the precision asked for too, or in float64 alone.
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
    judged: bool = True

    def judge(self) -> RungResult:
        """Judges the answers in float64 and, if the sides agree there, in the precision asked for.

        If a side is an exported file, it has no float64 of its own, and the first of these two questions is left out.
        """
        precision, reference = self.ladder.options.precision, self.ladder.reference
        if len(self.ladder.computing("fp64")) == len(ROLES):
            candidate = self.candidate("fp64").arrays
            result = RungResult(self.rung, self._judge_float64(self.group(candidate)))
            if ours := reference.losses(self, "fp64", {}):
                result.details["losses"] = {"fp64": [ours, candidate["losses"].tolist()]}
        else:
            result = RungResult(self.rung, self._unseen())
        if result.verdict != "bug" and precision != "fp64" and self.judged:
            self._judge_precision(result)
        return result

    def candidate(self, precision: str, look: int = 0, **more: float) -> Answer:
        """Returns the candidate's answer on one set of images."""
        return self.ladder.ask("candidate", precision, self.task, **self.arguments(look), **more)

    @property
    def scales_loss(self) -> bool:
        """Whether the task scales its loss in the precision asked for."""
        return self.differentiates and self.ladder.options.precision == "fp16"

    def _judge_float64(self, candidate: Readers) -> list[Line]:
        """Judges every array that both sides have, by the worst of its batches, and those that only one side has."""
        lines: list[Line] = []
        missing, names = [], set()
        for name, batches in self.ladder.reference.oracle(self, 0):
            names.add(name)
            if name not in candidate:
                missing.append(name)
            elif not (self.ladder.options.fail_fast and any(line.verdict == "bug" for line in lines)):
                pairs = zip(batches, candidate[name], strict=True)
                of_batches = [verdict.in_float64(self.rung, name, ours, theirs()) for ours, theirs in pairs]
                lines.append(max(of_batches, key=lambda line: (line.verdict == "bug", line.difference)))
        beyond = [line.name for line in lines if line.verdict == "bug" and np.isfinite(line.difference)]
        if self.chaotic and beyond:
            judged = verdict.look_again(
                self._growth(0, beyond),
                self._further(self._growth),
                lambda name, looks: _allow_for_growth(self.rung, name, looks),
            )
            allowed = {line.name: line for line in judged}
            lines = [allowed.get(line.name, line) for line in lines]
        unexpected = [name for name in candidate if name not in names]
        return lines + absent_lines(self.rung, "fp64", missing=missing, unexpected=unexpected)

    def _unseen(self) -> list[Line]:
        """Returns the lines of the arrays that an exported file does not show."""
        ladder = self.ladder
        assert ladder.exported is not None
        shown = ladder.ask(ladder.exported, ladder.options.precision, self.task, **self.arguments(0)).arrays
        others = [name for name, _ in ladder.reference.oracle(self, 0) if name not in shown]
        missing, unexpected = (others, []) if ladder.exported == "candidate" else ([], others)
        precision = ladder.options.precision
        return absent_lines(self.rung, precision, missing=missing, unexpected=unexpected, why=NO_UNITS)

    def _judge_precision(self, result: RungResult) -> None:
        """Adds the lines, findings and losses of the precision asked for to the rung's result."""
        precision = self.ladder.options.precision
        lines = verdict.look_again(
            self._look(0),
            self._further(self._look),
            lambda name, looks: verdict.calibrated(self.rung, name, precision, looks),
        )
        if self.scales_loss:
            lines.insert(0, line := scale_line(self.rung, precision, self.loss_scales(0)))
            result.findings += [line.note] if line.note else []
        failed = next((place for place, line in enumerate(lines) if line.verdict == "bug"), len(lines))
        result.lines += lines[: failed + 1] if self.ladder.options.fail_fast else lines
        if "losses" in result.details:
            scaled = self._scaled(0)
            ours = self.ladder.reference.losses(self, precision, scaled)
            theirs = self.candidate(precision, 0, **scaled).arrays["losses"].tolist()
            result.details["losses"][precision] = [ours, theirs]

    def _look(self, number: int, names: Sequence[str] | None = None) -> dict[str, verdict.Look]:
        """Returns one look at the arrays of those names, by default at all, in the precision asked for."""
        scaled, reference = self._scaled(number), self.ladder.reference
        candidate = self.group(self.candidate(self.ladder.options.precision, number, **scaled).arrays)
        looks = {}
        for name, expected in reference.expected(self, number, names, scaled):
            if name in candidate:
                if "candidate" in self.ladder.computing("fp64") and not all(array.exact for array in expected.oracle):
                    expected = self._with_own_oracle(expected, number, name)
                looks[name] = expected.look([read() for read in candidate[name]])
        return looks

    def _with_own_oracle(self, expected: verdict.Expected, number: int, name: str) -> verdict.Expected:
        """Returns what is expected with the candidate's own float64 result for the oracle, if that agrees with what is
        known of the oracle: errors are then measured, not estimated."""
        own = [Whole(read()) for read in self.group(self.candidate("fp64", number).arrays)[name]]
        agrees = all(known.difference(ours.array) <= LIMIT for known, ours in zip(expected.oracle, own, strict=True))
        return dataclasses.replace(expected, oracle=own) if agrees else expected

    def _growth(self, number: int, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Returns {name: (relative difference of the two sides, difference that float64's own rounding grows to)} of
        one look."""
        grown = self.ladder.reference.grown(self, number, names)
        candidate = self.group(self.candidate("fp64", number).arrays)
        apart = {
            name: max(ours.difference(theirs()) for ours, theirs in zip(batches, candidate[name], strict=True))
            for name, batches in self.ladder.reference.oracle(self, number)
            if name in names
        }
        return {name: (apart[name], grown[name]) for name in names}

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
        return {"scale": min(self.loss_scales(number).values())} if self.scales_loss else {}

    def loss_scales(self, number: int) -> dict[str, float]:
        """Returns {role: the largest loss scale at which no gradient of that side overflows}."""
        own = loss_scale(self.ladder, "candidate", self, number)
        return {"reference": self.ladder.reference.scale(self, number), "candidate": own}


def absent_lines(
    rung: str, precision: str, *, missing: Collection[str], unexpected: Collection[str], why: str = NO_MODULE
) -> list[Line]:
    """Judges the arrays that only one side has: a bug, except in the forward rung, where a model without a module of
    its own for a unit only cannot be observed there.

    Args:
        missing: names of the arrays that the candidate lacks.
        unexpected: names of those that the reference lacks.
        why: a clause that says why they cannot be observed.
    """
    names = [(name, "candidate") for name in missing] + [(name, "reference") for name in unexpected]
    if rung == "forward":
        return [
            Line(rung, name, precision, "equal", 0.0, np.inf, note=f"{NOT_COMPARED} {why} in the {who}")
            for name, who in names
        ]
    return [Line(rung, name, precision, "bug", np.inf, 0.0, note=f"the {who} has none") for name, who in names]


def scale_line(rung: str, precision: str, scales: dict[str, float]) -> Line:
    """Judges the two sides' loss scales: a bug if one is more than SCALES_APART times the other.

    The note gives both scales, unless neither side had to lower its own.
    """
    reference, candidate = scales["reference"], scales["candidate"]
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
