"""Measures how often the comparison would call two right sides wrong: by simulated errors, and on real pairs.

python benchmarks/false_alarms.py                    # the simulation, seeded
python benchmarks/false_alarms.py real --seeds 10    # JAX against PyTorch, and each against another form of itself
python benchmarks/false_alarms.py show               # the tables of docs/parity.md, from the JSON
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from input_pipeline.files import write_json
from parity import oracle

RESULTS = Path(__file__).parent / "results" / "false_alarms.json"
FLIPPED = 1e3  # by so much a flipped ReLU multiplies a gradient's error; R26x1 was seen at 1,000
# values of the array -> simulated lines, so that each case takes seconds
LINES = {1: 400_000, 2: 400_000, 10: 100_000, 100: 20_000, 1_000: 4_000, 100_000: 60}
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
    return smooth + kinks


def failing(case: Case, lines: int, rng: np.random.Generator, *, fault: float = 1.0) -> np.ndarray:
    """Which of so many lines exceed their limit in one look, bool [lines].

    Args:
        fault: multiplies the candidate's errors.
    """
    parts = []
    size = max(CHUNK // (case.values * case.batches * (case.draws + 2)), 1)
    for start in range(0, lines, size):
        count = min(size, lines - start)
        reference = _errors(rng, count, case, 1.0, case.flips)
        candidate = _errors(rng, count, case, case.apart * fault, case.flips)
        more = min(oracle.MULTIPLE * case.flips, 1.0)
        disturbed = np.stack([_errors(rng, count, case, oracle.MULTIPLE, more) for _ in range(case.draws)])
        limits = oracle.error_limits(reference, candidate, disturbed)
        beyond = (reference > limits["reference"]) | (candidate > limits["candidate"])
        parts.append(beyond.any(axis=-1))
    return np.concatenate(parts)


def _errors(rng: np.random.Generator, lines: int, case: Case, scale: float, flips: float) -> np.ndarray:
    """[RMSE, high percentile] of each line, the smaller of its batches each: [lines, 2]."""
    errors = scale * np.abs(rng.standard_normal((lines, case.batches, case.values)))
    errors *= np.where(rng.random((lines, case.batches, 1)) < flips, FLIPPED, 1.0)
    both = np.sqrt(np.mean(errors**2, axis=-1)), np.quantile(errors, oracle.HIGH, axis=-1)
    return np.min(np.stack(both, axis=-1), axis=1)


def rates(case: Case, seed: int = 0, lines: int | None = None) -> dict[str, float]:
    """Chances that the line is called a bug: {"one look": ..., "all looks": ...}.

    Looks are independent, having other images and other disturbances; so the chances of the looks are multiplied.
    """
    rng = np.random.default_rng((seed, *(int(1000 * value) for value in dataclasses.astuple(case))))
    lines = lines or LINES[case.values]
    later = dataclasses.replace(case, draws=max(case.draws, oracle.LEAST_DRAWS))
    first = failing(case, lines, rng).mean()
    again = first if later == case else failing(later, lines, rng).mean()
    return {"one look": float(first), "all looks": float(first * again ** (oracle.LOOKS - 1))}


def simulate(seed: int = 0, output: Path = RESULTS) -> None:
    """Draws errors for two right sides and judges them by `oracle.error_limits`; a few minutes.

    Args:
        output: JSON; what it holds of real pairs is kept.
    """
    kept = json.loads(output.read_text()) if output.exists() else {}
    simulated = []
    for case in cases():
        simulated.append(dataclasses.asdict(case) | {"lines": LINES[case.values]} | rates(case, seed))
        print(simulated[-1], file=sys.stderr, flush=True)
    write_json(output, kept | {"simulated": simulated})
    show(output)
