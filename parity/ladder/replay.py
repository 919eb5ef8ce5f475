"""Does what a run recorded follow from its checkpoint?

Float64 repeats the steps after a checkpoint, on the run's real batches, and what the run recorded of them is held
against that: the losses in metrics.jsonl, and the parameters and momentum of the next checkpoint. How far a right run
may be away is measured: float64 repeats the steps again while the parameters that each step's gradients are taken at,
and its images, are disturbed as the run's precision disturbs them. This finds a fault that was there only while the run
ran, such as a device, a driver or an older version of the code.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import input_pipeline
from parity.ladder import verdict
from parity.ladder.ladder import ULP, Ladder
from parity.ladder.verdict import LEAST_DRAWS, LOOKS, MULTIPLE, SLACK, Line
from parity.sides.recorded import RecordedRun, State

RUNG = "record"  # name of the lines' rung
# Ulps of a precision under which float64's forward pass errs as much as that precision does, see `Ladder.amplitude`: a
# little more than was seen of R14x0.5 and R26x1. It is not measured anew, because the run's device may not be here.
RUN_ULPS = {"fp32": 3.0, "tf32": 0.6, "bf16": 0.6, "fp16": 0.6, "fp64": 3.0}
CERTAIN = 100.0  # multiple of its limit from which an array is no longer looked at again: no luck reaches it


@dataclasses.dataclass(frozen=True)
class Window:
    """Steps that a run took from one of its states, and what it recorded of them.

    Attributes:
        start, stop: the steps before the first and after the last of them.
        losses: {step: its loss} of the steps that are recorded.
        ends: whether the state after `stop` steps is recorded.
    """

    start: int
    stop: int
    losses: dict[int, float]
    ends: bool

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def says_anything(self) -> bool:
        """Whether anything is recorded that depends on an update within the window; the first loss does not."""
        return self.ends or any(step > self.start + 1 for step in self.losses)


def window(run: RecordedRun, start: int, most: int) -> Window:
    """Returns the steps after `start`, at most that many and not beyond the next checkpoint or the last record."""
    later = [step for step in run.checkpoints() if step > start]
    losses = run.losses()
    last = later[0] if later else max(losses, default=start)
    stop = min(start + most, max(last, start))
    within = {step: losses[step] for step in range(start + 1, stop + 1) if step in losses}
    return Window(start, stop, within, ends=stop in later)


@dataclasses.dataclass(frozen=True)
class Judged:
    """The verdict on a window's record.

    Attributes:
        window: the window.
        lines: verdicts on its losses and arrays.
        sentence: what they say.
        losses: [steps, recorded losses, float64's], for the report.
    """

    window: Window
    lines: list[Line]
    sentence: str
    losses: list[Any]

    @property
    def follows(self) -> bool:
        return all(line.verdict != "bug" for line in self.lines)

    @property
    def share(self) -> float:
        """The largest error as a share of its limit."""
        return max((line.used or 0.0 for line in self.lines), default=0.0)


class Replay:
    """The steps of a window, repeated from the state before it.

    Attributes:
        ladder: comparison whose reference repeats them in float64.
        run, window, state: the run, the window and the state that it starts from.
    """

    def __init__(self, ladder: Ladder, run: RecordedRun, source: input_pipeline.Source, window: Window, state: State):
        self.ladder, self.run, self.window, self.state = ladder, run, window, state
        place = ladder.folder / f"steps after {window.start}.npz"
        if not place.exists():
            run.batches(source, window.start, window.count).save(place)
        start = state.save(ladder.folder / f"state {window.start}.npz")
        mixed = ladder.ask("reference", "fp64", "mix", batches=place).arrays.path
        self.arguments: dict[str, Any] = {
            "mixed": mixed,
            "count": window.count,
            "schedule": run.schedule,
            "momentum": run.momentum,
            "start": start,
            "step": window.start,
        }

    def exact(self) -> dict[str, np.ndarray]:
        """Returns the losses of the window's steps, and the state after them, in float64."""
        arrays = self.ladder.ask("reference", "fp64", "curve", **self.arguments).arrays
        return {name: arrays[name] for name in arrays.names}

    def end(self) -> State:
        """Returns the state after the window in float64, rounded to the numbers that the run keeps."""
        exact = self.exact()
        wide = next(iter(self.state.params.values())).dtype
        params, momentum = (
            {key: exact[f"{kind}/{key}"].astype(wide) for key in self.state.params} for kind in ("params", "momentum")
        )
        return State(self.window.stop, params, momentum)

    def judge(self, ended: State | None) -> Judged:
        """Judges what the run recorded.

        Args:
            ended: the recorded state after the window, or None.
        """
        numbers = sorted(self.window.losses)
        record: dict[str, np.ndarray] = {"losses": np.array([self.window.losses[number] for number in numbers])}
        record |= {} if ended is None else ended.named
        lines, exact, draws = self._lines(record, numbers)
        sentence = self._left(lines, numbers, exact, draws) if any(line.verdict == "bug" for line in lines) else ""
        places = [number - self.window.start - 1 for number in numbers]
        losses = [numbers, record["losses"].tolist(), exact["losses"][places].tolist()]
        return Judged(self.window, lines, sentence or self._followed(lines), losses)

    def repeated_by(self, role: str) -> str:
        """Has a side repeat the window in the run's precision, and says whether it leaves float64 as well."""
        scale = {} if self.state.scale is None else {"scale": self.state.scale}
        arrays = self.ladder.ask(role, self.run.precision, "curve", **self.arguments, **scale).arrays
        numbers = list(range(self.window.start + 1, self.window.stop + 1))
        lines, _, _ = self._lines({name: arrays[name] for name in arrays.names}, numbers)
        side = f"{self.ladder.sides[role]} in {self.run.precision}, the code at hand"
        if all(line.verdict != "bug" for line in lines):
            return f"{side}, repeats these steps as float64 does: it does not reproduce what the run recorded"
        given = dict(zip(numbers, arrays["losses"].tolist(), strict=True))
        same = all(given[number] == loss for number, loss in self.window.losses.items())
        exactly = ", with the recorded losses bit for bit" if same and self.window.losses else ""
        most = max(lines, key=lambda line: line.used or 0.0)
        return f"{side}, does not follow float64 in these steps either{exactly}: {most.name}, {most.note}"

    def _lines(
        self, record: dict[str, np.ndarray], numbers: Sequence[int]
    ) -> tuple[list[Line], dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
        """Returns the verdicts, float64's arrays, and those under each disturbance.

        Arrays in doubt are judged again under further disturbances, and their limit is the largest of all.
        """
        places = [number - self.window.start - 1 for number in numbers]
        exact, draws = self.exact(), self._disturbed(0)

        def judge(name: str) -> Line:
            chosen = (lambda arrays: arrays["losses"][places]) if name == "losses" else (lambda arrays: arrays[name])
            eps = ULP["fp64" if self.run.precision == "fp64" else "fp32"]
            # a step rounds the parameters once, and roundings in any direction add up as the root of their number
            stored = eps if name == "losses" else eps * math.sqrt(self.window.count)
            disturbed = [chosen(arrays) for arrays in draws]
            return verdict.recorded(
                RUNG,
                self._shown(name),
                self.run.precision,
                chosen(exact),
                record[name],
                disturbed,
                stored=stored,
            )

        lines = {name: judge(name) for name in record if record[name].size}
        for look in range(1, LOOKS):
            doubtful = [name for name, line in lines.items() if line.verdict == "bug" and (line.used or 0) < CERTAIN]
            if not doubtful:
                break
            self.ladder.say(f"beyond its limit, by chance perhaps: {doubtful[0]}; float64 is disturbed again")
            draws += self._disturbed(look)
            lines |= {name: judge(name) for name in doubtful}
        return list(lines.values()), exact, draws

    def _disturbed(self, look: int) -> list[dict[str, np.ndarray]]:
        """Returns float64's arrays under disturbances: one at first, because each of them repeats all steps, and
        several in a further look."""
        amplitude = MULTIPLE * RUN_ULPS[self.run.precision] * ULP[self.run.precision]
        seed, draws = self.ladder.options.seed, []
        for draw in range(LEAST_DRAWS if look else 1):
            disturb = (seed, look, draw), amplitude
            arrays = self.ladder.ask("reference", "fp64", "curve", disturb=disturb, **self.arguments).arrays
            draws.append({name: arrays[name] for name in arrays.names})
        return draws

    def _shown(self, name: str) -> str:
        first, last = self.window.start + 1, self.window.stop
        return f"losses of steps {first} to {last}" if name == "losses" else f"after step {last}: {name}"

    def _followed(self, lines: Sequence[Line]) -> str:
        if not lines:
            return f"{self._steps()}: nothing is recorded of them"
        of_losses = [line.used or 0.0 for line in lines if line.name.startswith("losses")]
        of_state = [line.used or 0.0 for line in lines if not line.name.startswith("losses")]
        parts = [f"losses take at most {max(of_losses):.1%} of what rounding explains"] if of_losses else []
        parts += [f"the state after step {self.window.stop} at most {max(of_state):.1%}"] if of_state else []
        return f"{self._steps()} follow from the state before them: {', '.join(parts)}"

    def _left(
        self, lines: list[Line], numbers: Sequence[int], exact: dict[str, Any], draws: list[dict[str, Any]]
    ) -> str:
        """Returns the sentences on a window that does not follow."""
        sentences = [f"{self._steps()} do NOT follow from the state before them"]
        eps = MULTIPLE * ULP["fp64" if self.run.precision == "fp64" else "fp32"]
        for number in numbers:
            place = number - self.window.start - 1
            right, loss = float(exact["losses"][place]), self.window.losses[number]
            explained = max(abs(float(arrays["losses"][place]) - right) for arrays in draws)
            allowed = max(SLACK * explained, eps * abs(right))
            if not abs(loss - right) <= allowed:
                sentences.append(
                    f"the first loss beyond its limit is that of step {number}: recorded {loss:.9g}, float64 says "
                    f"{right:.9g}, {abs(loss - right):.1e} apart where {allowed:.1e} is allowed"
                )
                break
        else:
            sentences += ["no recorded loss shows it"] if numbers else []
        states = [line for line in lines if not line.name.startswith("losses")]
        if failed := [line for line in states if line.verdict == "bug"]:
            most = max(failed, key=lambda line: line.used or 0.0)
            sentences.append(
                f"{len(failed)} of {len(states)} arrays of the state after step {self.window.stop} are beyond theirs, "
                f"the most {most.name.split(': ')[1]}: {most.note}"
            )
        return "; ".join(sentences)

    def _steps(self) -> str:
        return f"steps {self.window.start + 1} to {self.window.stop}"
