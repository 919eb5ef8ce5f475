"""The verdict on one array: equal, rounding or bug.

It answers two questions, in this order. Do both sides compute the same function in float64, where rounding is so small
that every wrong constant shows? Is either side, in the precision to judge, further from the float64 result than the
other side, or than rounding of that precision can explain?
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np

from parity.ladder.kept import HIGH, Kept, Whole

Verdict = Literal["equal", "rounding", "bug"]

# The spacing of floating-point numbers at 1. TF32 and float16 keep 10 bits after the point, bfloat16 keeps 7.
ULP = {"fp32": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7, "fp16": 2.0**-10, "fp64": 2.0**-52}

LIMIT = 1e-9
LIMIT_REASON = (
    "float64 rounding (1.1e-16) grown over a network of 150 layers and its gradient is seen below 1e-10; "
    "the mildest known faults, a wrong epsilon or weight decay, move an array by 1e-6"
)
MULTIPLE = 4.0
MULTIPLE_REASON = (
    "two correct float32 implementations are seen within a factor 2 of each other on every unit's output; "
    "products in TF32 err some 700 times more than in float32"
)
SLACK = 2.0  # a flipped ReLU moves both sides by similar but unequal amounts, so allow a factor of 2
LOOKS = 4  # the most sets of images that an array is judged on; measured by benchmarks/false_alarms.py
LOOKS_REASON = (
    "the error of few values, and whether a ReLU flips, is luck, and luck does not come four times; "
    "a loss of precision is there every time"
)
# Multiple of a float64 limit that bad luck cannot reach, because no ReLU flips in float64; in float32, a flipped ReLU
# multiplies a gradient's error by as much.
CERTAIN = 1e3
LEAST_DRAWS = 3  # disturbances in a further look; with one, 4 looks of 100 exceed the expected error of a single number


@dataclasses.dataclass(frozen=True)
class Line:
    """The verdict on one array.

    Attributes:
        rung, name, precision: the array's rung, its name and its precision.
        verdict: equal means equal bits; rounding means a difference within the limit.
        difference: the largest difference, relative to the reference's RMS.
        limit: in float64 the limit of `difference`; in other precisions the limit of the RMSE of the side whose error
            takes the larger share of its limit.
        reference_error, candidate_error: RMSE against float64, relative to its RMS; None in float64.
        disturbed_error: the same error of float64 itself under disturbances MULTIPLE times as large as rounding; in
            float64 the largest difference that its own rounding grows to, or None if that was not needed.
        used: the largest error as a share of its limit; None in float64.
        note: a sentence with more details, or empty.
        looks: number of sets of images that the verdict is based on.
    """

    rung: str
    name: str
    precision: str
    verdict: Verdict
    difference: float
    limit: float
    reference_error: float | None = None
    candidate_error: float | None = None
    disturbed_error: float | None = None
    used: float | None = None
    note: str = ""
    looks: int = 1


def exact(rung: str, name: str, precision: str, reference: Kept | np.ndarray, candidate: np.ndarray) -> Line:
    """Judges an array that is only copied, such as labels: any difference is a bug."""
    reference = _kept(reference)
    if shapes := _shapes(reference, candidate):
        return Line(rung, name, precision, "bug", np.inf, 0.0, note=shapes)
    same = reference.same(candidate)
    difference = 0.0 if same else reference.difference(candidate)
    return Line(rung, name, precision, "equal" if same else "bug", difference, 0.0)


def in_float64(
    rung: str, name: str, reference: Kept | np.ndarray, candidate: np.ndarray, *, limit: float = LIMIT, note: str = ""
) -> Line:
    """Judges an array in float64, where any difference above the limit is a bug."""
    reference = _kept(reference)
    if shapes := _shapes(reference, candidate):
        return Line(rung, name, "fp64", "bug", np.inf, limit, note=shapes)
    if reference.same(candidate):
        return Line(rung, name, "fp64", "equal", 0.0, limit, note=note)
    difference = reference.difference(candidate)
    return Line(rung, name, "fp64", "rounding" if difference <= limit else "bug", difference, limit, note=note)


@dataclasses.dataclass(frozen=True)
class Look:
    """Both sides' errors on one array, from one set of images.

    Attributes:
        reference, candidate: [RMSE, `HIGH` quantile] of the error against float64, each the smallest over the batches.
        explained: the same for float64 under disturbances, the largest over these; None if there were none.
        difference: the largest difference between the two sides, relative to the reference's RMS.
        same: whether the two sides have equal bits.
        shapes: a clause with both shapes if they differ, else empty.
    """

    reference: np.ndarray
    candidate: np.ndarray
    explained: np.ndarray | None
    difference: float
    same: bool = False
    shapes: str = ""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the reference says of one array, from one set of images: what a candidate's array is held against.

    Attributes:
        oracle: the float64 result of each batch.
        results: the reference's own results of each batch in the precision that is judged.
        errors: [RMSE, `HIGH` quantile] of the reference's error, each the smallest over the batches.
        explained: the same for float64 under disturbances, the largest over these; None if there were none.
    """

    oracle: Sequence[Kept]
    results: Sequence[Kept]
    errors: np.ndarray
    explained: np.ndarray | None

    @classmethod
    def of(
        cls, oracle: Sequence[Kept], results: Sequence[np.ndarray], disturbed: Sequence[Sequence[np.ndarray]]
    ) -> "Expected":
        """Measures the reference's error and what disturbances explain.

        Args:
            oracle: the float64 result of each batch.
            results: the reference's results of each batch.
            disturbed: for each disturbance, which is MULTIPLE times as large as rounding, the float64 result of each
                batch.
        """
        explained = np.max([_error(oracle, batches) for batches in disturbed], axis=0) if disturbed else None
        return cls(oracle, [_kept(result) for result in results], _error(oracle, results), explained)

    def look(self, candidate: Sequence[np.ndarray]) -> Look:
        """Measures a candidate's error, given its results of each batch.

        The smallest error over the batches counts: if a ReLU's input is within rounding of zero, the ReLU may be on in
        one framework and off in the other, which changes that batch's gradients by far more than rounding.
        """
        if shapes := _shapes(self.results[0], candidate[0]):
            return Look(np.full(2, np.inf), np.full(2, np.inf), None, np.inf, shapes=shapes)
        pairs = list(zip(self.results, candidate, strict=True))
        return Look(
            self.errors,
            _error(self.oracle, candidate),
            self.explained,
            max(result.difference(theirs) for result, theirs in pairs),
            all(result.same(theirs) for result, theirs in pairs),
        )


def look(
    oracle: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    candidate: Sequence[np.ndarray],
    disturbed: Sequence[Sequence[np.ndarray]],
) -> Look:
    """Measures both sides' errors from arrays of each batch; see `Expected`."""
    if _shapes(_kept(reference[0]), candidate[0]):
        return Expected([], [_kept(array) for array in reference], np.zeros(2), None).look(candidate)
    return Expected.of([_kept(array) for array in oracle], reference, disturbed).look(candidate)


def errors_and_limits(
    reference: np.ndarray, candidate: np.ndarray, explained: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {"reference": (its error, its limit), "candidate": ...} over the looks.

    A side's limit is MULTIPLE times the other side's error, or SLACK times the error that disturbances explain,
    whichever is larger. A side's error is its smallest over the looks, because bad luck does not come every time. Its
    limit uses (lower) medians over the looks, so that a ReLU that flips in one look, on the other side or in a
    disturbance, does not hide a fault.

    Args:
        reference, candidate, explained: errors of each look, [looks, ...].
    """
    middle = {"reference": _middle(candidate), "candidate": _middle(reference)}
    least = np.maximum(SLACK * _middle(explained), MULTIPLE * np.finfo(np.float32).eps)
    own = {"reference": reference, "candidate": candidate}
    return {who: (own[who].min(axis=0), np.maximum(MULTIPLE * middle[who], least)) for who in own}


def _middle(values: np.ndarray) -> np.ndarray:
    return np.sort(values, axis=0)[(len(values) - 1) // 2]


def calibrated(rung: str, name: str, precision: str, looks: Sequence[Look]) -> Line:
    """Judges an array in a precision other than float64; see `errors_and_limits`.

    For arrays of few values, or where ReLUs flip, correct sides sometimes exceed their limits in one look; `look_again`
    distinguishes bad luck from a fault.
    """
    first, count = looks[0], len(looks)
    difference = max(look.difference for look in looks)
    if first.shapes:
        return Line(rung, name, precision, "bug", np.inf, MULTIPLE, note=first.shapes)
    if first.same:
        return Line(rung, name, precision, "equal", 0.0, np.inf, float(first.reference[0]), float(first.candidate[0]))
    nothing = np.zeros(2)
    explained = np.stack([nothing if look.explained is None else look.explained for look in looks])
    judged = errors_and_limits(
        np.stack([look.reference for look in looks]), np.stack([look.candidate for look in looks]), explained
    )
    # NaN, which is the error of an array that is not finite, counts as an infinite share
    shares = {who: np.nan_to_num(error / limit, nan=np.inf) for who, (error, limit) in judged.items()}
    who = max(shares, key=lambda who: shares[who].max())
    which = int(shares[who].argmax())
    used = float(shares[who][which])
    error, limit = judged[who]
    note = ""
    if used > 1:
        kind = ("RMSE", f"{HIGH:.1%} error")[which]
        note = f"the {who}'s {kind} against float64, {error[which]:.1e}, is {used:.3g} times what is allowed"
        note += f", at the best of {count} looks" if count > 1 else ""
    elif count > 1:
        note = f"beyond its limit at {count - 1} of {count} looks, each at other images: luck, not a fault"
    return Line(
        rung,
        name,
        precision,
        "bug" if used > 1 else "rounding",
        difference,
        float(limit[0]),
        float(judged["reference"][0][0]),
        float(judged["candidate"][0][0]),
        None if first.explained is None else float(_middle(explained)[0]),
        used,
        note,
        count,
    )


def explained_by(exact: np.ndarray, disturbed: Sequence[np.ndarray]) -> np.ndarray:
    """Returns [RMSE, `HIGH` quantile] of the error of the disturbed results, the largest over these."""
    return np.max([_error([Whole(exact)], [result]) for result in disturbed], axis=0)


def recorded(
    rung: str,
    name: str,
    precision: str,
    exact: np.ndarray,
    record: np.ndarray,
    explained: np.ndarray,
    *,
    stored: float,
) -> Line:
    """Judges an array that a run recorded against float64's, where there is no other side to compare its error with.

    It may err SLACK times as much as float64 itself under disturbances that are MULTIPLE times as large as rounding,
    or as much as storing the array can, whichever is larger.

    Args:
        exact: the float64 result.
        record: what the run recorded.
        explained: [RMSE, `HIGH` quantile] of the error under disturbances, see `explained_by`.
        stored: relative error that comes from storing the array, once or in every step.
    """
    known = Whole(exact)
    if shapes := _shapes(known, record):
        return Line(rung, name, precision, "bug", np.inf, 0.0, note=shapes)
    error = _error([known], [record])
    limit = np.maximum(SLACK * explained, MULTIPLE * stored)
    shares = np.nan_to_num(error / limit, nan=np.inf)
    which = int(shares.argmax())
    used = float(shares[which])
    kind = ("RMSE", f"{HIGH:.1%} error")[which]
    return Line(
        rung,
        name,
        precision,
        "bug" if used > 1 else "rounding" if error.any() else "equal",
        known.difference(record),
        float(limit[which]),
        candidate_error=float(error[which]),
        disturbed_error=float(explained[which]),
        used=used,
        note=f"its {kind} against float64, {error[which]:.1e}, is {used:.3g} times what is allowed" if used > 1 else "",
    )


def by_chance(line: Line) -> bool:
    """Whether an error may exceed its limit by bad luck, so that a further look has to decide.

    It may not if the arrays' shapes differ or their numbers are not finite. In float64 it may only if the limit was
    itself measured, on a chaotic curve, and the difference is less than `CERTAIN` times the limit.
    """
    if line.verdict != "bug" or line.disturbed_error is None:
        return False
    if line.precision == "fp64":
        return line.difference < CERTAIN * line.limit
    return line.used is not None and bool(np.isfinite(line.used))


Evidence = TypeVar("Evidence")


def look_again(
    first: dict[str, Evidence],
    again: Callable[[int, list[str]], dict[str, Evidence]],
    judge: Callable[[str, list[Evidence]], Line],
) -> list[Line]:
    """Returns the verdicts on arrays; arrays in doubt get further looks, at most LOOKS in all.

    Args:
        first: {name: evidence of the first look at the array}.
        again: function (number of the look, starting at 1; names of the arrays in doubt) -> {name: evidence} of a
            further look, on other images.
        judge: function (name, evidence of every look at the array) -> the verdict.
    """
    seen = {name: [evidence] for name, evidence in first.items()}
    lines = {name: judge(name, looks) for name, looks in seen.items()}
    for number in range(1, LOOKS):
        doubtful = [name for name, line in lines.items() if by_chance(line)]
        if not doubtful:
            break
        for name, evidence in again(number, doubtful).items():
            seen[name].append(evidence)
            lines[name] = judge(name, seen[name])
    return list(lines.values())


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Returns the gravest of the verdicts; equal if there are none."""
    if "bug" in verdicts:
        return "bug"
    return "rounding" if "rounding" in verdicts else "equal"


def _error(oracle: Sequence[Kept], results: Sequence[np.ndarray]) -> np.ndarray:
    """Returns [RMSE, `HIGH` quantile] of the error relative to the oracle's RMS, each the smallest over the batches."""
    errors = np.array([exact.errors(result) for exact, result in zip(oracle, results, strict=True)])
    # one NaN makes the result NaN: the minimum must not hide it
    return np.where(np.isnan(errors).any(axis=0), np.nan, errors.min(axis=0))


def _kept(array: Kept | np.ndarray) -> Kept:
    return Whole(array) if isinstance(array, np.ndarray) else array


def _shapes(reference: Kept, candidate: np.ndarray) -> str:
    return "" if reference.shape == candidate.shape else f"shape {candidate.shape}, the reference's {reference.shape}"
