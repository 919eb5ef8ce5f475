"""Compares two classifiers on the same images: is one better, and are they equal within a margin?"""

import dataclasses
import math
import statistics
from typing import Any, Literal

import numpy as np

CONFIDENCE = 0.95
REFUTING = 0.9998  # confidence level at which an interval lies on one side by chance once in 10,000 times
# Quantile of the images' largest logit differences that is used beside the median. It does not grow if up to a tenth of
# the images are damaged.
ERROR_QUANTILE = 0.9
OUTLIER = 4.0  # standard deviations of a log-normal: one image in 30,000 lies beyond, one in 10^6 beyond its double
MOST = 30.0  # largest exponent; e^30 times the median is larger than all logits

LAST = np.iinfo(np.int64).max  # rank of a label that cannot be predicted

Equivalence = Literal["shown", "not shown", "refuted"]


@dataclasses.dataclass(frozen=True)
class Paired:
    """Numbers of images that the two classifiers get right.

    Attributes:
        both, reference_only, candidate_only, neither: number of images that these get right.
    """

    both: int
    reference_only: int
    candidate_only: int
    neither: int

    @classmethod
    def count(cls, reference: np.ndarray, candidate: np.ndarray) -> "Paired":
        """Counts from two boolean arrays that say for each image whether the classifier is right."""
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
        """Candidate's accuracy minus the reference's."""
        return (self.candidate_only - self.reference_only) / self.examples

    def mcnemar(self) -> float:
        """Returns the exact two-sided p-value of "both are right equally often", from the images that only one of them
        gets right."""
        from scipy import stats  # here and below, because importing it takes most of a second

        disputed = self.reference_only + self.candidate_only
        return float(stats.binomtest(self.candidate_only, disputed).pvalue) if disputed else 1.0

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Returns Tango's score interval of `difference`, which keeps its level even if only one of the classifiers is
        right on few images or on none.

        Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design", Statistics in Medicine 17 (1998).
        """
        from scipy import optimize

        z = _quantile((1 + confidence) / 2)

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
        """Decides whether the two are equivalent within the margin: "shown" if the 90 % interval lies within it (two
        one-sided tests at 5 %), "refuted" if the interval at `REFUTING` lies outside. That level is so high because
        correct sides in bfloat16 also differ on a few images, by chance mostly in one direction."""
        low, high = self.interval(0.90)
        if -margin < low and high < margin:
            return "shown"
        low, high = self.interval(REFUTING)
        return "refuted" if low > margin or high < -margin else "not shown"

    def examples_needed(self, margin: float) -> int:
        """Returns the number of images that would show equivalence if the classifiers disagreed on the same share of
        images, equally often in each direction."""
        z = _quantile(0.95)
        share = (self.reference_only + self.candidate_only) / self.examples
        # the score test at delta = margin with a share s, evenly split: approximately n margin^2 > z^2 (s + margin)
        return math.ceil(z**2 * max(share, margin) / margin**2)

    def _score(self, delta: float) -> float:
        """Returns Tango's statistic for the candidate's advantage `delta`; it is standard normal if `delta` is true."""
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
    """Finds the images that the two classify differently, and whether rounding explains it.

    A flip is expected if the reference's margin between the two classes is at most twice the largest logit difference
    that rounding causes on any image. A flip with a larger margin has another cause: that image was read, resized or
    computed differently.

    The largest difference is extrapolated, because the images that are judged must not decide it: the differences of
    images are assumed log-normal, with centre and spread from the median and the 90th percentile, and `OUTLIER`
    standard deviations are allowed. In bfloat16, twice the 90th percentile itself would call some of 50,000 images
    wrong.

    Args:
        reference, candidate: logits [images, classes] of the same images.

    Returns:
        The largest difference that rounding explains, and for each flip its row, the two classes, the margins and
        `expected`.
    """
    differences = np.abs(candidate.astype(np.float64) - reference).max(axis=1)
    median, high = (float(np.quantile(differences, share)) for share in (0.5, ERROR_QUANTILE))
    spread = math.log(high / median) / _quantile(ERROR_QUANTILE) if 0 < median < math.inf > high else 0.0
    error = max(high, median * math.exp(min(OUTLIER * spread, MOST)))
    ours, theirs = candidate.argmax(axis=1), reference.argmax(axis=1)
    flipped = []
    for row in np.flatnonzero(ours != theirs):
        margin = float(reference[row, theirs[row]]) - float(reference[row, ours[row]])
        flipped.append(
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
    return error, flipped


def _quantile(share: float) -> float:
    """Returns the number below which that share of a standard normal distribution lies."""
    return statistics.NormalDist().inv_cdf(share)


def rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts the classes that are ranked before the label: int64 [images].

    Equal logits are ranked in the order of their classes. If a label is not one of the classes, or its row of logits is
    not finite, its rank is `LAST`, which is not among the first k for any k.
    """
    classes = logits.shape[1]
    known = (labels >= 0) & (labels < classes)
    label = np.where(known, labels, 0)[:, None]
    own = np.take_along_axis(logits, label, axis=1)
    before = (logits > own) | ((logits == own) & (np.arange(classes) < label))
    return np.where(known & np.isfinite(logits).all(axis=1), before.sum(axis=1), LAST)
