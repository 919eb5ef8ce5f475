"""Measures how often the comparison would call two right sides wrong: by simulated errors, and on real pairs.

python benchmarks/false_alarms.py                    # the simulation, seeded
python benchmarks/false_alarms.py real               # by real pairs: JAX against PyTorch, and each against itself
python benchmarks/false_alarms.py show               # the tables of docs/parity.md, from the JSON
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.table import Table

from input_pipeline import terminal
from input_pipeline.files import read_json, write_json
from parity.ladder import rungs, verdict
from parity.ladder.ladder import Ladder, working_folder
from parity.options import Options

RESULTS = Path(__file__).parent / "results" / "false_alarms.json"
FLIPPED = 1e3  # by so much a flipped ReLU multiplies a gradient's error; R26x1 was seen at 1,000
# values of the array -> simulated lines, so that each case takes seconds
LINES = {1: 1_000_000, 2: 400_000, 10: 100_000, 100: 100_000, 1_000: 4_000, 100_000: 60}
CHUNK = 4_000_000  # numbers drawn at once


@dataclasses.dataclass(frozen=True)
class Case:
    """Two right sides and one line.

    Attributes:
        values: of the array. Errors that all move together, as a mean loss's, are one value.
        draws, batches: as --disturbances and --batches; tasks of one batch, such as the loss, have 1.
        apart: the ratio of the two sides' errors; the disturbances follow the better side, as `Ladder.amplitude` does.
        flips: the chance that a ReLU flips in one batch of one side; MULTIPLE times that in a disturbance.
    """

    values: int
    draws: int
    batches: int = 1
    apart: float = 1.0
    flips: float = 0.0


def cases() -> list[Case]:
    smooth = [
        Case(values, draws, batches, apart)
        for apart, batches, draws, values in itertools.product((1.0, 2.0), (1, 3), (1, 3, 10), LINES)
    ]
    kinks = [
        Case(100, draws, batches, 2.0, flips)
        for batches, draws, flips in itertools.product((1, 3), (1, 3), (0.003, 0.01, 0.03, 0.1, 0.3))
    ]
    return smooth + kinks + [Case(1, draws, 1, 4.0) for draws in (1, 3)]


def failing(case: Case, lines: int, rng: np.random.Generator, *, fault: float = 1.0) -> tuple[int, int]:
    """How many of so many lines exceed their limits at the first look, and how many still do after all looks.

    Args:
        fault: multiplies the candidate's errors.
    """
    first = last = 0
    size = max(CHUNK // (case.values * case.batches * (case.draws + 2)), 1)
    for start in range(0, lines, size):
        doubtful = min(size, lines - start)
        looks: list[tuple[np.ndarray, ...]] = []
        for number in range(verdict.LOOKS):
            draws = max(case.draws, verdict.LEAST_DRAWS if number else 1)
            looks.append(_errors_of_all(rng, doubtful, dataclasses.replace(case, draws=draws), fault))
            judged = verdict.errors_and_limits(*(np.stack(part) for part in zip(*looks, strict=True)))
            beyond = np.any([(error > limit).any(axis=-1) for error, limit in judged.values()], axis=0)
            doubtful = int(beyond.sum())
            first += doubtful if number == 0 else 0
            looks = [tuple(part[beyond] for part in parts) for parts in looks]
            if not doubtful:
                break
        last += doubtful
    return first, last


def _errors_of_all(rng: np.random.Generator, lines: int, case: Case, fault: float) -> tuple[np.ndarray, ...]:
    """(reference, candidate, what disturbances explain), each [lines, 2], in one look."""
    reference = _errors(rng, lines, case, 1.0, case.flips)
    candidate = _errors(rng, lines, case, case.apart * fault, case.flips)
    more = min(verdict.MULTIPLE * case.flips, 1.0)
    disturbed = [_errors(rng, lines, case, verdict.MULTIPLE, more) for _ in range(case.draws)]
    return reference, candidate, np.max(disturbed, axis=0)


def _errors(rng: np.random.Generator, lines: int, case: Case, scale: float, flips: float) -> np.ndarray:
    """[RMSE, high percentile] of each line, the smaller of its batches each: [lines, 2]."""
    errors = scale * np.abs(rng.standard_normal((lines, case.batches, case.values)))
    errors *= np.where(rng.random((lines, case.batches, 1)) < flips, FLIPPED, 1.0)
    both = np.sqrt(np.mean(errors**2, axis=-1)), np.quantile(errors, verdict.HIGH, axis=-1)
    return np.min(np.stack(both, axis=-1), axis=1)


def rates(case: Case, seed: int = 0) -> dict[str, float]:
    """Chances that the line is called a bug: {"one look": ..., "all looks": ...}."""
    rng = np.random.default_rng((seed, *(int(1000 * value) for value in dataclasses.astuple(case))))
    first, last = failing(case, LINES[case.values], rng)
    return {"one look": first / LINES[case.values], "all looks": last / LINES[case.values]}


def simulate(seed: int = 0, output: Path = RESULTS) -> None:
    """Draws errors for two right sides and judges them by `verdict.errors_and_limits`; two minutes.

    Args:
        output: JSON; what it holds of real pairs is kept.
    """
    simulated = []
    for case in cases():
        simulated.append(dataclasses.asdict(case) | {"lines": LINES[case.values]} | rates(case, seed))
        print(simulated[-1], file=sys.stderr, flush=True)
    _keep(output, "simulated", simulated)
    show(output)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two right sides and a setting that the documentation names."""

    candidate: str
    reference: str
    flags: dict[str, int]
    weights: str = "random:R14x0.5"

    def __str__(self) -> str:
        flags = " ".join(f"--{name} {value}" for name, value in self.flags.items())
        return f"{self.candidate} against {self.reference}, {self.weights.removeprefix('random:')}, {flags}"


IMAGES_EACH = 5  # runs with the same weights
ONE = {"rows": 2, "batches": 1, "disturbances": 1}
USUAL = {"rows": 8, "batches": 3, "disturbances": 3}
PAIRS = (
    Pair("jax", "torch", ONE),
    Pair("jax", "torch", USUAL),
    Pair("torch:channels_last", "torch", ONE),
    Pair("jax:tuned", "jax", ONE),
    Pair("jax", "torch", ONE, "random:R26x1"),
    Pair("jax", "torch", ONE, "random:R50x0.5"),
)
CLIMBED = ("forward", "loss", "gradients", "curve")  # the rungs whose lines disturbances judge


def real(runs: int = 10, only: str = "", climbed: tuple[str, ...] = CLIMBED, output: Path = RESULTS) -> None:
    """Climbs the rungs with right sides and images of 32x32; half an hour on two idle cores.

    Args:
        runs: of every pair, each with images and disturbances of its own; every fifth also with weights of its own.
        only: the pairs whose name contains this; the others keep their records.
        climbed: the rungs.
        output: JSON; what else it holds is kept.
    """
    kept = {(record["pair"], record["rungs"]): record for record in _saved(output).get("real", [])}
    for pair in PAIRS:
        if only in str(pair):
            record = _count(pair, runs, climbed)
            kept[record["pair"], record["rungs"]] = record
            print(record, file=sys.stderr, flush=True)
            _keep(output, "real", list(kept.values()))
    show(output)


def _count(pair: Pair, runs: int, climbed: tuple[str, ...]) -> dict[str, Any]:
    """How many lines there were, were looked at again, and failed."""
    sides = {"reference": pair.reference, "candidate": pair.candidate}
    training = {"steps": 6, "warmup_steps": 2, "decay_steps": (4,)}
    given: dict[str, Any] = {"weights": pair.weights, "size": "32", **sides, **pair.flags, **training}
    lines = []
    for first in range(0, runs, IMAGES_EACH):
        with working_folder() as folder, Ladder(Options(seed=first, **given), folder, terminal.console()) as ladder:
            for seed in range(first, min(first + IMAGES_EACH, runs)):
                ladder.options = Options(seed=seed, **given)
                ladder.__dict__.pop("amplitude", None)
                lines += [line for name in climbed for line in rungs.RUNGS[name](ladder).lines]
    judged = [line for line in lines if line.disturbed_error is not None]
    return {
        "pair": str(pair),
        "runs": runs,
        "rungs": ", ".join(climbed),
        "lines": len(judged),
        "looked at again": sum(line.looks > 1 for line in judged),
        "failed": [line.name for line in lines if line.verdict == "bug"],
    }


def show(output: Path = RESULTS) -> None:
    """The tables, from the JSON."""
    saved = _saved(output)
    table = Table(title="chance that a right line is called a bug", title_justify="left")
    for column in (
        "values",
        "draws",
        "batches",
        "sides apart",
        "flips",
        "one look",
        f"{verdict.LOOKS} looks",
    ):
        table.add_column(column, justify="right")
    for row in saved.get("simulated", []):
        chances = [_chance(row[name], row["lines"]) for name in ("one look", "all looks")]
        cells = [f"{row[name]:g}" for name in ("values", "draws", "batches", "apart", "flips")]
        table.add_row(*cells, *chances)
    terminal.console().print(table)
    table = Table(title="real pairs", title_justify="left")
    for column in ("pair", "rungs", "runs", "lines", "looked at again", "failed"):
        table.add_column(column, justify="left" if column in ("pair", "rungs") else "right")
    for row in saved.get("real", []):
        cells = [f"{row[name]:,}" for name in ("runs", "lines", "looked at again")]
        table.add_row(row["pair"], row["rungs"], *cells, str(len(row["failed"])))
    terminal.console().print(table)


def _chance(rate: float, lines: int) -> str:
    return f"{rate:.1e}" if rate else f"< {1 / lines:.0e}"


def _saved(output: Path) -> dict[str, Any]:
    return read_json(output, dict, "write another by --output") if output.exists() else {}


def _keep(output: Path, name: str, found: Any) -> None:
    write_json(output, _saved(output) | {name: found})


if __name__ == "__main__":
    commands = {"simulate": simulate, "real": real, "show": show}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
