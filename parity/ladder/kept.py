"""An array of the reference as a candidate's array is held against it: whole, or as a sketch of a few thousand numbers.

Distances are relative to the root mean square (RMS) of the array that is kept.
"""

import hashlib
import math
from typing import Any, Protocol

import numpy as np

HIGH = 0.999  # quantile of the error that is judged beside the RMSE, in which a few wrong values would not show
# Sums per sketch, each of a random part of the array with random signs. The estimate of an RMSE has a relative standard
# deviation of sqrt(1 / (2 SUMS)), 2.2 %, whatever the errors' distribution if no single value dominates.
SUMS = 1024
SAMPLE = 4096  # values of an array that a sketch keeps; about four of them lie beyond the `HIGH` quantile
SMALL = SUMS + SAMPLE  # arrays of at most so many values are kept whole
SEED = 0x9E3779B97F4A7C15  # of the sketches' random parts, signs and samples, which both ends draw alike
CHUNK = 1 << 20  # values whose parts and signs are drawn at a time


class Kept(Protocol):
    """What is known of one of the reference's arrays.

    Attributes:
        shape: shape of the array.
        exact: whether distances to it are computed from all values, not estimated.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def exact(self) -> bool: ...

    def difference(self, candidate: np.ndarray) -> float:
        """Returns the largest difference of an array of the same shape; infinite if either is not finite."""
        ...

    def errors(self, candidate: np.ndarray) -> np.ndarray:
        """Returns [RMSE, `HIGH` quantile] of the error of an array of the same shape."""
        ...

    def same(self, candidate: np.ndarray) -> bool:
        """Whether an array has the same bits, but for the signs of zeros."""
        ...


class Whole:
    """An array all of whose values are at hand."""

    exact = True

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def difference(self, candidate: np.ndarray) -> float:
        return relative_difference(self.array, candidate)

    def errors(self, candidate: np.ndarray) -> np.ndarray:
        error = np.abs(candidate.astype(np.float64) - self.array)
        return np.array([rms(error), np.quantile(error, HIGH)]) / scale(self.array)

    def same(self, candidate: np.ndarray) -> bool:
        return np.array_equal(self.array, candidate)


class Sketch:
    """A large array of which little is kept: enough to estimate how far another one is from it.

    Every value counts in one of `SUMS` sums, in a random part and with a random sign ("count sketch": Charikar, Chen
    and Farach-Colton, "Finding frequent items in data streams", 2002). The sums are linear, so those of a difference
    are the difference of the sums, and the mean of their squares estimates the mean square of the difference.
    Quantiles are those of a random sample of the values.

    What it cannot see: which values differ; in `difference`, a single wrong value that is wrong by less than
    sqrt(size / SUMS) times the limit; in the quantile, errors in less than a thousandth of the values, as ever, and
    the quantile itself to better than about a fifth.

    Attributes:
        sums: float64 [SUMS].
        sample: values at `positions`, float64.
        facts: shape, dtype, RMS, finite (whether all values are) and sha256 of the array, in JSON's types.
    """

    exact = False

    def __init__(self, sums: np.ndarray, sample: np.ndarray, facts: dict[str, Any]):
        self.sums, self.sample, self.facts = sums, sample, facts

    @classmethod
    def of(cls, array: np.ndarray, *, sample: int = SAMPLE) -> "Sketch":
        """Sketches an array of numbers, of which `sample` values are kept."""
        values = array.astype(np.float64)
        facts = {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "rms": rms(values),
            "finite": bool(np.isfinite(values).all()),
            "sha256": digest(array),
        }
        return cls(_sums(values), values.reshape(-1)[_positions(values.size, sample)], facts)

    @classmethod
    def restored(cls, numbers: np.ndarray, facts: dict[str, Any]) -> "Sketch":
        """Returns the sketch with those sums and sample, one after the other, and facts."""
        return cls(numbers[:SUMS], numbers[SUMS:], facts)

    @property
    def numbers(self) -> np.ndarray:
        """Sums and sample, one after the other."""
        return np.concatenate([self.sums, self.sample])

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.facts["shape"])

    def difference(self, candidate: np.ndarray) -> float:
        values = candidate.astype(np.float64)
        if not (self.facts["finite"] and np.isfinite(values).all()):
            return np.inf
        # the sum of `many` rounding errors is sqrt(many) times as large as one: a right array must not fail by that
        many = max(1.0, values.size / SUMS)
        in_sums = np.abs(_sums(values) - self.sums).max() / math.sqrt(many)
        return float(max(in_sums, np.abs(self._sampled(values) - self.sample).max())) / self._scale

    def errors(self, candidate: np.ndarray) -> np.ndarray:
        values = candidate.astype(np.float64)
        squares = np.square(_sums(values) - self.sums).sum() / values.size
        quantile = np.quantile(np.abs(self._sampled(values) - self.sample), HIGH)
        return np.array([math.sqrt(squares), quantile]) / self._scale

    def same(self, candidate: np.ndarray) -> bool:
        alike = str(candidate.dtype) == self.facts["dtype"] and self.facts["finite"]
        return alike and digest(candidate) == self.facts["sha256"]

    def _sampled(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1)[_positions(values.size, self.sample.size)]

    @property
    def _scale(self) -> float:
        return self.facts["rms"] or 1.0


def relative_difference(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Returns the largest difference, relative to the reference's RMS; infinite if either side is not finite."""
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        return np.inf
    return float(np.abs(reference - candidate).max(initial=0)) / scale(reference)


def relative_rmse(oracle: np.ndarray, result: np.ndarray) -> float:
    """Returns the RMSE of a result, relative to the RMS of the float64 result."""
    return rms(result.astype(np.float64) - oracle) / scale(oracle)


def rms(array: np.ndarray) -> float:
    """Returns the root mean square; 0 of an empty array."""
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


def scale(array: np.ndarray) -> float:
    """Returns what distances to an array are divided by: its RMS, or 1 if that is 0."""
    return rms(array.astype(np.float64)) or 1.0


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's values in little-endian order; zeros of both signs count as equal."""
    positive = array + np.zeros((), array.dtype)  # -0 + 0 is 0
    return hashlib.sha256(np.ascontiguousarray(positive, positive.dtype.newbyteorder("<")).tobytes()).hexdigest()


def _sums(values: np.ndarray) -> np.ndarray:
    """Returns the sums of random parts of the values with random signs, float64 [SUMS]."""
    flat, sums = values.reshape(-1), np.zeros(SUMS)
    for start in range(0, flat.size, CHUNK):
        chunk = flat[start : start + CHUNK]
        drawn = _hashed(np.arange(start, start + chunk.size, dtype=np.uint64))
        part, negative = drawn % np.uint64(SUMS), (drawn >> np.uint64(63)).astype(bool)
        sums += np.bincount(part.astype(np.int64), np.where(negative, -chunk, chunk), SUMS)
    return sums


def _hashed(numbers: np.ndarray) -> np.ndarray:
    """Returns a random 64-bit number for each number: the output function of SplitMix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", 2014)."""
    mixed = (numbers + np.uint64(1)) * np.uint64(SEED)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _positions(size: int, count: int) -> np.ndarray:
    """Returns the positions of the sample: one at random in each of `count` equal stretches of the array."""
    edges = np.arange(count, dtype=np.uint64) * np.uint64(size) // np.uint64(count)
    widths = np.append(edges[1:], np.uint64(size)) - edges
    return (edges + _hashed(edges + np.uint64(SEED)) % widths).astype(np.int64)
