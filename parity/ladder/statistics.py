"""Two classifiers on the same images: is one better, and are they the same within a margin?"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
REFUTING = 0.9998  # outside the margin by chance once in 10,000 times, on either side
# of the images' largest logit differences, beside the median. A tenth of them may be damaged without its growing
ERROR_QUANTILE = 0.9
OUTLIER = 4.0  # standard deviations of a log-normal: one image in 30,000 lies beyond, one in 10^6 beyond its double
MOST = 30.0  # e^30 times the median is beyond all logits

LAST = np.iinfo(np.int64).max  # the rank of a label that no prediction can be

Equivalence = Literal["shown", "not shown", "refuted"]


@dataclasses.dataclass(frozen=True)
class Paired:
    """Which images each of the two gets right.

    Attributes:
        both, reference_only, candidate_only, neither: numbers of images.
    """

    both: int
    reference_only: int
    candidate_only: int
    neither: int

    @classmethod
    def count(cls, reference: np.ndarray, candidate: np.ndarray) -> "Paired":
        """From two boolean arrays, an entry an image: is it right?"""
        return cls(
            int((reference & candidate).sum()),
            int((reference & ~candidate).sum()),
            int((~reference & candidate).sum()),
            int((~reference & ~candidate).sum()),
        )

    @property
    def examples(self) -> int:
        return self.both + self.reference_only + self.candidate_only + self.neither

    @property
    def difference(self) -> float:
        """The candidate's accuracy less the reference's."""
        return (self.candidate_only - self.reference_only) / self.examples

    def mcnemar(self) -> float:
        """Exact two-sided p-value of "both are right equally often", from the images that they dispute."""
        disputed = self.reference_only + self.candidate_only
        return float(stats.binomtest(self.candidate_only, disputed).pvalue) if disputed else 1.0

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Of `difference`: Tango's score interval, which holds its level where few images, or none, are disputed.

        Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design", Statistics in Medicine 17 (1998).
        """
        z = float(stats.norm.ppf((1 + confidence) / 2))

        def end(sign: int) -> float:
            def excess(delta: float) -> float:
                return self._score(delta) + sign * z

            edge = sign * (1 - 1e-12)
            # the score falls as delta grows; where it stays on one side, the interval reaches the edge
            if excess(edge) * sign > 0:
                return float(sign)
            root: Any = optimize.brentq(excess, *sorted((self.difference, edge)), xtol=1e-12)
            return float(root)

        return end(-1), end(1)

    def equivalence(self, margin: float) -> Equivalence:
        """Shown where the 90 % interval lies within the margin (two one-sided tests at 5 %), refuted where the interval
        at `REFUTING` lies outside: right sides in bfloat16 dispute a few images too, by chance mostly one way."""
        low, high = self.interval(0.90)
        if -margin < low and high < margin:
            return "shown"
        low, high = self.interval(REFUTING)
        return "refuted" if low > margin or high < -margin else "not shown"

    def examples_needed(self, margin: float) -> int:
        """Images that would show equivalence if as large a share were disputed, evenly."""
        z = float(stats.norm.ppf(0.95))
        share = (self.reference_only + self.candidate_only) / self.examples
        # the score test at delta = margin with an even share s: n margin^2 > z^2 (s + margin), about
        return math.ceil(z**2 * max(share, margin) / margin**2)

    def _score(self, delta: float) -> float:
        """Tango's statistic for the candidate's advantage `delta`; standard normal if that is the true one."""
        n, b, c = self.examples, self.candidate_only, self.reference_only
        linear = -b - c + (2 * n - b + c) * delta
        constant = -c * delta * (1 - delta)
        q = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        advantage = b - c - n * delta
        return (
            advantage / math.sqrt(variance)
            if variance > 0
            else math.copysign(math.inf, advantage)
            if advantage
            else 0.0
        )


def flips(reference: np.ndarray, candidate: np.ndarray) -> tuple[float, list[dict[str, Any]]]:
    """The images that the two classify differently, and whether rounding explains it.

    A flip is expected where the reference's margin between the two classes is below twice the largest logit difference
    that rounding brings to any image. One above comes of something else: that image was read, resized or computed
    differently.

    Rounding's largest is extrapolated, because the images that are judged must not set it: the differences of images
    are taken for log-normal, their centre and spread come from the median and the 90th percentile, and `OUTLIER`
    standard deviations are allowed. Twice the 90th percentile itself, in bfloat16, would call some of 50,000 images
    wrong.

    Args:
        reference, candidate: logits [images, classes] of the same images.

    Returns:
        The largest difference that rounding explains, and for each flip its row, the two classes, the margins and
        `expected`.
    """
    differences = np.abs(candidate.astype(np.float64) - reference).max(axis=1)
    median, high = (float(np.quantile(differences, share)) for share in (0.5, ERROR_QUANTILE))
    spread = math.log(high / median) / float(stats.norm.ppf(ERROR_QUANTILE)) if 0 < median < math.inf > high else 0.0
    error = max(high, median * math.exp(min(OUTLIER * spread, MOST)))
    ours, theirs = candidate.argmax(axis=1), reference.argmax(axis=1)
    found = []
    for row in np.flatnonzero(ours != theirs):
        margin = float(reference[row, theirs[row]]) - float(reference[row, ours[row]])
        found.append(
            {
                "row": int(row),
                "reference_class": int(theirs[row]),
                "candidate_class": int(ours[row]),
                "reference_margin": margin,
                "candidate_margin": float(candidate[row, ours[row]]) - float(candidate[row, theirs[row]]),
                "difference": float(differences[row]),
                "expected": bool(margin <= 2 * error),
            }
        )
    return error, found


def rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes are placed before the label: int64 [images].

    Equal logits are in the order of their classes. A label that is no class, and the label of a row that is not finite,
    come after everything: at `LAST`, which is not among the first k for any k.
    """
    classes = logits.shape[1]
    known = (labels >= 0) & (labels < classes)
    label = np.where(known, labels, 0)[:, None]
    own = np.take_along_axis(logits, label, axis=1)
    before = (logits > own) | ((logits == own) & (np.arange(classes) < label))
    return np.where(known & np.isfinite(logits).all(axis=1), before.sum(axis=1), LAST)
