"""Holds measured figures against published ones.

An accuracy agrees if some number that is printed as the published one lies in Wilson's 95 % interval around the
measured accuracy, for as many examples as the published one is of. Where the smallest and the largest of several
published runs are known, the median of the measured runs agrees if it lies between them. Of other figures, such as
images/s, nothing is said but their ratio: they are another machine's. Nothing is judged where flags changed what was
measured.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bit_jax.predictions.summary import Share
from bit_jax.reproductions.records import Figure, Value


@dataclasses.dataclass(frozen=True)
class Judged:
    """A published number beside the measured ones.

    Attributes:
        value: the published number.
        measured: what each run measured, in the order of the seeds; accuracies as shares of 1. Runs without it are
            left out.
        examples: number of examples that the measured accuracy is of.
        interval: Wilson's interval around the measured accuracy, for the published number of examples; None where the
            verdict does not rest on it.
        agrees: whether the two agree; None where that is not judged.
        verdict: the same in words.
    """

    value: Value
    measured: tuple[float, ...]
    examples: int | None
    interval: tuple[float, float] | None
    agrees: bool | None
    verdict: str

    @property
    def middle(self) -> float | None:
        """The median of the runs, or None if none has the figure."""
        return statistics.median(self.measured) if self.measured else None

    def as_json(self) -> dict[str, Any]:
        return {
            "metric": self.value.metric,
            "published": {
                key: item
                for key, item in dataclasses.asdict(self.value).items()
                if key in ("printed", "unit", "examples", "lowest", "highest")
            },
            "measured": list(self.measured),
            "median": self.middle,
            "examples": self.examples,
            "interval": None if self.interval is None else list(self.interval),
            "agrees": self.agrees,
            "verdict": self.verdict,
        }


def judge(figure: Figure, runs: Sequence[Mapping[str, Any]], changed: Sequence[str] = ()) -> list[Judged]:
    """Returns a verdict for each published number.

    Args:
        runs: the JSON of the evaluation, or the content of each seed's result.json.
        changed: the flags that changed what was measured; see `asked.changed`.
    """
    return [_judge(value, figure.examples, runs, changed) for value in figure.values]


def _judge(value: Value, examples: int, runs: Sequence[Mapping[str, Any]], changed: Sequence[str]) -> Judged:
    as_they_do = bool(value.compat) and all(run.get(value.compat) is not None for run in runs)
    found = [run.get(value.compat if as_they_do else value.metric) for run in runs]
    numbers = tuple(float(item["value"] if isinstance(item, Mapping) else item) for item in found if item is not None)
    if not numbers or len(numbers) < len(runs):
        return Judged(value, numbers, None, None, None, "not measured")
    if not value.is_accuracy:
        verdict = _not_as_published(changed) if changed else _ratio(value, numbers)
        return Judged(value, numbers, None, None, None, verdict)
    seen = sorted({_examples(run, as_they_do) for run in runs})
    if changed:
        return Judged(value, numbers, seen[0], None, None, _not_as_published(changed))
    expected = value.examples if as_they_do and value.examples is not None else examples
    if seen != [expected]:
        counts = " and ".join(f"{count:,}" for count in seen)
        return Judged(
            value, numbers, seen[0], None, None, f"not judged: {counts} examples were evaluated, not {expected:,}"
        )
    if value.spread is not None:
        return _within_the_runs(value, numbers, expected)
    return _within_the_interval(value, numbers, expected)


def _not_as_published(changed: Sequence[str]) -> str:
    return f"not judged: {' and '.join(changed)} changed what was measured"


def _examples(run: Mapping[str, Any], as_they_do: bool) -> int:
    if as_they_do:
        return run["rank0_examples"]
    return run["examples"] if "examples" in run else run["eval_examples"]


def _ratio(value: Value, numbers: Sequence[float]) -> str:
    return f"not judged: {statistics.median(numbers) / float(value.printed):.2f} times the published figure"


def _within_the_interval(value: Value, numbers: tuple[float, ...], expected: int) -> Judged:
    middle, of = statistics.median(numbers), value.examples or expected
    interval = low, high = Share(round(middle * of), of).interval
    smallest, largest = map(float, value.rounded_from)
    if largest >= low and smallest <= high:
        return Judged(value, numbers, expected, interval, True, f"agrees{_images_apart(value, middle, expected)}")
    return Judged(value, numbers, expected, interval, False, _differs(middle, (smallest + largest) / 2))


def _images_apart(value: Value, middle: float, expected: int) -> str:
    """Returns a clause with the smallest number of images that are classified otherwise, if the published accuracy is
    of the same number and has enough digits to tell."""
    smallest, largest = (float(number) * expected for number in value.rounded_from)
    if value.examples != expected or largest - smallest > 1:
        return ""
    return f"; at least {abs(round(middle * expected) - round((smallest + largest) / 2)):,} images otherwise"


def _within_the_runs(value: Value, numbers: tuple[float, ...], expected: int) -> Judged:
    assert value.spread is not None
    middle = statistics.median(numbers)
    smallest, largest = map(float, value.spread)
    runs = "" if len(numbers) == 1 else f", median of {len(numbers)} runs"
    if smallest <= middle <= largest:
        return Judged(value, numbers, expected, None, True, f"agrees: within the published runs{runs}")
    nearest = smallest if middle < smallest else largest
    return Judged(value, numbers, expected, None, False, f"{_differs(middle, nearest)} from the published runs{runs}")


def _differs(measured: float, published: float) -> str:
    return f"differs by {100 * abs(measured - published):.2f} points"
