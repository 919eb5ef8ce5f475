"""The verdict on one array: equal, rounding or bug.

Two questions, in this order. In float64, do both compute the same function? There rounding is so small that every
wrong constant stands out of it. Then, in the precision asked for, is either further from the float64 result than the
other, or than rounding of that size can bring it?
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import numpy as np

Verdict = Literal["equal", "rounding", "bug"]

GATE = 1e-9
GATE_REASON = (
    "float64 rounding (1.1e-16) grown over a network of 150 layers and its gradient is seen below 1e-10; "
    "the mildest known faults, a wrong epsilon or weight decay, move an array by 1e-6"
)
MULTIPLE = 4.0
MULTIPLE_REASON = (
    "two correct float32 implementations are seen within a factor 2 of each other on every unit's output; "
    "products in TF32 err some 700 times more than in float32"
)
SLACK = 2.0  # a gate that flips in one disturbance and on one side moves both as much, but not equally
HIGH = 0.999  # the percentile beside the RMSE: few wrong values in a large array hide in a mean
LOOKS = 4  # with other images each; measured by benchmarks/false_alarms.py
LOOKS_REASON = (
    "the error of few values, and whether a ReLU flips, is luck, and luck does not come four times; "
    "a loss of precision is there every time"
)
CERTAIN = 1e3  # in float64, where no ReLU flips; in float32 one that does multiplies a gradient's error by as much
LEAST_DRAWS = 3  # disturbances of a further look: with one, the error of one number is exceeded in 4 looks of 100


@dataclasses.dataclass(frozen=True)
class Line:
    """The verdict on one array.

    Attributes:
        rung, name, precision: which array.
        verdict: equal is bit for bit; rounding is within the limit.
        difference: the largest, relative to the reference's RMS.
        limit: of `difference` in float64; elsewhere of the RMSE that takes the larger share of its own.
        reference_error, candidate_error: RMSE against float64, relative to its RMS; None in float64.
        disturbed_error: the same of float64 itself under disturbances MULTIPLE times as large as rounding; in float64
            the largest difference that its own rounding grows to, or None where that was not needed.
        used: the largest share of its limit that an error takes; None in float64.
        note: one sentence, where there is more to say.
        looks: on how many sets of images the verdict rests.
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


def exact(rung: str, name: str, precision: str, reference: np.ndarray, candidate: np.ndarray) -> Line:
    """For what nobody computes: any difference is a bug."""
    if shapes := _shapes(reference, candidate):
        return Line(rung, name, precision, "bug", np.inf, 0.0, note=shapes)
    same = np.array_equal(reference, candidate)
    difference = 0.0 if same else relative_difference(reference, candidate)
    return Line(rung, name, precision, "equal" if same else "bug", difference, 0.0)


def gate(
    rung: str, name: str, reference: np.ndarray, candidate: np.ndarray, *, limit: float = GATE, note: str = ""
) -> Line:
    """In float64."""
    if shapes := _shapes(reference, candidate):
        return Line(rung, name, "fp64", "bug", np.inf, limit, note=shapes)
    difference = relative_difference(reference, candidate)
    verdict: Verdict = "equal" if np.array_equal(reference, candidate) else "rounding" if difference <= limit else "bug"
    return Line(rung, name, "fp64", verdict, difference, limit, note=note)


@dataclasses.dataclass(frozen=True)
class Look:
    """How much both sides err on one array, from one set of images.

    Attributes:
        reference, candidate: [RMSE, high percentile] against float64, each the smallest over the batches.
        explained: the same of float64 under disturbances, the largest of their draws; None where there were none.
        difference: the largest between the two sides, relative to the reference's RMS.
        same: whether they are equal bit for bit.
        shapes: how their shapes differ; empty where they do not.
    """

    reference: np.ndarray
    candidate: np.ndarray
    explained: np.ndarray | None
    difference: float
    same: bool = False
    shapes: str = ""


def look(
    oracle: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    candidate: Sequence[np.ndarray],
    disturbed: Sequence[Sequence[np.ndarray]],
) -> Look:
    """Measures both sides' errors.

    The smallest error over the batches counts: a ReLU whose input is within rounding of zero opens in one framework
    and stays shut in the other, which changes gradients by far more than rounding, in that batch.

    Args:
        oracle: the float64 result of each batch.
        reference, candidate: the two results of each batch.
        disturbed: for each of some disturbances, MULTIPLE times as large as the better side's rounding, the float64
            result of each batch.
    """
    if shapes := _shapes(reference[0], candidate[0]):
        return Look(np.full(2, np.inf), np.full(2, np.inf), None, np.inf, shapes=shapes)
    pairs = list(zip(reference, candidate, strict=True))
    return Look(
        _error(oracle, reference),
        _error(oracle, candidate),
        np.max([_error(oracle, results) for results in disturbed], axis=0) if disturbed else None,
        max(relative_difference(*pair) for pair in pairs),
        all(np.array_equal(*pair) for pair in pairs),
    )


def errors_and_limits(
    reference: np.ndarray, candidate: np.ndarray, explained: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"reference": (its error, how much it may err), "candidate": ...} over some looks.

    Neither may err more than MULTIPLE times as much as the other, or than SLACK times what disturbances explain. Of a
    side's own errors the smallest look counts, because luck is not there every time; of what it is held against the
    (lower) median, so that a ReLU that flips in one look, of the other side or a disturbance, hides no fault.

    Args:
        reference, candidate, explained: [looks, ...].
    """
    middle = {"reference": _middle(candidate), "candidate": _middle(reference)}
    least = np.maximum(SLACK * _middle(explained), MULTIPLE * np.finfo(np.float32).eps)
    own = {"reference": reference, "candidate": candidate}
    return {who: (own[who].min(axis=0), np.maximum(MULTIPLE * middle[who], least)) for who in own}


def _middle(values: np.ndarray) -> np.ndarray:
    return np.sort(values, axis=0)[(len(values) - 1) // 2]


def calibrated(rung: str, name: str, precision: str, looks: Sequence[Look]) -> Line:
    """The verdict in any other precision than float64; see `errors_and_limits`.

    With few values, or where ReLUs flip, right sides exceed their limits in one look now and then; `look_again` tells
    luck from a fault.
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
    # NaN, the error of what is not finite, is the largest share there is
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


def by_chance(line: Line) -> bool:
    """Whether bad luck can have brought an error beyond its limit, so that a further look decides.

    It cannot where the two arrays have other shapes or hold numbers that are not finite, and in float64 only where the
    limit was itself measured, on a chaotic curve, and is not exceeded `CERTAIN` times.
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
    """The verdicts on arrays, those in doubt after further looks, at most LOOKS in all.

    Args:
        first: {name: what the first look at it showed}.
        again: (number of the look, from 1; names of the arrays in doubt) -> the same of those, on other images.
        judge: (name, what every look at it showed) -> the verdict.
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


def relative_difference(reference: np.ndarray, candidate: np.ndarray) -> float:
    """The largest difference, relative to the reference's RMS; infinite where either is not finite."""
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        return np.inf
    return float(np.abs(reference - candidate).max(initial=0)) / _scale(reference)


def relative_rmse(oracle: np.ndarray, result: np.ndarray) -> float:
    return rms(result.astype(np.float64) - oracle) / _scale(oracle)


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if array.size else 0.0


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The gravest; equal if there are none."""
    if "bug" in verdicts:
        return "bug"
    return "rounding" if "rounding" in verdicts else "equal"


def _error(oracle: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> np.ndarray:
    """[RMSE, high percentile], each the smallest over the batches, relative to the oracle's RMS."""
    errors = []
    for exact_result, result in zip(oracle, results, strict=True):
        error = np.abs(result.astype(np.float64) - exact_result)
        errors.append((rms(error) / _scale(exact_result), np.quantile(error, HIGH) / _scale(exact_result)))
    # NaN is kept: it is never the smaller error
    return np.where(np.isnan(errors).any(axis=0), np.nan, np.min(errors, axis=0))


def _scale(array: np.ndarray) -> float:
    return rms(array.astype(np.float64)) or 1.0


def _shapes(reference: np.ndarray, candidate: np.ndarray) -> str:
    return "" if reference.shape == candidate.shape else f"shape {candidate.shape}, the reference's {reference.shape}"
