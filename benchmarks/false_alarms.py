"""Measures how often the comparison would call two correct sides different.

`python benchmarks/false_alarms.py simulate` draws the errors of two correct sides. `... real` compares real pairs: JAX
with PyTorch, and each with itself. `... show` prints the tables of docs/parity_verdict.md from the
JSON file of the results.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.table import Table

from input_pipeline import terminal
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import read_json, writable, write_json
from input_pipeline.flags import require_positive
from parity.ladder import rungs, verdict
from parity.ladder.ladder import Ladder, working_folder
from parity.options import Options

RESULTS = Path(__file__).parent / "results" / "false_alarms.json"
FLIPPED = 1e3  # factor by which a flipped ReLU multiplies a gradient's error; about 1,000 was seen with R26x1
# {values in the array: simulated lines}, so that every case takes seconds
LINES = {1: 1_000_000, 2: 400_000, 10: 100_000, 100: 100_000, 1_000: 4_000, 100_000: 60}
CHUNK = 4_000_000  # numbers drawn at once


@dataclasses.dataclass(frozen=True)
class Case:
    """Two correct sides and one line of their comparison.

    Attributes:
        values: number of values in the array; if all errors move together, as those of a mean loss do, it is 1.
        draws: number of disturbances, like --disturbances.
        batches: number of batches, like --batches; tasks of one batch, such as the loss, have 1.
        apart: ratio of the two sides' errors; the disturbances follow the better side, as `Ladder.amplitude` does.
        flips: chance that a ReLU flips in one batch of one side; in a disturbance it is MULTIPLE times as large.
    """

    values: int
    draws: int
    batches: int = 1
    apart: float = 1.0
    flips: float = 0.0


def cases() -> list[Case]:
    """Returns the cases of the simulation: smooth errors, errors with flipped ReLUs, and a loss with unequal sides."""
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
    """Returns how many of the lines exceed their limits at the first look, and how many still do after all looks.

    Args:
        lines: number of lines to draw.
        fault: factor by which the candidate's errors are too large.
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
    """Returns one look at each line: the errors of the reference and of the candidate, and the largest errors under
    disturbances, [lines, 2] each."""
    reference = _errors(rng, lines, case, 1.0, case.flips)
    candidate = _errors(rng, lines, case, case.apart * fault, case.flips)
    disturbed_flips = min(verdict.MULTIPLE * case.flips, 1.0)
    disturbed = [_errors(rng, lines, case, verdict.MULTIPLE, disturbed_flips) for _ in range(case.draws)]
    return reference, candidate, np.max(disturbed, axis=0)


def _errors(rng: np.random.Generator, lines: int, case: Case, scale: float, flips: float) -> np.ndarray:
    """Returns the RMSE and the high percentile of each line, [lines, 2], where the smallest of its batches counts."""
    errors = scale * np.abs(rng.standard_normal((lines, case.batches, case.values)))
    errors *= np.where(rng.random((lines, case.batches, 1)) < flips, FLIPPED, 1.0)
    statistics = np.sqrt(np.mean(errors**2, axis=-1)), np.quantile(errors, verdict.HIGH, axis=-1)
    return np.min(np.stack(statistics, axis=-1), axis=1)


def rates(case: Case, seed: int = 0) -> dict[str, float]:
    """Returns the chances that the line is called a bug: {"one look": ..., "all looks": ...}."""
    rng = np.random.default_rng((seed, *(int(1000 * value) for value in dataclasses.astuple(case))))
    first, last = failing(case, LINES[case.values], rng)
    return {"one look": first / LINES[case.values], "all looks": last / LINES[case.values]}


def simulate(seed: int = 0, output: Path = RESULTS) -> None:
    """Draws the errors of two correct sides and judges them by `verdict.errors_and_limits`, which takes two minutes.

    Args:
        seed: Seed of the drawn errors; another one shows how much the chances vary.
        output: JSON file that receives the chances; what it holds of real pairs is kept.
    """
    writable(output)
    simulated = []
    for case in cases():
        simulated.append(dataclasses.asdict(case) | {"lines": LINES[case.values]} | rates(case, seed))
        print(simulated[-1], file=sys.stderr, flush=True)
    _keep(output, "simulated", simulated)
    show(output)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two correct sides and the flags that they are compared with."""

    candidate: str
    reference: str
    flags: dict[str, int]
    weights: str = "random:R14x0.5"

    def __str__(self) -> str:
        flags = " ".join(f"--{name} {value}" for name, value in self.flags.items())
        return f"{self.candidate} against {self.reference}, {self.weights.removeprefix('random:')}, {flags}"


SMALLEST = {"rows": 2, "batches": 1, "disturbances": 1}
USUAL = {"rows": 8, "batches": 3, "disturbances": 3}
PAIRS = (
    Pair("jax", "torch", SMALLEST),
    Pair("jax", "torch", USUAL),
    Pair("torch:channels_last", "torch", SMALLEST),
    Pair("jax:tuned", "jax", SMALLEST),
    Pair("jax", "torch", SMALLEST, "random:R26x1"),
    Pair("jax", "torch", SMALLEST, "random:R50x0.5"),
)
CLIMBED = ("forward", "loss", "gradients", "curve")  # the rungs whose lines disturbances judge


def real(
    runs: int = 10,
    only: str = "",
    climbed: tuple[str, ...] = CLIMBED,
    same_weights: int = 5,
    output: Path = RESULTS,
) -> None:
    """Compares real pairs of correct sides on images of 32x32, which takes half an hour on two idle cores.

    Args:
        runs: Number of comparisons of each pair; more of them show rarer false alarms.
            Each has other images and disturbances.
        only: Text that the name of a pair must contain to be compared; the others keep their records. Empty: all pairs.
        climbed: Rungs to compare on.
        same_weights: Number of runs after which both sides start anew with other weights, which takes most of the time.
        output: JSON file that receives the counts; what else it holds is kept.
    """
    require_positive({"--runs": runs, "--same-weights": same_weights})
    if unknown := set(climbed) - set(CLIMBED):
        raise RequestError(f"--climbed {' '.join(sorted(unknown))}: disturbances judge only {', '.join(CLIMBED)}")
    if not any(only in str(pair) for pair in PAIRS):
        raise RequestError(f"--only {only!r} is in no pair's name; there are {'; '.join(map(str, PAIRS))}")
    writable(output)
    kept = {(record["pair"], record["rungs"]): record for record in _saved(output).get("real", [])}
    for pair in PAIRS:
        if only in str(pair):
            for record in _counts(pair, runs, climbed, same_weights):
                kept[record["pair"], record["rungs"]] = record
                print(record, file=sys.stderr, flush=True)
                _keep(output, "real", list(kept.values()))
    show(output)


def _counts(pair: Pair, runs: int, climbed: tuple[str, ...], same_weights: int) -> Iterator[dict[str, Any]]:
    """Yields a pair's record so far, whenever its weights change: how many lines there were and were looked at again,
    and which ones failed."""
    sides = {"reference": pair.reference, "candidate": pair.candidate}
    training = {"steps": 6, "warmup_steps": 2, "decay_steps": (4,)}
    options: dict[str, Any] = {"weights": pair.weights, "size": "32", **sides, **pair.flags, **training}
    lines = []
    for first in range(0, runs, same_weights):
        last = min(first + same_weights, runs)
        with working_folder() as folder, Ladder(Options(seed=first, **options), folder, terminal.console()) as ladder:
            for seed in range(first, last):
                ladder.options = Options(seed=seed, **options)
                ladder.__dict__.pop("amplitude", None)
                lines += [line for name in climbed for line in rungs.RUNGS[name](ladder).lines]
        judged = [line for line in lines if line.disturbed_error is not None]
        yield {
            "pair": str(pair),
            "runs": last,
            "rungs": ", ".join(climbed),
            "lines": len(judged),
            "looked at again": sum(line.looks > 1 for line in judged),
            "failed": [line.name for line in lines if line.verdict == "bug"],
        }


def show(output: Path = RESULTS) -> None:
    """Prints the tables.

    Args:
        output: JSON file with the results of `simulate` and `real`.
    """
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


def _keep(output: Path, name: str, records: list[dict[str, Any]]) -> None:
    write_json(output, _saved(output) | {name: records})


if __name__ == "__main__":
    commands = {"simulate": simulate, "real": real, "show": show}
    sys.exit(exit_code(lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)))
