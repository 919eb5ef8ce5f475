"""XLA against PyTorch on the same work: first whether an arm computes the right thing, then how fast."""

import contextlib
import dataclasses
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bit_jax.model import weights
from bit_jax.published import locate
from input_pipeline import terminal
from input_pipeline.bench import CROP, RESIZE_TO
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.files import write_json
from input_pipeline.sources import open_source
from input_pipeline.terminal import printable
from parity import faults
from parity.ladder.ladder import RANDOM, ULP, working_folder
from parity.ladder.verdict import MULTIPLE, Line, Look, Verdict, calibrated, look, look_again
from parity.sides import clock, inputs
from parity.sides.side import Side, parse_side
from parity.sides.worker import Answer, Worker
from parity.throughput import report as throughput_report
from parity.throughput.request import RANDOM_CLASSES, Throughput
from parity.throughput.summary import Ceilings, rate, summarize

BATCHES = 3  # that are worked on in turn
# Of the gate's steps. At a rate that trains, 0.003, a random R50x1's third loss is chaotic: right arms err by 7e-5 to
# 3.4e-4, and the luckiest was the measure of the others. At this one they err by at most a quarter of what is allowed.
GATE_LR = 1e-4
ORACLE = Side("torch")  # which computes in float64
DISTURBANCES = 3
LOSSES_AGREE = 0.02  # relative; of `--gate losses`


def measure(options: Throughput, console: Console) -> dict[str, Any]:
    """Everything that is reported, in JSON's types.

    An arm whose process fails, by running out of memory say, is left out, which the report says; the others go on.

    Raises:
        RunFailed: no arm computes the right thing, or none is left.
    """
    with working_folder() as folder:
        bench = _Bench(options, folder)
        gate = bench.gate(console) if options.gate == "float64" else {}
        for arm, line in gate.items():
            if line.verdict == "bug":
                console.print(f"{arm} is not timed: {line.note}", style="bold red")
        wrong = [arm for arm, line in gate.items() if line.verdict == "bug"]
        arms = [arm for arm in bench.sides if arm not in (*wrong, *bench.failed)]
        if not arms and not wrong:
            raise bench.no_arm_left()
        if not arms:
            raise RunFailed("no arm's loss is float64's up to rounding; there is nothing to time")
        ceilings: Ceilings = {}
        rounds = (_together if options.together else _one_by_one)(bench, arms, ceilings, console)
        measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for number, arm, times in rounds:
            measured[arm].append(times)
            console.print(f"{number + 1}/{options.processes}  {arm}: {rate(options, times):.2f} images/s")
        measured = {arm: times for arm, times in measured.items() if arm not in bench.failed}
        if not measured:
            raise bench.no_arm_left()
        if options.gate == "losses":
            gate = _same_losses(options, {arm: times[0]["losses"] for arm, times in measured.items()})
        return summarize(options, bench.architecture, bench.failed, gate, measured, ceilings)


Round = tuple[int, str, dict[str, Any]]  # (its number, arm, what was timed)


def _one_by_one(bench: "_Bench", arms: Sequence[str], ceilings: Ceilings, console: Console) -> Iterator[Round]:
    """A new process for each arm in each round."""
    for number in range(bench.options.processes):
        for arm in _in_turn(arms, number):
            side = bench.sides[arm]
            with bench.may_fail(arm, console), bench.process(side, bench.options.precision, "timed") as ask:
                times = ask(f"{bench.options.work}_time", **bench.timed).info
                ceilings.setdefault((side.framework, side.devices), []).append(ask("ceiling").info)
                yield number, arm, times


def _together(bench: "_Bench", arms: Sequence[str], ceilings: Ceilings, console: Console) -> Iterator[Round]:
    """One process for each arm, all of them there from the first round to the last; only one works at a time."""
    options = bench.options
    with contextlib.ExitStack() as stack:
        asks = {arm: stack.enter_context(bench.process(bench.sides[arm], options.precision, "timed")) for arm in arms}
        firsts: dict[str, dict[str, Any]] = {}
        for arm, ask in asks.items():
            of = bench.sides[arm].framework, bench.sides[arm].devices
            with bench.may_fail(arm, console):
                firsts[arm] = ask(f"{options.work}_time", **(bench.timed | {"seconds": 0})).info
                if of not in ceilings:
                    ceilings[of] = [ask("ceiling").info]
                console.print(f"{arm} has compiled, {firsts[arm]['first']:.0f} s")
        for number in range(options.processes):
            for arm in _in_turn([arm for arm in firsts if arm not in bench.failed], number):
                with bench.may_fail(arm, console):
                    yield number, arm, firsts[arm] | asks[arm]("again", seconds=options.seconds).info


def _same_losses(options: Throughput, losses: dict[str, list[float]]) -> dict[str, Line]:
    """{arm: whether its first loss is what the arms of PyTorch say in their median}. Later ones depend on rounding too
    much: of a random R14x0.5 in float32 the third differs by 2 %."""
    firsts = {arm: own[0] for arm, own in losses.items()}
    agreed = statistics.median(loss for arm, loss in firsts.items() if parse_side(arm).framework == "torch")
    lines = {}
    for arm, own in firsts.items():
        apart = abs(own / agreed - 1)
        right = apart <= LOSSES_AGREE  # not where it is NaN
        verdict: Verdict = "rounding" if right else "bug"
        note = "" if right else f"its first loss is {own:.6g}, PyTorch's {agreed:.6g}"
        lines[arm] = Line("loss", arm, options.precision, verdict, apart, LOSSES_AGREE, note=note)
    return lines


class _Bench:
    """The files that arms are given, and their processes.

    Attributes:
        failed: {arm: why}, of those that a process of theirs failed.
    """

    def __init__(self, options: Throughput, folder: Path):
        self.options, self.folder = options, folder
        self.weight_file = folder / "random.npz"
        if options.weights.startswith(RANDOM):
            inputs.random_weights(self.weight_file, options.weights.removeprefix(RANDOM), RANDOM_CLASSES, options.seed)
        else:
            self.weight_file = locate.weight_file(options.weights).absolute()
        self.architecture, _ = weights.read(self.weight_file)
        if options.folder is not None:
            classes = len(open_source(f"folder:{options.folder}", "train").class_names)
            if classes > self.architecture.num_classes:
                raise RequestError(
                    f"--folder {options.folder} has {classes} classes, more than "
                    f"the {self.architecture.num_classes} of --weights {options.weights}"
                )
        self.sides = options.sides
        self.failed: dict[str, str] = {}
        self._started = 0
        self._float64 = self.process(ORACLE, "fp64", "gate")
        self.checked = self._batches(options.checked_rows)
        self.mixed = self.checked if options.checked_rows == options.rows else self._batches(options.rows)

    def _batches(self, rows: int, look: int = 0) -> Path:
        """A file of so many images in each of the batches, normalized and mixed; every look has others."""
        options, classes = self.options, self.architecture.num_classes
        seeds = [options.seed + look * BATCHES + number for number in range(BATCHES)]
        batches = [inputs.picture_batch(rows, options.size, options.size, classes, seed) for seed in seeds]
        given = self.folder / f"batches of {rows}, {look}.npz"
        arrays: dict[str, Any] = inputs.joined(batches).arrays()
        np.savez(given, **arrays)
        return self._float64("mix", batches=given).arrays.path

    @property
    def timed(self) -> dict[str, Any]:
        """What the task of the clock is given."""
        options = self.options
        if options.folder is None:
            return {"mixed": self.mixed, "count": BATCHES, "seconds": options.seconds}
        resize = round(options.size * RESIZE_TO / CROP)
        shown = {"resize": resize, "crop": options.size, "rows": options.rows}
        return {"folder": f"folder:{options.folder.absolute()}", "steps": options.steps, **shown}

    def process(self, side: Side, precision: str, phase: str) -> "_Asking":
        """One process of an arm; what it compiles is kept for its later ones of the same phase."""
        self._started += 1
        folder = self.folder / phase / re.sub(r"\W", "_", str(side)) / f"{self._started:03d}"
        return _Asking(Worker(side, precision, self.weight_file, folder))

    @contextlib.contextmanager
    def may_fail(self, arm: str, console: Console) -> Iterator[None]:
        """Within the block a failed process is noted, and the block left."""
        try:
            yield
        except RunFailed as error:
            self.failed[arm] = str(error)
            console.print(f"{arm} failed: {printable(error)}", style="bold red")

    def no_arm_left(self) -> RunFailed:
        return RunFailed(f"every arm failed: {next(iter(self.failed.values()))}")

    def gate(self, console: Console) -> dict[str, Line]:
        """{arm: the verdict on its losses}, over a step on each batch, or of each row forward: against float64, and
        against the best of the other arms. Arms in doubt are looked at again, on other batches."""

        def again(number: int, doubtful: list[str]) -> dict[str, Look]:
            console.print(
                f"{', '.join(doubtful)}: beyond the limit, by chance perhaps; looking again, at other batches"
            )
            others = [arm for arm in self.sides if arm not in (*doubtful, *self.failed)]
            looks = self._look(number, doubtful + others[:1], console)
            return {arm: look for arm, look in looks.items() if arm in doubtful}

        def judge(arm: str, looks: list[Look]) -> Line:
            line = calibrated("loss", arm, self.options.precision, looks)
            if line.verdict == "bug" and line.note.startswith("the reference"):  # it is another arm that errs
                line = dataclasses.replace(line, verdict="rounding", note="")
            return line

        with self._float64:
            lines = look_again(self._look(0, list(self.sides), console), again, judge)
        return {line.name: line for line in lines if line.name not in self.failed}

    def _look(self, number: int, arms: Sequence[str], console: Console) -> dict[str, Look]:
        """How much each arm's losses err on one set of batches."""
        precision = self.options.precision
        amplitude = MULTIPLE * ULP[precision]
        batches = self._batches(self.options.checked_rows, number) if number else self.checked
        exact = self._losses(self._float64, batches)
        seeds = [(self.options.seed, number, draw) for draw in range(DISTURBANCES)]
        disturbed = [self._losses(self._float64, batches, disturb=(seed, amplitude)) for seed in seeds]
        losses = {}
        for arm in arms:
            side = self.sides[arm]
            fault = self.options.fault if self.options.fault in faults.of(side.framework) else None
            with self.may_fail(arm, console), self.process(side, precision, "gate") as ask:
                losses[arm] = self._losses(ask, batches, fault=fault)
        looks = {}
        for arm, found in losses.items():
            others = [other for name, other in losses.items() if name != arm] or [found]
            best = min(others, key=lambda other: float(np.abs(other - exact).max()))
            looks[arm] = look([exact], [best], [found], [[one] for one in disturbed])
            console.print(f"{arm}: its loss is {looks[arm].candidate[0]:.1e} off float64's")
        return looks

    def _losses(self, ask: "_Asking", batches: Path, **more: Any) -> np.ndarray:
        if self.options.work == "forward":
            return ask("loss", mixed=batches, **more).arrays["loss of each row"]
        training = {"schedule": clock.SCHEDULE | {"base_lr": GATE_LR}, "momentum": clock.MOMENTUM, "count": BATCHES}
        return ask("curve", mixed=batches, **training, **more).arrays["losses"]


class _Asking:
    """A worker's tasks, for as long as the block lasts."""

    def __init__(self, worker: Worker):
        self._worker, self._asked = worker, 0

    def __enter__(self) -> "_Asking":
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.close()

    def __call__(self, task: str, **arguments: Any) -> Answer:
        self._asked += 1
        return self._worker.ask(task, save_as=f"{self._asked} {task}", progress=lambda done, of: None, **arguments)


def _in_turn(arms: Sequence[str], process: int) -> Iterator[str]:
    """Each arm once, starting with another one each time, so that none always runs on the warmest machine."""
    return (arms[(place + process) % len(arms)] for place in range(len(arms)))


def run(options: Throughput) -> bool:
    """Measures, prints, saves; whether every arm computes the right thing and none became slower."""
    options.check()
    console = terminal.console()
    old = throughput_report.load(options.compare) if options.compare else None
    differing = [
        name
        for name in ("weights", "work", "size", "rows", "precision")
        if old is not None and old["options"][name] != getattr(options, name)
    ]
    if old is not None and differing:
        raise RequestError(
            f"--compare {options.compare} measured other work: --{differing[0]} {old['options'][differing[0]]}"
        )
    measured = measure(options, terminal.console(stderr=True))
    throughput_report.show(measured, console)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, measured)
    if options.html is not None:
        throughput_report.write_page(measured, options.html)
    holds = not measured["failed"] and all(line["verdict"] != "bug" for line in measured["gate"].values())
    return holds and not (old is not None and throughput_report.slower(measured, old, console))
