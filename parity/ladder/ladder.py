"""One comparison: the two sides' processes, the files they exchange, and the inputs that both are given."""

import contextlib
import dataclasses
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bit_jax.formats import weights
from bit_jax.formats.described import described
from bit_jax.training import trained
from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.examples import Source
from input_pipeline.image_file import read_image_file
from input_pipeline.sources import open_source
from input_pipeline.terminal import printable
from parity.faults import FAULTS
from parity.ladder.kept import relative_rmse
from parity.ladder.reference import Live, Reference
from parity.ladder.verdict import LEAST_DRAWS, ULP, Line, Verdict, worst
from parity.options import Options
from parity.sides import classes, inputs
from parity.sides.side import HEAD, parse_side
from parity.sides.weights import RANDOM, weight_file
from parity.sides.worker import Answer, Arrays, Worker

ROLES = ("reference", "candidate")
RANDOM_CLASSES = 100  # classes of a random model's head


@dataclasses.dataclass
class RungResult:
    """The result of one rung.

    Attributes:
        name: name of the rung.
        lines: verdicts on its arrays.
        findings: sentences on what differs and where it differs first.
        details: data of its plots and tables, in JSON's types, and `arrays`, which are saved in a file of their own.
        seconds: seconds that the rung took.
    """

    name: str
    lines: list[Line]
    findings: list[str] = dataclasses.field(default_factory=list)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict of the lines."""
        return worst([line.verdict for line in self.lines])


class Ladder:
    """One comparison, which rungs ask for both sides' answers. Its processes end with the `with` block.

    Attributes:
        options: options of the comparison.
        roles: roles of the sides that have processes here: both, unless one side's answers are recorded.
        sides: {role: side} of these roles.
        exported: role of the side that is an exported file, or None.
        reference: the reference's answers to questions.
        reads: names of the rungs that read a dataset here.
        folder: folder with the files that the processes exchange.
        weight_file, architecture: the model's weights and its architecture.
        fault: name of the fault that is injected into one side, see `faults.py`, or None.
    """

    roles: tuple[str, ...] = ROLES
    reads: tuple[str, ...] = ("curve", "accuracy")

    def __init__(self, options: Options, folder: Path, console: Console | None = None):
        self.options, self.folder = options, folder
        self.reference: Reference = Live(self)
        torch = {"model": options.torch_model, "state_dict": options.torch_weights and str(options.torch_weights)}
        named = {"reference": options.reference, "candidate": options.candidate}
        self.sides = {role: parse_side(named[role], **torch, exported=True, probe=True) for role in self.roles}
        files = [role for role, side in self.sides.items() if side.file is not None]
        if len(files) > 1:
            raise RequestError(
                f"{options.reference} and {options.candidate} are both exported files, and nothing would compute in "
                "float64, which judges them; give torch or jax for one of them"
            )
        self.exported: str | None = files[0] if files else None
        if files and options.additions.label_smoothing:
            raise RequestError("--label-smoothing is training's, and an exported file does not train; leave it out")
        for side in self.sides.values():
            if side.probe and options.additions.train != HEAD:
                raise RequestError(
                    f"side {side} trains the head alone, as does the other side with --train head; add it"
                )
            if options.rows % (side.devices * side.microbatches):
                raise RequestError(
                    f"--rows {options.rows} is not divisible by {side}'s devices x microbatches, "
                    f"{side.devices * side.microbatches}"
                )
        for path in options.images:
            read_image_file(path)  # one that cannot be read is refused before anything is started
        self.weight_file = self._weights()
        self.architecture, _ = weights.read(self.weight_file)
        trained.require(self.architecture.layout, options.additions.train)
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
        for answer in self._answers.values():
            answer.close()
        for worker in self._workers.values():
            worker.close()

    @property
    def names(self) -> dict[str, str]:
        """{role: the side as reports name it}."""
        return {role: str(side) for role, side in self.sides.items()}

    def start(self, *precisions: str) -> None:
        """Starts the sides' processes of those precisions, so that they import their frameworks at the same time."""
        for precision in precisions:
            for role in [role for role in self.roles if role in self.computing(precision)]:
                self._worker(role, precision)

    def computing(self, precision: str) -> list[str]:
        """Returns the roles of the sides that compute in a precision. An exported file computes in one, which is the
        precision asked for, and the other side's float64 judges it."""
        return [role for role in ROLES if role != self.exported or precision == self.options.precision]

    @property
    def oracle(self) -> str:
        """Role of the side whose float64 judges both: the reference, unless it is an exported file."""
        return self.computing("fp64")[0]

    def ask(self, role: str, precision: str, task: str, **arguments: Any) -> Answer:
        """Runs a task on one side and returns its answer; an equal request is answered without running it again."""
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

    def disturbed(self, task: str, amplitude: float, look: int = 0, **arguments: Any) -> list[Arrays]:
        """Returns the oracle's float64 arrays under each of several disturbances of that relative amplitude.

        Every look has its own disturbances.
        """
        draws = max(self.options.disturbances, LEAST_DRAWS if look else 1)
        return [
            self.ask(
                self.oracle, "fp64", task, disturb=((self.options.seed, look, draw), amplitude), **arguments
            ).arrays
            for draw in range(draws)
        ]

    @contextlib.contextmanager
    def forgetting(self) -> Iterator[None]:
        """Removes the files of new answers at the end of the block: those of a large model fill a disk."""
        kept = dict(self._answers)
        try:
            yield
        finally:
            for answer in (answer for request, answer in self._answers.items() if request not in kept):
                answer.discard()
            self._answers = kept

    def both(self, precision: str, task: str, **arguments: Any) -> tuple[Arrays, Arrays]:
        """Returns the arrays with which the reference and the candidate answer, if both have processes."""
        reference, candidate = (self.ask(role, precision, task, **arguments).arrays for role in ROLES)
        return reference, candidate

    def say(self, sentence: str) -> None:
        """Prints a line above the progress bars."""
        self._progress.console.print(printable(sentence))

    def image_files(self) -> list[Path]:
        """Returns the image files of the pixels rung: --images, or some that are drawn."""
        return list(self.options.images) or inputs.write_files(self.folder / "files")

    def pictures(self, look: int = 0) -> Path:
        """Returns the file of generated pictures in --batches batches; every look has other pictures."""
        options = self.options
        path = self.folder / f"pictures {options.seed} {look}.npz"
        if not path.exists():
            height, width = options.height_width
            first = options.seed + look * options.batches
            seeds = range(first, first + options.batches)
            inputs.picture_batches(options.rows, height, width, self.architecture.num_classes, seeds).save(path)
        return path

    def dataset_batches(self, look: int = 0) -> Path:
        """Returns the file of the dataset's batches for the curve rung; every look has them in another order."""
        options = self.options
        path = self.folder / f"batches {options.seed} {look}.npz"
        if not path.exists():
            source = self.source(options.train_split)
            size = options.height_width
            inputs.dataset_batches(source, options.steps, options.rows, *size, options.seed + look).save(path)
        return path

    def mixed_pictures(self, look: int = 0) -> Path:
        """Returns the file of the picture batches after the oracle's mixup, which both sides are given."""
        return self.ask(self.oracle, "fp64", "mix", batches=self.pictures(look)).arrays.path

    def mixed_batches(self, look: int = 0) -> Path:
        """Returns the file of the dataset's batches after the oracle's mixup, which both sides replay."""
        return self.ask(self.oracle, "fp64", "mix", batches=self.dataset_batches(look)).arrays.path

    def gradients(self) -> Path:
        """Returns the file of the picture batches' float64 gradients, which both sides' optimizers are given."""
        arguments = {"mixed": self.mixed_pictures(), "count": self.options.batches} | self.options.added
        return self.ask("reference", "fp64", "gradients", **arguments).arrays.path

    def source(self, split: str) -> Source:
        """Opens a split of the dataset, with labels that are numbers of the head's classes.

        Raises:
            RequestError: there is no such split, or its classes are not the head's.
        """
        options = self.options
        return classes.open_labelled(options.dataset, split, options.data_dir, self.matching(split).class_names)

    def matching(self, split: str) -> classes.Matching:
        """Matches a split's classes to the head's.

        Raises:
            RequestError: there is no such split, or its classes are not the head's.
        """
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
        """Side in pixels of the square images in evaluation: --eval-size, or what the weights were trained with."""
        crop = None if self.options.weights.startswith(RANDOM) else described(self.weight_file).crop
        return self.options.eval_size or crop or max(self.options.height_width)

    @functools.cached_property
    def one_ulp(self) -> dict[str, float]:
        """{unit: relative RMSE of float64's output if every weight and pixel is disturbed by one ulp of the precision
        asked for}."""
        arguments = {"images": self.pictures()}
        exact = self.ask(self.oracle, "fp64", "forward", **arguments).arrays
        disturb = (0, 0), ULP[self.options.precision]
        disturbed = self.ask(self.oracle, "fp64", "forward", disturb=disturb, **arguments).arrays
        return {site: relative_rmse(exact[site], disturbed[site]) for site in exact.names}

    @functools.cached_property
    def amplitude_in_ulp(self) -> float:
        """Relative size of disturbances under which float64's forward pass errs as much as the better side does, in
        units in the last place of the precision asked for.

        It is measured, not assumed, because rounding after every layer errs more than rounding once. Float64 is
        disturbed by one ulp, and that ulp is scaled by the median over the units of a side's error to float64's.
        """
        return min(self.ulps(role) for role in self.roles)

    def ulps(self, role: str) -> float:
        """Returns `amplitude_in_ulp` of one side alone; one that shows no units has logits alone."""
        pictures = self.pictures()
        exact = self.ask(self.oracle, "fp64", "forward", images=pictures).arrays
        side = self.ask(role, self.options.precision, "forward", images=pictures).arrays
        errors = {site: relative_rmse(exact[site], side[site]) for site in exact.names if site in side}
        return median_ulps(errors, self.one_ulp)

    @property
    def amplitude(self) -> float:
        """`amplitude_in_ulp` as a relative size."""
        return self.amplitude_in_ulp * ULP[self.options.precision]

    @property
    def _faulty_role(self) -> str:
        """Role of the side that has the fault: the candidate, unless the fault is written for the other framework."""
        framework = FAULTS[self.fault].framework if self.fault else None
        return next(role for role in reversed(self.roles) if self.sides[role].framework == framework)

    def _weights(self) -> Path:
        """Returns the path of the weights, as an official `.npz`."""
        options = self.options
        return weight_file(options.weights, self.folder, random_classes=RANDOM_CLASSES, seed=options.seed)

    def _worker(self, role: str, precision: str) -> Worker:
        """Returns a side's process of that precision, which is started if there is none."""
        key = role, precision
        if key not in self._workers:
            side = self.sides[role]
            self._workers[key] = Worker(side, precision, self.weight_file, self.folder / f"{role}-{precision}")
        return self._workers[key]


def median_ulps(errors: dict[str, float], of_one_ulp: dict[str, float]) -> float:
    """Returns the median over the units of the ratio of a side's error to that of a disturbance by one ulp."""
    return float(np.median([error / of_one_ulp[site] for site, error in errors.items()]))


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """Makes a temporary folder, which is removed at the end of the block."""
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        yield Path(folder)


def timed(rung: Callable[[Ladder], RungResult], ladder: Ladder) -> RungResult:
    """Runs a rung and returns its result with the seconds that it took."""
    start = time.perf_counter()
    result = rung(ladder)
    result.seconds = time.perf_counter() - start
    return result
