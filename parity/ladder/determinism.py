"""Does a side compute the same bits every time? The same work in several processes, each of which compiles it anew.

Compilers choose algorithms by timing them, and sums on a GPU may be added in another order each time, so that two
processes, or two calls in one, need not agree in the last bits.
"""

import contextlib
import dataclasses
import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from bit_jax.model.architecture import Architecture
from input_pipeline.errors import RequestError
from input_pipeline.files import write_json
from input_pipeline.flags import UserPath, require_positive, typed
from input_pipeline.terminal import printable
from parity.ladder.divergence import depth, sites_behind
from parity.ladder.kept import relative_rmse
from parity.ladder.ladder import Ladder, working_folder
from parity.options import Options
from parity.sides.operations import operations
from parity.sides.side import parse_side
from parity.sides.worker import Answer, Arrays, Worker


@dataclasses.dataclass(frozen=True)
class Determinism:
    """The side and the work that is repeated."""

    side: str = "jax:tuned"
    """Side to repeat, written like --candidate of a comparison.
    With `deterministic`, as in jax:tuned,deterministic, a GPU is asked for the same bits every time."""
    processes: int = 3
    """Processes that do the same work, each of which compiles it by itself. The first one does it twice."""
    weights: str = "embedded"
    """Weights to compute with: a published name, the path of an .npz, `embedded`, or random:R50x1 for random ones."""
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"
    """Precision to compute in."""
    torch_model: str | None = None
    """PyTorch model to repeat in place of this project's, as package.module:factory."""
    size: str = "64"
    """Side in pixels of the square images, or 97x131 for height x width."""
    rows: int = 8
    """Images per batch; the number must be even."""
    steps: int = 5
    """Number of training steps."""
    seed: int = 0
    """Seed of the images."""
    json: UserPath | None = None
    """File to write the result to. None: it is only shown."""

    def __post_init__(self):
        if self.processes < 2:
            raise RequestError(f"--processes {self.processes} must be at least 2, or there is nothing to compare")
        require_positive(typed(self, "steps"))  # as `batches` of a comparison it would be refused by another name

    @property
    def options(self) -> Options:
        """A comparison of the side with itself, on as many batches as there are steps."""
        return Options(
            weights=self.weights,
            precision=self.precision,
            reference=self.side,
            candidate=self.side,
            torch_model=self.torch_model,
            size=self.size,
            rows=self.rows,
            batches=self.steps,
            steps=self.steps,
            seed=self.seed,
        )


Flags = Annotated[Determinism, tyro.conf.OmitArgPrefixes]


@dataclasses.dataclass(frozen=True)
class Repetition:
    """One task's arrays in another run, held against those of the first run.

    Attributes:
        task, run: names of the task and of the other run.
        arrays: number of arrays.
        differing: names of those whose bits differ, in the order of computation.
        first_error: the root mean square of the difference of the first of them, relative to that of the array; None if
            nothing differs, or if the array is not finite.
        operation: the first operation that differs, in a pass that records those of the first unit that differs; empty
            if nothing differs, or nothing does in that pass.
    """

    task: str
    run: str
    arrays: int
    differing: list[str]
    first_error: float | None
    operation: str = ""

    def __str__(self) -> str:
        if not self.differing:
            return f"{self.task}, {self.run}: the same bits in {self.arrays} arrays"
        by = "which is not finite" if self.first_error is None else f"by {self.first_error:.1e}"
        first = f"the first is {self.differing[0]}, {by}"
        first += f", from {self.operation} on" if self.operation else ""
        return f"{self.task}, {self.run}: {len(self.differing)} of {self.arrays} arrays differ; {first}"


def run(request: Determinism, console: Console) -> bool:
    """Repeats the work, shows and saves what differs; returns whether nothing does.

    Raises:
        RequestError: the side, the weights or the images are not possible.
        RunFailed: a process died.
    """
    repetitions = repeat(request, console)
    table = Table("task", "run", "arrays", "differing", "first that differs", "by", "from")
    for repetition in repetitions:
        counts = str(repetition.arrays), str(len(repetition.differing))
        error = "" if repetition.first_error is None else f"{repetition.first_error:.1e}"
        first = printable(next(iter(repetition.differing), ""))
        table.add_row(repetition.task, repetition.run, *counts, first, error, repetition.operation)
    console.print(table)
    same = not any(repetition.differing for repetition in repetitions)
    times = f"in {request.processes} processes, and twice in the first"
    side = f"{request.side} in {request.precision}"
    console.print(f"THE SAME BITS: {side}, {times}" if same else f"DIFFERS: {side}, {times}", markup=False)
    if request.json is not None:
        request.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(request.json, _report(request, repetitions, same))
    return same


def repeat(request: Determinism, console: Console) -> list[Repetition]:
    """Does the work in the first process twice and in each of the others once; see `run` for the errors."""
    parse_side(request.side)  # an exported file and a probe, which a comparison takes, are refused
    options, repetitions = request.options, []
    with working_folder() as folder, contextlib.ExitStack() as stack:
        ladder = stack.enter_context(Ladder(options, folder, console))
        side = ladder.sides["reference"]
        places = [folder / f"process {number}" for number in range(1, request.processes + 1)]
        workers = [Worker(side, options.precision, ladder.weight_file, place, alone=True) for place in places]
        for worker in workers:
            stack.callback(worker.close)
        mixed = _ask(workers[0], "mix", "mix", batches=ladder.pictures()).arrays.path
        training = {"count": options.steps, "schedule": options.schedule, "momentum": options.momentum}
        tasks: dict[str, dict[str, Any]] = {
            "forward": {"images": ladder.pictures()},
            "gradients": {"mixed": mixed, "count": 1},
            "curve": {"mixed": mixed} | training,
        }
        for task, arguments in tasks.items():
            first = _ask(workers[0], task, task, **arguments)
            runs = [(workers[0], "process 1 again")]
            runs += [(worker, f"process {number}") for number, worker in enumerate(workers[1:], start=2)]
            for worker, name in runs:
                other = _ask(worker, task, f"{task} again", **arguments)
                repetition = compare(task, name, first.arrays, other.arrays)
                if repetition.differing and task != "curve":
                    operation = _operation(workers[0], worker, mixed, repetition, ladder.architecture)
                    repetition = dataclasses.replace(repetition, operation=operation)
                repetitions.append(repetition)
                ladder.say(str(repetitions[-1]))
                other.discard()
            first.discard()
    return repetitions


def compare(task: str, run: str, first: Arrays, other: Arrays) -> Repetition:
    """Compares the bits of two answers' arrays: zeros of different signs differ, and NaNs of the same bits do not."""
    # units come in the order of computation; gradients, and the parameters that they change, in the opposite one
    names = first.names if task == "forward" else sorted(first.names, key=_depth, reverse=True)
    differing = [name for name in names if first[name].tobytes() != other[name].tobytes()]
    error = relative_rmse(first[differing[0]].astype(np.float64), other[differing[0]]) if differing else None
    return Repetition(task, run, len(names), differing, error if error is not None and np.isfinite(error) else None)


def _operation(first: Worker, other: Worker, mixed: Path, repetition: Repetition, architecture: Architecture) -> str:
    """Returns the first operation that differs in the unit of the first array that does, on the way forward or back;
    see `Repetition`."""
    name, forward = repetition.differing[0], repetition.task == "forward"
    for site in [name] if forward else sites_behind(name[name.find("resnet/") :], architecture):
        recorded = [
            _ask(worker, "operations", f"{site} {number}".replace("/", " "), mixed=mixed, site=site).arrays
            for number, worker in enumerate((first, other))
        ]
        ours, theirs = recorded
        names = list(operations(site, architecture.layout))
        keys = [f"{name}, value" for name in names] if forward else [f"{name}, gradient" for name in reversed(names)]
        for key in keys:
            if key in ours and key in theirs and ours[key].tobytes() != theirs[key].tobytes():
                return key.rpartition(", ")[0]
    return ""


def _depth(name: str) -> tuple:
    return depth(name[max(name.find("resnet/"), 0) :])


def _ask(worker: Worker, task: str, save_as: str, **arguments: Any) -> Answer:
    return worker.ask(task, save_as=save_as, progress=lambda done, of: None, **arguments)


def _report(request: Determinism, repetitions: list[Repetition], same: bool) -> dict[str, Any]:
    return {
        "side": request.side,
        "precision": request.precision,
        "weights": request.weights,
        "size": request.size,
        "rows": request.rows,
        "steps": request.steps,
        "processes": request.processes,
        "same": same,
        "when": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "repetitions": [dataclasses.asdict(repetition) for repetition in repetitions],
    }
