"""Does what a run recorded follow from its checkpoint?

Float64 repeats the steps after a checkpoint, on the run's real batches, and what the run recorded of them is held
against that: the losses in metrics.jsonl, each by itself because differences grow from step to step, and the parameters
and momentum of the next checkpoint. How far a right run may be away is measured: float64 repeats the steps again while
the parameters that each step's gradients are taken at, and its images, are disturbed as the run's precision disturbs
them. This finds a fault that was there only while the run
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
from parity.ladder.verdict import LEAST_DRAWS, LOOKS, MULTIPLE, Line
from parity.sides.recorded import RecordedRun, State

RUNG = "record"  # name of the lines' rung
LOSS = "loss of step "  # beginning of the name of a loss's line
# Ulps of a precision under which float64's forward pass errs as much as that precision does, see `Ladder.amplitude`: a
# little more than was seen of R14x0.5 and R26x1. It is not measured anew, because the run's device may not be here.
RUN_ULPS = {"fp32": 3.0, "tf32": 0.6, "bf16": 0.6, "fp16": 0.6, "fp64": 3.0}
CERTAIN = 10.0  # multiple of a limit that luck does not reach, once there are several disturbances


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
        losses: [step, recorded loss, float64's] of each, for the report.
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
        } | ladder.options.added

    def exact(self) -> dict[str, np.ndarray]:
        """Returns the losses of the window's steps, and the state after them, in float64."""
        arrays = self.ladder.ask("reference", "fp64", "curve", **self.arguments).arrays
        return {name: arrays[name] for name in arrays.names}

    def end(self) -> State:
        """Returns the state after the window in float64, rounded to the numbers that the run keeps."""
        exact = self.exact()
        wide = next(iter(self.state.params.values())).dtype
        params, momentum, ema = (
            {key: exact[f"{kind}/{key}"].astype(wide) for key in arrays}
            for kind, arrays in (
                ("params", self.state.params),
                ("momentum", self.state.momentum),
                ("ema", self.state.ema),
            )
        )
        return State(self.window.stop, params, momentum, ema)

    def judge(self, ended: State | None) -> Judged:
        """Judges what the run recorded.

        Args:
            ended: the recorded state after the window, or None.
        """
        losses, state = self.window.losses, {} if ended is None else ended.named
        lines = self._lines(losses, state)
        sentence = self._left(lines) if any(line.verdict == "bug" for line in lines) else self._followed(lines)
        exact = self.exact()["losses"]
        return Judged(
            self.window, lines, sentence, [[step, loss, self._of(step, exact)] for step, loss in losses.items()]
        )

    def repeated_by(self, role: str) -> str:
        """Has a side repeat the window in the run's precision, and says whether it leaves float64 as well."""
        scale = {} if self.state.scale is None else {"scale": self.state.scale}
        arrays = self.ladder.ask(role, self.run.precision, "curve", **self.arguments, **scale).arrays
        losses = dict(enumerate(arrays["losses"].tolist(), start=self.window.start + 1))
        lines = self._lines(losses, {name: arrays[name] for name in arrays.names if name != "losses"})
        side = f"{self.ladder.sides[role]} in {self.run.precision}, the code at hand"
        if all(line.verdict != "bug" for line in lines):
            return f"{side}, repeats these steps as float64 does: it does not reproduce what the run recorded"
        same = self.window.losses and all(losses[step] == loss for step, loss in self.window.losses.items())
        exactly = ", with the recorded losses bit for bit" if same else ""
        first = next(line for line in lines if line.verdict == "bug")
        return f"{side}, does not follow float64 in these steps either{exactly}: {first.name}: {first.note}"

    def _lines(self, losses: dict[int, float], state: dict[str, np.ndarray]) -> list[Line]:
        """Returns the verdicts on each loss and on each array of the state after the window.

        What is in doubt is judged again under further disturbances, and its limit is the largest of all.
        """
        exact, draws = self.exact(), self._disturbed(0)
        names = [*losses, *state]
        lines = {name: self._line(name, losses, state, exact, draws) for name in names}
        for look in range(1, LOOKS):
            # at least once, because under a single disturbance a loss may be right by chance
            doubtful = [
                name
                for name, line in lines.items()
                if line.verdict == "bug" and (look == 1 or line.used is None or line.used < CERTAIN)
            ]
            if not doubtful:
                break
            self.ladder.say(f"beyond its limit, by chance perhaps: {lines[doubtful[0]].name}; disturbing float64 again")
            draws += self._disturbed(look)
            lines |= {name: self._line(name, losses, state, exact, draws) for name in doubtful}
        return list(lines.values())

    def _line(
        self,
        name: int | str,
        losses: dict[int, float],
        state: dict[str, np.ndarray],
        exact: dict[str, np.ndarray],
        draws: list[dict[str, np.ndarray]],
    ) -> Line:
        """Judges the loss of a step, which is given by its number, or an array of the state after the window."""
        precision = self.run.precision
        stored = ULP["fp64" if precision == "fp64" else "fp32"]
        if isinstance(name, str):
            # each step rounds the parameters, and roundings in any direction add up as the root of their number
            stored *= math.sqrt(self.window.count)
            explained = verdict.explained_by(exact[name], [arrays[name] for arrays in draws])
            shown = f"after step {self.window.stop}: {name}"
            return verdict.recorded(RUNG, shown, precision, exact[name], state[name], explained, stored=stored)
        # disturbances grow from step to step, and one that is small in a step by chance was larger before it
        until = slice(name - self.window.start)
        right = exact["losses"][until]
        grown = max(float(np.abs(arrays["losses"][until] / right - 1).max()) for arrays in draws)
        loss, explained = np.array([losses[name]]), np.full(2, grown)
        return verdict.recorded(RUNG, f"{LOSS}{name}", precision, right[-1:], loss, explained, stored=stored)

    def _of(self, step: int, losses: np.ndarray) -> float:
        return float(losses[step - self.window.start - 1])

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

    def _followed(self, lines: Sequence[Line]) -> str:
        if not lines:
            return f"{self._steps()}: nothing is recorded of them"
        of_losses = [line.used or 0.0 for line in lines if line.name.startswith(LOSS)]
        of_state = [line.used or 0.0 for line in lines if not line.name.startswith(LOSS)]
        parts = [f"losses take at most {max(of_losses):.1%} of what rounding explains"] if of_losses else []
        parts += [f"the state after step {self.window.stop} at most {max(of_state):.1%}"] if of_state else []
        return f"{self._steps()} follow from the state before them: {', '.join(parts)}"

    def _left(self, lines: Sequence[Line]) -> str:
        """Returns the clauses on a window that does not follow."""
        clauses = [f"{self._steps()} do NOT follow from the state before them"]
        losses = [line for line in lines if line.name.startswith(LOSS)]
        if first := next((line for line in losses if line.verdict == "bug"), None):
            step = int(first.name.removeprefix(LOSS))
            clauses.append(
                f"the first loss beyond its limit is that of step {step}: recorded {self.window.losses[step]:.9g}, "
                f"float64 says {self._of(step, self.exact()['losses']):.9g}, a relative difference of "
                f"{first.difference:.1e} where {first.limit:.1e} is allowed"
            )
        elif losses:
            clauses.append("no recorded loss shows it")
        arrays = [line for line in lines if not line.name.startswith(LOSS)]
        if failed := [line for line in arrays if line.verdict == "bug"]:
            most = max(failed, key=lambda line: line.used or 0.0)
            clauses.append(
                f"{len(failed)} of {len(arrays)} arrays of the state after step {self.window.stop} are beyond theirs, "
                f"the most {most.name.split(': ')[1]}: {most.note}"
            )
        return "; ".join(clauses)

    def _steps(self) -> str:
        return f"steps {self.window.start + 1} to {self.window.stop}"
