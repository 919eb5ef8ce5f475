"""What the predictions for a split amount to: accuracies with intervals, the worst classes, and what is confused."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
WORST, PAIRS = 10, 10  # rows of the tables


@dataclasses.dataclass(frozen=True)
class Share:
    """A number of examples of a larger number, such as those that were classified correctly."""

    count: int
    examples: int

    @property
    def value(self) -> float:
        return self.count / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at the level `CONFIDENCE`, which lies within 0 and 1 and is right for few examples
        and for shares near the ends, too.

        Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
        """
        z2 = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
        n, share = self.examples, self.value
        centre = (share + z2 / (2 * n)) / (1 + z2 / n)
        half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
        # rounding must not leave the observed share outside, which the interval touches at 0 and at 1
        return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2%} ({low:.2%} to {high:.2%})"

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval": list(self.interval), "count": self.count}


@dataclasses.dataclass(frozen=True)
class OfClass:
    """The examples of one class: how many are right, and what the others are most often taken for.

    Attributes:
        name, label: the class.
        accuracy: the share of its examples that is classified correctly.
        taken_for: the class that most of the others are predicted as, and their number; None where all are right.
    """

    name: str
    label: int
    accuracy: Share
    taken_for: tuple[str, int] | None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Examples of one class that are predicted as one other."""

    label: int
    predicted: int
    count: int
    examples: int  # of the label


@dataclasses.dataclass(frozen=True)
class Summary:
    """A split's predictions, as `rows.classify` gives them, and the names of the classes.

    Attributes:
        rows: {name: array [examples]}.
        names: a name for each class, in the order of the labels.
    """

    rows: dict[str, np.ndarray]
    names: tuple[str, ...]

    @property
    def examples(self) -> int:
        return len(self.rows["label"])

    def accuracy(self, among: int = 1) -> Share:
        """Returns the share of examples whose label is among the `among` likeliest classes."""
        return Share(int((self.rows["rank"] < among).sum()), self.examples)

    @property
    def loss(self) -> float:
        """The mean cross-entropy, in nats."""
        return float(self.rows["loss"].astype(np.float64).mean())

    @property
    def not_finite(self) -> int:
        """Number of examples whose logits are not all finite; they count as wrong."""
        return int((~np.isfinite(self.rows["loss"])).sum())

    @property
    def confusion(self) -> dict[tuple[int, int], int]:
        """{(label, predicted): number of examples} of those that are wrong."""
        wrong = self.rows["rank"] >= 1
        both = np.stack([self.rows["label"][wrong], self.rows["predicted"][wrong]], axis=1)
        found, counts = np.unique(both, axis=0, return_counts=True)
        pairs = zip(found.tolist(), counts.tolist(), strict=True)
        # where logits are not finite the prediction may be the label, and means nothing
        return {(label, predicted): count for (label, predicted), count in pairs if label != predicted}

    def classes(self) -> list[OfClass]:
        """Returns the classes that occur: the lowest accuracy first, the one with more examples first where equal."""
        seen = np.bincount(self.rows["label"], minlength=len(self.names))
        right = np.bincount(self.rows["label"][self.rows["rank"] < 1], minlength=len(self.names))
        taken: dict[int, tuple[int, int]] = {}
        for (label, predicted), count in self.confusion.items():
            taken[label] = max(taken.get(label, (0, 0)), (count, -predicted))  # of equal ones the lower class
        found = []
        for label in np.flatnonzero(seen).tolist():
            most = taken.get(label)
            taken_for = None if most is None else (self.names[-most[1]], most[0])
            found.append(OfClass(self.names[label], label, Share(int(right[label]), int(seen[label])), taken_for))
        return sorted(found, key=lambda each: (each.accuracy.value, -each.accuracy.examples, each.label))

    def confused(self, most: int = PAIRS) -> list[Pair]:
        """Returns the pairs of classes that are confused most often, by the number of examples."""
        seen = np.bincount(self.rows["label"], minlength=len(self.names))
        pairs = [Pair(*both, count, int(seen[both[0]])) for both, count in self.confusion.items()]
        return sorted(pairs, key=lambda pair: (-pair.count, pair.label, pair.predicted))[:most]

    def mistakes(self, most: int) -> list[int]:
        """Returns the examples that are wrong with the largest probability, by their indices in the split."""
        wrong = np.flatnonzero((self.rows["rank"] >= 1) & np.isfinite(self.rows["loss"]))
        order = np.argsort(-self.rows["probability"][wrong], kind="stable")
        return wrong[order][:most].tolist()


def names_of(pairs: Sequence[Pair], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the pairs with names in place of numbers."""
    return [
        {"label": names[pair.label], "predicted": names[pair.predicted], "count": pair.count, "of": pair.examples}
        for pair in pairs
    ]
