"""Times arms of JAX and PyTorch on the same work, after a check that each arm computes the right losses."""

import contextlib
import dataclasses
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bit_jax.formats import weights
from input_pipeline import terminal
from input_pipeline.bench import CROP, RESIZE_TO
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.files import write_json
from input_pipeline.sources import open_source
from input_pipeline.terminal import printable
from parity import faults
from parity.ladder.ladder import ULP, working_folder
from parity.ladder.verdict import MULTIPLE, Line, Look, Verdict, calibrated, look, look_again
from parity.sides import clock, inputs
from parity.sides.side import Side, parse_side
from parity.sides.weights import weight_file
from parity.sides.worker import Answer, Worker
from parity.throughput.request import RANDOM_CLASSES, Throughput
from parity.throughput.summary import Ceilings, rate, summarize

BATCHES = 3  # batches that are worked on in turn
# Learning rate of the loss check's steps. At 0.003, a rate that trains, a random R50x1's third loss is chaotic: correct
# arms err by 7e-5 to 3.4e-4, and the one with the smallest error by luck decides the others' limit. At this rate they
# err by at most a quarter of their limits.
LOSS_CHECK_LR = 1e-4
ORACLE = Side("torch")  # side that computes in float64
DISTURBANCES = 3  # disturbances of float64 in each look of the loss check
LOSSES_AGREE = 0.02  # relative difference that `--loss-check losses` allows


def measure(options: Throughput, console: Console) -> dict[str, Any]:
    """Measures all arms and returns the report, in JSON's types.

    An arm whose process fails, for example because it runs out of memory, is left out and named in the report; the
    other arms go on.

    Raises:
        RunFailed: no arm computes the right losses, or every arm failed.
    """
    with working_folder() as folder:
        bench = _Bench(options, folder)
        loss_check = bench.loss_check(console) if options.loss_check == "float64" else {}
        wrong = [arm for arm, line in loss_check.items() if line.verdict == "bug"]
        timed = "is WRONG, and timed all the same" if options.time_anyway else "is not timed"
        for arm in wrong:
            console.print(f"{arm} {timed}: {loss_check[arm].note}", style="bold red")
        left_out = [] if options.time_anyway else wrong
        arms = [arm for arm in bench.sides if arm not in (*left_out, *bench.failed)]
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
        if options.loss_check == "losses":
            loss_check = _same_losses(options, {arm: times[0]["losses"] for arm, times in measured.items()})
        return summarize(options, bench.architecture, bench.failed, loss_check, measured, ceilings)


Round = tuple[int, str, dict[str, Any]]  # (number of the round, arm, what its process timed)


def _one_by_one(bench: "_Bench", arms: Sequence[str], ceilings: Ceilings, console: Console) -> Iterator[Round]:
    """Starts a new process for each arm in each round; yields what each timed."""
    for number in range(bench.options.processes):
        for arm in _in_turn(arms, number):
            side = bench.sides[arm]
            with bench.may_fail(arm, console), bench.process(side, bench.options.precision, "timed") as ask:
                times = ask(f"{bench.options.work}_time", **bench.timed_arguments).info
                ceilings.setdefault((side.framework, side.devices), []).append(bench.ceiling(ask))
                yield number, arm, times


def _together(bench: "_Bench", arms: Sequence[str], ceilings: Ceilings, console: Console) -> Iterator[Round]:
    """Starts one process for each arm and keeps all of them, of which one works at a time; yields what each timed in
    each round."""
    options = bench.options
    with contextlib.ExitStack() as stack:
        asks = {arm: stack.enter_context(bench.process(bench.sides[arm], options.precision, "timed")) for arm in arms}
        firsts: dict[str, dict[str, Any]] = {}
        for arm, ask in asks.items():
            key = bench.sides[arm].framework, bench.sides[arm].devices
            with bench.may_fail(arm, console):
                firsts[arm] = ask(f"{options.work}_time", **(bench.timed_arguments | {"seconds": 0})).info
                if key not in ceilings:
                    ceilings[key] = [bench.ceiling(ask)]
                console.print(f"{arm} has compiled, {firsts[arm]['first']:.0f} s")
        for number in range(options.processes):
            for arm in _in_turn([arm for arm in firsts if arm not in bench.failed], number):
                with bench.may_fail(arm, console):
                    yield number, arm, firsts[arm] | asks[arm]("again", seconds=options.seconds).info


def _same_losses(options: Throughput, losses: dict[str, list[float]]) -> dict[str, Line]:
    """Returns {arm: verdict on its first loss}, which must be the median of the PyTorch arms' first losses within
    LOSSES_AGREE.

    Later losses depend too much on rounding: a random R14x0.5's third loss in float32 differs by 2 %.
    """
    firsts = {arm: of_steps[0] for arm, of_steps in losses.items()}
    expected = statistics.median(loss for arm, loss in firsts.items() if parse_side(arm).framework == "torch")
    lines = {}
    for arm, loss in firsts.items():
        apart = abs(loss / expected - 1)
        right = apart <= LOSSES_AGREE  # False for NaN
        verdict: Verdict = "rounding" if right else "bug"
        note = "" if right else f"its first loss is {loss:.6g}, PyTorch's {expected:.6g}"
        lines[arm] = Line("loss", arm, options.precision, verdict, apart, LOSSES_AGREE, note=note)
    return lines


class _Bench:
    """One measurement: the arms' inputs and their processes.

    Attributes:
        options, folder: the request, and the folder that the files are written to.
        weight_file, architecture: the model's weights and its architecture.
        sides: {arm: side}.
        failed: {arm: error}, for each arm of which a process failed.
        checked, mixed: files of the batches that the loss check and the clock use.
    """

    def __init__(self, options: Throughput, folder: Path):
        self.options, self.folder = options, folder
        self.weight_file = weight_file(options.weights, folder, random_classes=RANDOM_CLASSES, seed=options.seed)
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
        self._float64 = self.process(ORACLE, "fp64", "loss_check")
        self.checked = self._batches(options.checked_rows)
        self.mixed = self.checked if options.checked_rows == options.rows else self._batches(options.rows)

    def _batches(self, rows: int, look: int = 0) -> Path:
        """Returns a file of BATCHES batches of so many rows, normalized and mixed; every look has other images."""
        options, classes = self.options, self.architecture.num_classes
        first = options.seed + look * BATCHES
        batches = inputs.picture_batches(rows, options.size, options.size, classes, range(first, first + BATCHES))
        batches.save(path := self.folder / f"batches of {rows}, {look}.npz")
        return self._float64("mix", batches=path).arrays.path

    @property
    def timed_arguments(self) -> dict[str, Any]:
        """Arguments of the task that is timed."""
        options = self.options
        if options.folder is None:
            return {"mixed": self.mixed, "count": BATCHES, "seconds": options.seconds}
        resize = round(options.size * RESIZE_TO / CROP)
        shown = {"resize": resize, "crop": options.size, "rows": options.rows}
        return {"folder": f"folder:{options.folder.absolute()}", "steps": options.steps, **shown}

    def ceiling(self, ask: "_Process") -> float:
        """Returns the FLOP/s of matrix products in a process, for which no more time is taken than for its arm."""
        return ask("ceiling", seconds=min(self.options.seconds, clock.CEILING_SECONDS)).info

    def process(self, side: Side, precision: str, phase: str) -> "_Process":
        """Starts a process of a side. What it compiles is kept for the side's later processes of the same phase."""
        self._started += 1
        folder = self.folder / phase / re.sub(r"\W", "_", str(side)) / f"{self._started:03d}"
        return _Process(Worker(side, precision, self.weight_file, folder))

    @contextlib.contextmanager
    def may_fail(self, arm: str, console: Console) -> Iterator[None]:
        """Leaves the block at a process's failure, which is printed and kept in `failed`."""
        try:
            yield
        except RunFailed as error:
            self.failed[arm] = str(error)
            console.print(f"{arm} failed: {printable(error)}", style="bold red")

    def no_arm_left(self) -> RunFailed:
        """Returns the error that says that every arm failed."""
        return RunFailed(f"every arm failed: {next(iter(self.failed.values()))}")

    def loss_check(self, console: Console) -> dict[str, Line]:
        """Judges every arm's losses, of a training step on each batch or of each row forward; returns {arm: verdict}.

        An arm's error against float64 is judged beside the best of the other arms'. Arms in doubt are looked at again,
        on other batches.
        """

        def again(number: int, doubtful: list[str]) -> dict[str, Look]:
            console.print(
                f"{', '.join(doubtful)}: beyond the limit, by chance perhaps; looking again, at other batches"
            )
            others = [arm for arm in self.sides if arm not in (*doubtful, *self.failed)]
            looks = self._look(number, doubtful + others[:1], console)
            return {arm: look for arm, look in looks.items() if arm in doubtful}

        def judge(arm: str, looks: list[Look]) -> Line:
            line = calibrated("loss", arm, self.options.precision, looks)
            if line.verdict == "bug" and line.note.startswith("the reference"):  # another arm errs, not this one
                line = dataclasses.replace(line, verdict="rounding", note="")
            return line

        with self._float64:
            lines = look_again(self._look(0, list(self.sides), console), again, judge)
        return {line.name: line for line in lines if line.name not in self.failed}

    def _look(self, number: int, arms: Sequence[str], console: Console) -> dict[str, Look]:
        """Returns how much each arm's losses err on one set of batches."""
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
            with self.may_fail(arm, console), self.process(side, precision, "loss_check") as ask:
                losses[arm] = self._losses(ask, batches, fault=fault)
        looks = {}
        for arm, of_arm in losses.items():
            others = [of_other for other, of_other in losses.items() if other != arm] or [of_arm]
            best = min(others, key=lambda of_other: float(np.abs(of_other - exact).max()))
            looks[arm] = look([exact], [best], [of_arm], [[of_draw] for of_draw in disturbed])
            console.print(f"{arm}: its loss is {looks[arm].candidate[0]:.1e} off float64's")
        return looks

    def _losses(self, ask: "_Process", batches: Path, **more: Any) -> np.ndarray:
        if self.options.work == "forward":
            return ask("loss", mixed=batches, **more).arrays["loss of each row"]
        training = {
            "schedule": clock.SCHEDULE | {"base_lr": LOSS_CHECK_LR},
            "momentum": clock.MOMENTUM,
            "count": BATCHES,
        }
        return ask("curve", mixed=batches, **training, **more).arrays["losses"]


class _Process:
    """A worker's process, which is called with tasks and ends with the `with` block."""

    def __init__(self, worker: Worker):
        self._worker, self._asked = worker, 0

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.close()

    def __call__(self, task: str, **arguments: Any) -> Answer:
        self._asked += 1
        return self._worker.ask(task, save_as=f"{self._asked} {task}", progress=lambda done, of: None, **arguments)


def _in_turn(arms: Sequence[str], number: int) -> Iterator[str]:
    """Yields each arm once, starting with another arm in each round: otherwise the same arm would always run when the
    machine is warmest."""
    return (arms[(place + number) % len(arms)] for place in range(len(arms)))


def run(options: Throughput) -> bool:
    """Measures, prints and saves; returns whether every arm computes the right losses and none became slower."""
    from parity.throughput import report as throughput_report  # draws with matplotlib, which takes long to import

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
    holds = not measured["failed"] and all(line["verdict"] != "bug" for line in measured["loss_check"].values())
    return holds and not (old is not None and throughput_report.slower(measured, old, console))
