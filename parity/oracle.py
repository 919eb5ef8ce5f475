"""The verdict on one array: equal, rounding or bug.

Two questions, in this order. In float64, do both compute the same function? There rounding is so small that every
wrong constant stands out of it. Then, in the precision asked for, is either further from the float64 result than the
other, or than rounding of that size can bring it?
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

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


def calibrated(
    rung: str,
    name: str,
    precision: str,
    oracle: Sequence[np.ndarray],
    reference: Sequence[np.ndarray],
    candidate: Sequence[np.ndarray],
    disturbed: Sequence[Sequence[np.ndarray]],
) -> Line:
    """In any other precision, one look: neither may err more than MULTIPLE times as much as the other, or than SLACK
    times what float64 itself does when weights and pixels are disturbed MULTIPLE times as much as the better side's
    rounding.

    With few values, or where ReLUs flip, right sides exceed this now and then; `look_again` tells luck from a fault.

    The smallest error over the batches counts: a ReLU whose input is within rounding of zero opens in one framework
    and stays shut in the other, which changes gradients by far more than rounding, in that batch.

    Args:
        oracle: the float64 result of each batch.
        reference, candidate: the two results of each batch.
        disturbed: for each of some disturbances of that size, the float64 result of each batch.
    """
    if shapes := _shapes(reference[0], candidate[0]):
        return Line(rung, name, precision, "bug", np.inf, MULTIPLE, note=shapes)
    difference = max(relative_difference(a, b) for a, b in zip(reference, candidate, strict=True))
    if all(np.array_equal(a, b) for a, b in zip(reference, candidate, strict=True)):
        error = float(_error(oracle, reference)[0])
        return Line(rung, name, precision, "equal", 0.0, np.inf, error, error)
    errors = {"reference": _error(oracle, reference), "candidate": _error(oracle, candidate)}
    explained = np.array([_error(oracle, results) for results in disturbed]).reshape(-1, 2)
    limits = error_limits(errors["reference"], errors["candidate"], explained)
    # NaN, the error of what is not finite, is the largest share there is
    shares = {who: np.nan_to_num(errors[who] / limits[who], nan=np.inf) for who in errors}
    who = max(shares, key=lambda who: shares[who].max())
    which = int(shares[who].argmax())
    used = float(shares[who][which])
    note = ""
    if used > 1:
        kind = ("RMSE", f"{HIGH:.1%} error")[which]
        note = f"the {who}'s {kind} against float64, {errors[who][which]:.1e}, is {used:.3g} times what is allowed"
    return Line(
        rung,
        name,
        precision,
        "bug" if used > 1 else "rounding",
        difference,
        float(limits[who][0]),
        float(errors["reference"][0]),
        float(errors["candidate"][0]),
        float(explained[:, 0].max()) if disturbed else None,
        used,
        note,
    )


def error_limits(reference: np.ndarray, candidate: np.ndarray, disturbed: np.ndarray) -> dict[str, np.ndarray]:
    """How much each side may err, {"reference": [...], "candidate": [...]}, in one look.

    Args:
        reference, candidate: errors of the two sides, of any shape.
        disturbed: errors of float64 itself, [draws, ...]; there may be no draws.
    """
    explained = disturbed.max(axis=0, initial=0.0)
    least = np.maximum(SLACK * explained, MULTIPLE * np.finfo(np.float32).eps)
    return {
        "reference": np.maximum(MULTIPLE * candidate, least),
        "candidate": np.maximum(MULTIPLE * reference, least),
    }


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


def look_again(lines: Sequence[Line], look: Callable[[int, list[str]], Sequence[Line]]) -> list[Line]:
    """The lines after further looks at those that exceed their limits: a line fails if it exceeds them every time.

    Args:
        lines: of the first look.
        look: (number of the look, from 1; names of the lines in doubt) -> those lines, on other images.
    """
    judged = {line.name: line for line in lines}
    for number in range(1, LOOKS):
        doubtful = [line.name for line in judged.values() if by_chance(line)]
        if not doubtful:
            break
        for line in look(number, doubtful):
            before = judged[line.name]
            looks = number + 1
            if line.verdict == "bug":  # what is certain stays; of what is likely, the smallest excess is what was shown
                kept = min((before, line), key=lambda line: (by_chance(line), line.used or line.difference))
                judged[line.name] = dataclasses.replace(kept, looks=looks)
            else:
                note = f"beyond its limit in {number} of {looks} looks, at other images: luck"
                note += f" ({before.note})" if before.note else ""
                judged[line.name] = dataclasses.replace(line, looks=looks, note=note)
    return list(judged.values())


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
