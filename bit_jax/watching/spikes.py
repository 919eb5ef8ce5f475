"""Losses that stand out of those before them: each is said, and its batch's examples are kept in WORKDIR/spikes.jsonl.

The losses are on the host anyway; a thread compares them, reads what the examples are called, and writes, so that the
loop waits for none of it.
"""

import dataclasses
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from bit_jax.process.reporter import Reporter
from input_pipeline.files import DamagedFile, end_line, is_number, parse_json

NAME = "spikes.jsonl"
WINDOW, FEWEST = 100, 20  # losses that one is compared with, and as many as there must be
SPREADS = 8.0  # how many spreads above the median a loss has to be
TO_DEVIATION = 1.4826  # of the median absolute deviation, for the standard deviation of a normal distribution
SURPRISES = 24.0  # nats that single examples may add to the sum over a batch; one that is wrong costs about ten
QUIET = 50  # steps after a sentence in which spikes are written, but not said


@dataclasses.dataclass(frozen=True)
class Spike:
    """A loss that stands out.

    Attributes:
        step, loss: the step, starting at 1, and its loss in nats.
        median, spread: of the up to `WINDOW` losses before it.
        examples: what the dataset calls the examples of its batch, in the order of the rows.
    """

    step: int
    loss: float
    median: float
    spread: float
    examples: tuple[str, ...] = ()


class Window:
    """The newest losses of a start. As each is compared with medians, one spike does not hide the next, and losses that
    stay high are ordinary once they are half of the window.

    Args:
        rows: number of rows of a batch.
        mixed: function of the step: nats that mixing its images may add to its loss.
    """

    def __init__(self, rows: int, mixed: Callable[[int], float] = lambda step: 0.0):
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._surprises, self._mixed = SURPRISES / rows, mixed

    def spike(self, step: int, loss: float) -> Spike | None:
        """Enters the loss of the step, and returns the spike that it is, or None. A loss that is not finite is none: it
        ends the run, or in float16 is an overflow that the loss scale deals with."""
        if not math.isfinite(loss):
            return None
        if len(self._losses) < FEWEST:
            self._losses.append(loss)
            return None
        median = statistics.median(self._losses)
        spread = TO_DEVIATION * statistics.median(abs(other - median) for other in self._losses)
        limit = median + SPREADS * spread + self._surprises
        if loss > limit:
            limit += self._mixed(step)
        self._losses.append(loss)
        return Spike(step, loss, median, spread) if loss > limit else None


def mixing(weight: float, classes: int) -> float:
    """Returns the nats by which the loss of a mixed batch may exceed that of an unmixed one.

    With half of each of two images, the target's own entropy is ln 2, and a model that sees only one of the two pays
    for the other half as for a guess, ln(classes) / 2. For other weights it is the share of the smaller part.

    Args:
        weight: the share of each image itself in its mixture, from 0 to 1.
        classes: number of classes.
    """
    return 2 * min(weight, 1 - weight) * (math.log(2) + math.log(classes) / 2)


class Spikes:
    """Says the spikes of a run, and writes them down; neither a full disk nor a slow one ends or blocks the run.

    Args:
        path: the file, to which lines are appended.
        window: the losses that each is compared with.
        examples: function of the step: what the dataset calls the examples of its batch.
        note: function that shows a sentence; it is called in a thread.
    """

    def __init__(
        self,
        path: Path,
        window: Window,
        examples: Callable[[int], Sequence[str]],
        note: Callable[[str], object],
    ):
        self._path, self._window, self._examples, self._note = path, window, examples, note
        self._said = -QUIET
        self._reporter = Reporter("spikes")

    def __call__(self, step: int, loss: float) -> None:
        """Takes the loss of the next step; returns at once."""
        self._reporter(lambda: self._compare(step, loss))

    def close(self) -> None:
        """Waits until all that was taken is compared and written."""
        self._reporter.close()

    def _compare(self, step: int, loss: float) -> None:
        spike = self._window.spike(step, loss)
        if spike is None:
            return
        try:
            self._write(dataclasses.replace(spike, examples=tuple(map(str, self._examples(step)))))
            where = f"{self._path} has the names of its batch's examples"
        except Exception as error:  # a full disk, or an example that cannot be read; the next may be kept again
            where = f"the names of its batch's examples cannot be kept in {self._path} ({error})"
        if step >= self._said + QUIET:
            self._said = step
            self._note(
                f"the loss of step {step} is {loss:.3g}, and the median of those before it {spike.median:.3g}; {where}"
            )

    def _write(self, spike: Spike) -> None:
        end_line(self._path)
        with open(self._path, "a") as file:
            file.write(json.dumps(dataclasses.asdict(spike)) + "\n")


def read(path: Path) -> list[Spike]:
    """Returns the spikes of a file, by step: where a continued run came to a step again, the last one of it. Damaged
    lines are left out; no file is a file without lines.

    Raises:
        OSError: the file cannot be read.
    """
    if not path.exists():
        return []
    found = [spike for line in path.read_bytes().splitlines() if (spike := _parsed(line, path)) is not None]
    return [spike for _, spike in sorted({spike.step: spike for spike in found}.items())]


def _parsed(line: bytes, path: Path) -> Spike | None:
    try:
        entry = parse_json(line, dict, path, "")
    except DamagedFile:
        return None
    numbers = [entry.get(name) for name in ("step", "loss", "median", "spread")]
    examples = entry.get("examples")
    if not isinstance(numbers[0], int) or not all(map(is_number, numbers)) or not isinstance(examples, list):
        return None
    return Spike(*numbers, examples=tuple(map(str, examples)))
