"""Where two sides differ: the unit that is wrong by itself, and the operation within it."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bit_jax.model.architecture import GROUPS, Architecture
from input_pipeline.errors import RunFailed
from parity.ladder import verdict
from parity.ladder.kept import Whole, rms
from parity.ladder.ladder import Ladder, RungResult
from parity.ladder.verdict import LIMIT, MULTIPLE, Line
from parity.sides.operations import LAST_SITE, NORM, operations
from parity.sides.worker import Arrays

FITS = 0.1  # residual of a fit, as a share of the error that it has to explain
LEAST_FITTED = 8  # values in a group that two numbers are fitted to


def diverge(ladder: Ladder, result: RungResult, failed: list[Line]) -> None:
    """Adds to the result where the two sides first differ, and whether that unit is wrong by itself.

    Each unit is computed again from the float64 reference's input. A unit that only passed on the difference of its
    input then agrees.
    """
    precision, first = failed[0].precision, failed[0]
    teacher = ladder.reference.teacher(precision)
    if teacher is None:
        result.findings.append(
            f"first divergence in {precision}: {first.name} ({size(first)}); what it computes with, the output before "
            "it, agrees. That no other unit is wrong by itself cannot be told from sketches of the reference"
        )
        return
    exact, precise = Arrays(teacher), precision == "fp64"
    candidate = ladder.ask("candidate", precision, "forward", images=ladder.pictures(), teacher=teacher).arrays
    fed = {} if precise else ladder.reference.fed()
    guilty, errors = [], {}
    for site in exact.names:
        if site not in candidate or not (precise or site in fed):
            continue
        known = Whole(exact[site])
        if precise:
            errors[site] = known.difference(candidate[site])
            wrong = not errors[site] <= LIMIT
        else:
            look = verdict.Look(fed[site], known.errors(candidate[site]), None, np.nan)
            errors[site] = float(look.candidate[0])
            wrong = verdict.calibrated("forward", site, precision, [look]).verdict == "bug"
        if wrong:
            guilty.append(site)
    if first.name in guilty:
        cause = f"fed the reference's input it still differs, by {errors[first.name]:.1e}: the fault is in this unit"
    elif guilty:
        cause = f"fed the reference's input it does not, but {guilty[0]} does: the fault is there"
    else:
        cause = "fed the reference's input no unit differs: rounding accumulates, no unit is wrong by itself"
    result.findings.append(f"first divergence in {precision}: {first.name} ({size(first)}); {cause}")
    if len(guilty) > 1:
        result.findings.append(f"units that differ on their own: {', '.join(guilty)}")
    if guilty:
        name_operation(ladder, result, [first.name if first.name in guilty else guilty[0]], precision)
    result.details["divergence"] = {
        "precision": precision,
        "free_running": first.name,
        "teacher_forced": guilty,
        "teacher_forced_errors": errors,
    }


def name_operation(ladder: Ladder, result: RungResult, sites: Sequence[str], precision: str) -> None:
    """Adds to the result which operation of the sites is wrong by itself. The first site with such a one is reported.

    Every operation is fed what the float64 reference computes with, forward and backward; see `sides/operations.py`.
    If the reference is a record, the candidate's own float64 does as well once it agrees with the record.
    """
    if "reference" not in ladder.roles and precision == "fp64":
        result.findings.append("which operation is wrong in float64 is not in the record; compare with the reference")
        return
    lines, wrong = [], {}
    try:
        for site in sites:
            judged = _of_operations(_judge(ladder, site, precision))
            lines += judged
            if wrong := _wrong(ladder, site, precision, judged):
                break
    except RunFailed as error:  # another model's modules may be called in ways that cannot be observed
        result.findings.append(f"which operation is wrong cannot be found out: {error}")
        return
    result.details["operations"] = {
        "precision": precision,
        "sites": list(sites),
        "wrong": list(wrong),
        "lines": [dataclasses.asdict(line) for line in lines],
    }
    result.findings += _sentences(sites, wrong, lines)


def sites_behind(key: str, architecture: Architecture) -> list[str]:
    """Returns the site that a parameter belongs to and the one behind it: the operations whose gradients reach this
    parameter but none with a parameter behind it."""
    sites = ["root_block"]
    for stage, units in enumerate(architecture.units, start=1):
        sites += [f"block{stage}/unit{unit:02d}" for unit in range(1, units + 1)]
    sites.append(LAST_SITE)
    match = re.match(r"resnet/(root_block|block\d/unit\d+)/", key)
    place = sites.index(match[1] if match else LAST_SITE)
    return sites[place : place + 2]


def _of_operations(lines: list[Line]) -> list[Line]:
    """Returns the lines without those of ReLUs whose norm is wrong in the same direction: where a norm and its ReLU are
    one function, an error of the norm is in the ReLU's result, too."""
    bugs = [line.name for line in lines if line.verdict == "bug"]

    def passed_on(name: str) -> bool:
        norm, found = re.subn(r"relu, (value|by).*", rf"{NORM}, \1", name)
        return bool(found) and any(other.startswith(norm) for other in bugs)

    return [line for line in lines if not passed_on(line.name)]


def _judge(ladder: Ladder, site: str, precision: str) -> list[Line]:
    """Judges what each operation of a site makes of the recorded values and gradients."""
    rung = "operations"
    if precision == "fp64":
        fed = _fed(ladder, site, 0)
        reference, candidate = ladder.both("fp64", rung, **fed)
        shared = [name for name in reference.names if name in candidate]
        return [verdict.in_float64(rung, name, reference[name], candidate[name]) for name in shared]

    def look(number: int) -> dict[str, verdict.Look]:
        fed = _fed(ladder, site, number)
        exact = ladder.ask(ladder.oracle, "fp64", rung, **fed).arrays
        disturbed = ladder.disturbed(rung, MULTIPLE * ladder.amplitude, number, **fed)
        reference, candidate = _sides(ladder, precision, **fed)
        shared = [name for name in exact.names if name in reference and name in candidate]
        return {
            name: verdict.look([exact[name]], [reference[name]], [candidate[name]], [[a[name]] for a in disturbed])
            for name in shared
        }

    def again(number: int, doubtful: list[str]) -> dict[str, verdict.Look]:
        with ladder.forgetting():
            looks = look(number)
        return {name: looks[name] for name in doubtful}

    return verdict.look_again(look(0), again, lambda name, looks: verdict.calibrated(rung, name, precision, looks))


def _fed(ladder: Ladder, site: str, number: int) -> dict[str, Any]:
    """Returns the arguments of a fed pass over a site's operations, after the reference has recorded them."""
    arguments = {"mixed": ladder.mixed_pictures(number), "site": site}
    recording = ladder.ask(ladder.oracle, "fp64", "operations", **arguments).arrays.path
    return arguments | {"teacher": recording}


def _sides(ladder: Ladder, precision: str, **fed: Any) -> tuple[Arrays, Arrays]:
    """Returns what both sides make of a fed pass; a recorded reference is taken to make what float64 makes."""
    if "reference" in ladder.roles:
        return ladder.both(precision, "operations", **fed)
    exact = ladder.ask(ladder.oracle, "fp64", "operations", **fed).arrays
    return exact, ladder.ask("candidate", precision, "operations", **fed).arrays


def _wrong(ladder: Ladder, site: str, precision: str, lines: list[Line]) -> dict[str, Line]:
    """Returns {operation and what of it is wrong: its line}, the first in the order of computation first: forward, or
    else on the way back."""
    bugs = {line.name: line for line in lines if line.verdict == "bug"}
    order = list(operations(site, ladder.architecture.layout))

    def place(name: str) -> tuple[bool, int]:
        forward, where = name.endswith(", value"), order.index(name.partition(", ")[0])
        return not forward, where if forward else -where

    names = sorted(bugs, key=place)
    return {_with_part(ladder, site, precision, name): bugs[name] for name in names}


def _with_part(ladder: Ladder, site: str, precision: str, name: str) -> str:
    """Returns the name, with the part of a norm that is wrong: its statistics, or what is made of them."""
    norm, _, what = name.partition(", ")
    if what != "value" or not norm.endswith(NORM):
        return name
    fed = _fed(ladder, site, 0)
    op = operations(site, ladder.architecture.layout)[norm]
    x = Arrays(fed["teacher"])[f"{op.inputs['input']}, value"]
    read = ladder.ask(ladder.oracle, "fp64", "weights").arrays
    gamma, beta = (read[op.parameters[parameter]].astype(np.float64) for parameter in ("gamma", "beta"))
    sides = [side[name].astype(np.float64) for side in _sides(ladder, precision, **fed)]
    part = wrong_part(x, gamma, beta, sides)
    return f"{norm}/{part}, {what}" if part else name


def wrong_part(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, results: Sequence[np.ndarray]) -> str:
    """Returns which part of a norm two results differ in: `statistics` if each is gamma (a x + b) + beta for some
    numbers a and b of each image and group, else `normalization`; empty if that cannot be told, as where a group
    has one channel, or few values.

    Args:
        x: input of the norm, [batch, height, width, channels].
        gamma, beta: its parameters, [channels].
        results: what two sides made of it, float64 in x's shape; 0 where the ReLU is off.
    """

    def grouped(array: np.ndarray) -> np.ndarray:
        """Returns [batch, groups, values]."""
        batch, _, _, channels = x.shape
        split = np.broadcast_to(array, x.shape).reshape(batch, -1, GROUPS, channels // GROUPS)
        return split.swapaxes(1, 2).reshape(batch, GROUPS, -1)

    if x.shape[-1] == GROUPS:
        return ""
    on = grouped(np.min(results, axis=0) > 0)
    on = on & (on.sum(axis=-1, keepdims=True) >= LEAST_FITTED)
    if not on.any():
        return ""
    design = np.stack([grouped(gamma * x) * on, grouped(gamma) * on], axis=-1)
    targets = [(grouped(result) - grouped(beta)) * on for result in results]
    error = rms(targets[1] - targets[0])
    for target in targets:
        fitted = (design @ (np.linalg.pinv(design) @ target[..., None]))[..., 0]
        if rms(target - fitted) > FITS * error:
            return "normalization"
    return "statistics"


def _sentences(sites: Sequence[str], wrong: dict[str, Line], lines: list[Line]) -> list[str]:
    where = " or ".join(sites)
    if not lines:
        return [f"no operation of {where} can be observed: no module of a side holds its parameters alone"]
    if not wrong:
        return [
            f"no operation of {where} errs by itself: fed the oracle's values and gradients, each agrees; the cause "
            "lies in how they are compiled together, or in what can only be observed as a whole"
        ]
    name, line = next(iter(wrong.items()))
    given = "input" if name.endswith(", value") else "input and gradient"
    by = line.note or f"it differs by {line.difference:.1e}"
    sentences = [f"{name}, errs by itself: fed the oracle's {given}, {by}"]
    if len(wrong) > 1:
        sentences.append(f"with it: {'; '.join(list(wrong)[1:])}")
    return sentences


def size(line: Line) -> str:
    """Returns how far an array is off, in words."""
    return line.note or f"relative difference {line.difference:.1e}, limit {line.limit:.0e}"


def depth(key: str) -> tuple:
    """Returns the depth in the network of a parameter's key, as a tuple that sorts from the first layer to the last."""
    place = re.match(r"resnet/(?:block(\d)/unit(\d+)/([abc])/(proj)?|(root_block)|(group_norm)|(head))", key)
    if place is None:
        return (9,)
    if place[5]:
        return (0,)
    if place[6] or place[7]:
        return (7,) if place[6] else (8,)
    return int(place[1]), int(place[2]), place[3], place[4] is None
