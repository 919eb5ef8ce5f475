"""Measures what an optional part of a run costs, such as local copies: `python benchmarks/overhead.py --of local`.

By default a single run has that part in every other interval, so that other load on the machine falls on both kinds of
intervals alike. With --how runs, whole runs without the part and with it take turns, each in a process of its own; that
needs a quiet machine.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import tyro
from rich.table import Table

from input_pipeline import terminal
from input_pipeline.errors import RunFailed
from input_pipeline.exits import exit_code
from input_pipeline.files import read_json, write_json

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "overhead.json"
MEMORY = Path("/dev/shm")
WITHOUT, WITH = "without", "with"
IMAGES, PROCESSORS = "images/s", "processors' seconds a step"
SETTLING = 2  # intervals at the start of a run that are left out: something is compiled in them


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags: they say which part of a run is measured, and how."""

    of: Literal["local"] = "local"
    """Part of a run whose cost is measured. local: --local-checkpoints in /dev/shm, every --every steps."""
    how: Literal["turns", "runs"] = "turns"
    """How it is measured. turns: in one run, which has the part in every other interval;
    runs: whole runs take turns."""
    every: int = 5
    """Number of steps in an interval."""
    rounds: int = 20
    """Number of intervals, or of runs, without the part; there are as many with it."""
    model: str = "R26x1"
    """Architecture, with random parameters."""
    size: int = 64
    """Side of the images, in pixels."""
    batch: int = 16
    """Rows of a batch."""
    steps: int = 60
    """Steps of a run, with --how runs."""
    output: Path = RESULTS
    """JSON file that receives the figures; what it holds of other measurements is kept."""

    def command(self, workdir: Path, steps: int) -> list[str]:
        """Returns the arguments of train.py for a run of so many steps without the part that is measured."""
        return (
            f"digits --dataset synthetic --eval-split test[:{self.batch}] --model {self.model} --init random "
            f"--global-batch {self.batch} --resize-to {self.size} --crop {self.size} --steps {steps} --warmup-steps 1 "
            f"--decay-steps {steps} --eval-every {steps} --log-every {steps} --checkpoint-every {steps} "
            f"--workdir {workdir}"
        ).split()


@dataclasses.dataclass(frozen=True)
class Feature:
    """A part of a run that costs time.

    Attributes:
        flags: (options, an empty folder in memory) -> the flags that turn it on.
        every_other: context in which it happens only every other time that it is due, beginning with the first;
            `now()` is appended to the list whenever it is due.
    """

    flags: Callable[[Options, Path], list[str]]
    every_other: Callable[[list[tuple[float, float]]], contextlib.AbstractContextManager]


def now() -> tuple[float, float]:
    """Returns the seconds of the clock, and the processors' seconds of this process."""
    return time.perf_counter(), time.process_time()


@contextlib.contextmanager
def _every_other_copy(times: list[tuple[float, float]]) -> Iterator[None]:
    from bit_jax.checkpoints.local import LocalCopies

    save = LocalCopies.save

    def sometimes(copies: LocalCopies, step: int, state: Any) -> None:
        times.append(now())
        if len(times) % 2:
            save(copies, step, state)

    with mock.patch.object(LocalCopies, "save", sometimes):
        yield


FEATURES = {
    "local": Feature(
        lambda options, folder: ["--local-checkpoints", str(folder), "--local-every", str(options.every)],
        _every_other_copy,
    ),
}


@contextlib.contextmanager
def folders() -> Iterator[tuple[Path, Path]]:
    """Yields an empty work directory, and an empty folder in memory; both are removed afterwards."""
    workdir, folder = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp(dir=MEMORY))
    try:
        yield workdir, folder
    finally:
        shutil.rmtree(workdir)
        shutil.rmtree(folder, ignore_errors=True)


def in_turns(options: Options) -> dict[str, dict[str, list[float]]]:
    """Returns the images/s, and the processors' seconds a step, of each interval with the part and of each without it,
    in one run in this process."""
    from bit_jax import train

    times: list[tuple[float, float]] = []
    steps = options.every * (2 * options.rounds + SETTLING + 2)
    feature = FEATURES[options.of]
    with folders() as (workdir, folder), feature.every_other(times):
        train.train(train.configuration([*options.command(workdir, steps), *feature.flags(options, folder)]))
    figures: dict[str, dict[str, list[float]]] = {IMAGES: {}, PROCESSORS: {}}
    for kind, first in ((WITH, SETTLING), (WITHOUT, SETTLING + 1)):
        starts = range(first, first + 2 * options.rounds, 2)
        took = [np.subtract(times[start + 1], times[start]) / options.every for start in starts]
        figures[IMAGES][kind] = [options.batch / float(clock) for clock, _ in took]
        figures[PROCESSORS][kind] = [float(processors) for _, processors in took]
    return figures


def run(options: Options, kind: str) -> float:
    """Trains once in a process of its own, and returns p_train in images/s.

    Raises:
        RunFailed: the run did not end as it should.
    """
    with folders() as (workdir, folder):
        more = FEATURES[options.of].flags(options, folder) if kind == WITH else []
        command = [sys.executable, "train.py", *options.command(workdir, options.steps), *more]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(f"a run ended with exit code {done.returncode}: {done.stderr[-1000:]}")
        return json.loads((workdir / "result.json").read_text())["p_train"]


def in_runs(options: Options) -> dict[str, dict[str, list[float]]]:
    """Returns p_train of each run without it, and of each with it."""
    rates: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    run(options, WITHOUT)  # compiles what the others take from the cache
    for number in range(options.rounds):
        for kind in (WITHOUT, WITH) if number % 2 == 0 else (WITH, WITHOUT):
            rates[kind].append(run(options, kind))
            print(f"{number + 1} of {options.rounds}, {kind}: {rates[kind][-1]:.1f}", file=sys.stderr, flush=True)
    return {IMAGES: rates}


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    measured = in_turns(options) if options.how == "turns" else in_runs(options)
    table = Table("", WITHOUT, WITH, "median of ratios", title=f"{options.of}, medians of {options.rounds}")
    record: dict[str, Any] = {
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name != "output"},
        "cores": os.cpu_count(),
    }
    for name, figures in measured.items():
        medians = {kind: statistics.median(of_kind) for kind, of_kind in figures.items()}
        ratio = statistics.median(added / plain for added, plain in zip(figures[WITH], figures[WITHOUT], strict=True))
        record[name] = {"medians": medians, "median of ratios": ratio, "all": figures}
        table.add_row(name, f"{medians[WITHOUT]:.4g}", f"{medians[WITH]:.4g}", f"{ratio:.3f}")
    kept = read_json(options.output, dict, "write another by --output") if options.output.exists() else {}
    write_json(options.output, kept | {f"{options.of}, {options.how}": record})
    terminal.console().print(table)


if __name__ == "__main__":
    sys.exit(exit_code(main))
