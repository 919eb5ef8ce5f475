"""Runs rungs in order and stops at the first that fails: the two sides' processes, their files, the shared inputs."""

import contextlib
import dataclasses
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bit_jax.model import weights
from bit_jax.model.fine_tuned import described
from bit_jax.published import locate
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.examples import Source
from input_pipeline.sources import open_source
from input_pipeline.terminal import printable
from parity.faults import FAULTS
from parity.ladder.verdict import LEAST_DRAWS, Line, Verdict, relative_rmse, worst
from parity.options import Options
from parity.sides import classes, inputs
from parity.sides.side import parse_side
from parity.sides.worker import Answer, Arrays, Worker

ROLES = ("reference", "candidate")
RANDOM = "random:"
RANDOM_CLASSES = 100


@dataclasses.dataclass
class RungResult:
    """What one rung found.

    Attributes:
        name, lines: of the rung.
        findings: sentences, the first divergence among them.
        details: what its plots and tables are made of, in JSON's types.
        seconds: it took.
    """

    name: str
    lines: list[Line]
    findings: list[str] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        return worst([line.verdict for line in self.lines])


class Ladder:
    """One comparison: options in, processes and files inside; rungs ask it for answers.

    Attributes:
        options: as given.
        sides: {role: side}.
        folder: of the files that the processes exchange; gone afterwards.
        weight_file, architecture: of the model.
        fault: injected into one side, see `faults.py`; None: nothing is.
    """

    def __init__(self, options: Options, folder: Path, console: Console | None = None):
        self.options, self.folder = options, folder
        torch = {"model": options.torch_model, "state_dict": options.torch_weights and str(options.torch_weights)}
        self.sides = {
            "reference": parse_side(options.reference, **torch),
            "candidate": parse_side(options.candidate, **torch),
        }
        for side in self.sides.values():
            if options.rows % (side.devices * side.microbatches):
                raise RequestError(
                    f"--rows {options.rows} is not divisible by {side}'s devices x microbatches, "
                    f"{side.devices * side.microbatches}"
                )
        self.weight_file = self._weight_file()
        self.architecture, _ = weights.read(self.weight_file)
        self.fault: str | None = options.fault
        self._answers: dict[str, Answer] = {}
        self._asked = itertools.count()
        self._matchings: dict[tuple[str, str], classes.Matching] = {}
        self._workers: dict[tuple[str, str], Worker] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=(console := console or terminal.console(stderr=True)),
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Ladder":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
        for worker in self._workers.values():
            worker.close()

    def start(self, *precisions: str) -> None:
        """Starts both sides' processes, so that they import while others work."""
        for precision in precisions:
            for role in ROLES:
                self._worker(role, precision)

    def ask(self, role: str, precision: str, task: str, **arguments: Any) -> Answer:
        """One task on one side, or its answer if it was asked before."""
        if self.fault is not None and role == self._faulty_role:
            arguments |= {"fault": self.fault}
        request = json.dumps([role, precision, task, arguments], default=str)
        if request not in self._answers:
            bar = self._progress.add_task(f"{self.sides[role]}, {precision}: {task}", total=None)

            def progress(done: int, of: int) -> None:
                self._progress.update(bar, completed=done, total=of)

            worker, name = self._worker(role, precision), f"{next(self._asked):03d} {task}"
            try:
                self._answers[request] = worker.ask(task, save_as=name, progress=progress, **arguments)
            finally:
                self._progress.remove_task(bar)
        return self._answers[request]

    def both(self, precision: str, task: str, **arguments: Any) -> tuple[Arrays, Arrays]:
        """The arrays of the reference and of the candidate."""
        reference, candidate = (self.ask(role, precision, task, **arguments).arrays for role in ROLES)
        return reference, candidate

    def disturbed(self, task: str, amplitude: float, look: int = 0, **arguments: Any) -> list[Arrays]:
        """The reference's float64 arrays under each disturbance of that relative amplitude; every look has its own."""
        draws = max(self.options.disturbances, LEAST_DRAWS if look else 1)
        return [
            self.ask(
                "reference", "fp64", task, disturb=((self.options.seed, look, draw), amplitude), **arguments
            ).arrays
            for draw in range(draws)
        ]

    @contextlib.contextmanager
    def forgetting(self) -> Iterator[None]:
        """Answers that are asked for within are not kept: those of a large model fill a disk."""
        kept = dict(self._answers)
        try:
            yield
        finally:
            for answer in (answer for request, answer in self._answers.items() if request not in kept):
                answer.discard()
            self._answers = kept

    def say(self, sentence: str) -> None:
        """A line for people, above the progress bars."""
        self._progress.console.print(printable(sentence))

    def pictures(self, look: int = 0) -> Path:
        """Batches of pictures, for the rungs of single batches; every look has others."""
        options = self.options
        path = self.folder / f"pictures {options.seed} {look}.npz"
        if not path.exists():
            height, width = options.height_width
            first = options.seed + look * options.batches
            parts = [
                inputs.picture_batch(options.rows, height, width, self.architecture.num_classes, first + number)
                for number in range(options.batches)
            ]
            _save(path, inputs.joined(parts))
        return path

    def dataset_batches(self, look: int = 0) -> Path:
        """Batches of the dataset, for the curve; every look has them in another order."""
        options = self.options
        path = self.folder / f"batches {options.seed} {look}.npz"
        if not path.exists():
            source = self.source(options.train_split)
            size = options.height_width
            _save(path, inputs.dataset_batches(source, options.steps, options.rows, *size, options.seed + look))
        return path

    def mixed_pictures(self, look: int = 0) -> Path:
        return self.ask("reference", "fp64", "mix", batches=self.pictures(look)).arrays.path

    def mixed_batches(self, look: int = 0) -> Path:
        """The reference's dataset batches after mixup: what both sides replay."""
        return self.ask("reference", "fp64", "mix", batches=self.dataset_batches(look)).arrays.path

    def source(self, split: str) -> Source:
        """A split of the dataset under the head's labels.

        Raises:
            RequestError: there is no such split, or its classes are not the head's.
        """
        options = self.options
        return classes.open_labelled(options.dataset, split, options.data_dir, self.matching(split).class_names)

    def matching(self, split: str) -> classes.Matching:
        """How a split's labels are matched to the head's."""
        options = self.options
        key = options.dataset, split
        if key not in self._matchings:
            self._matchings[key] = classes.matching(
                open_source(options.dataset, split, options.data_dir),
                options.weights,
                self.weight_file,
                self.architecture.num_classes,
                arbitrary=options.weights.startswith(RANDOM),
            )
        return self._matchings[key]

    @functools.cached_property
    def eval_size(self) -> int:
        """Side of the square images that evaluation shows: asked for, or what the weights were trained with."""
        crop = None if self.options.weights.startswith(RANDOM) else described(self.weight_file).crop
        return self.options.eval_size or crop or max(self.options.height_width)

    @functools.cached_property
    def amplitude(self) -> float:
        """Relative size of disturbances, at which a float64 forward pass errs as the better of the two sides does.

        It is measured, not assumed, because rounding after every layer is more than rounding once.
        """
        precision = self.options.precision
        arguments = {"images": self.pictures()}
        oracle = self.ask("reference", "fp64", "forward", **arguments).arrays
        results = self.both(precision, "forward", **arguments)
        unit = ULP[precision]
        response = self.ask("reference", "fp64", "forward", disturb=((0, 0), unit), **arguments).arrays
        one = [relative_rmse(oracle[site], response[site]) for site in oracle.names]
        errs = [
            float(np.median([relative_rmse(oracle[s], result[s]) / r for s, r in zip(oracle.names, one, strict=True)]))
            for result in results
        ]
        return unit * min(errs)

    @property
    def amplitude_in_ulp(self) -> float:
        return self.amplitude / ULP[self.options.precision]

    @property
    def _faulty_role(self) -> str:
        """The side that has the fault: the candidate, if its framework is the one that the fault is written for."""
        framework = FAULTS[self.fault].framework if self.fault else None
        return next(role for role in reversed(ROLES) if self.sides[role].framework == framework)

    def _worker(self, role: str, precision: str) -> Worker:
        key = role, precision
        if key not in self._workers:
            side = self.sides[role]
            self._workers[key] = Worker(side, precision, self.weight_file, self.folder / f"{role}-{precision}")
        return self._workers[key]

    def _weight_file(self) -> Path:
        name = self.options.weights
        if not name.startswith(RANDOM):
            return locate.weight_file(name).absolute()
        path = self.folder / "random.npz"
        inputs.random_weights(path, name.removeprefix(RANDOM), RANDOM_CLASSES, self.options.seed)
        return path


def _save(path: Path, batches: inputs.Batches) -> None:
    arrays: dict[str, Any] = batches.arrays()
    np.savez(path, **arrays)


# The spacing of floating-point numbers at 1; TF32 and float16 keep 10 bits behind the point, bfloat16 7.
ULP = {"fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10, "fp64": 2.0**-52}


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        yield Path(folder)


def timed(rung: Any, ladder: Ladder) -> RungResult:
    start = time.perf_counter()
    result = rung(ladder)
    result.seconds = time.perf_counter() - start
    return result
