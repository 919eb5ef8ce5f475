"""The ladder's rungs: what each asks of both sides, and how the answers are judged.

A rung takes the ladder and returns its result; every rung is judged in float64 first and, where that agrees, in the
precision asked for.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bit_jax.training.hyperrule import resolution
from bit_jax.training.steps import FIRST_SCALE
from input_pipeline.preprocess import Views
from parity.ladder import verdict
from parity.ladder.accuracy import accuracy
from parity.ladder.attestation import PRODUCTS
from parity.ladder.ladder import ROLES, ULP, Ladder, RungResult
from parity.ladder.verdict import LIMIT, MULTIPLE, Line
from parity.sides import inputs
from parity.sides.worker import Arrays

NOT_COMPARED = "not compared: no module of its own in the"
EPOCHS = 2  # of the pixels rung: augmentation differs between them
SCHEDULE_STEP = 2  # of the optimizer rung: inside the warm-up, where the rate changes every step
NARROW = 64.0  # ulps: two correct sides are seen below 10; products one format narrower are above 500
SHOWN = 3  # names of arrays in a line that tells of a further look
LEAST_SCALE = 1.0  # of float16's loss: gradients that overflow without any scaling are wrong
LOSS_SCALE = "loss scale"  # the line that tells of it
# times: autocast keeps the head kernel's gradient in float16, JAX in float32, so right sides overflow at other scales:
# a random R14x0.5's at 2^16 in PyTorch alone, at 2^14 in neither. A loss that is scaled twice is 2^9 times apart.
SCALES_APART = 64.0
DISTURBED_ULPS = 16.0  # float64's own rounding, when a chaotic curve has to be told from a wrong one


def weights(ladder: Ladder) -> RungResult:
    """Compares every array of the weight file as both loaders read it."""
    reference, candidate = ladder.both("fp64", "weights")
    lines = [
        verdict.exact("weights", key, "fp64", reference[key], candidate[key])
        for key in reference.names
        if key in candidate
    ]
    return RungResult("weights", lines + _absent("weights", "fp64", reference, candidate))


def pixels(ladder: Ladder) -> RungResult:
    """Compares what both input pipelines make of the same image files, in evaluation and in training."""
    options = ladder.options
    files = list(options.images) or inputs.write_files(ladder.folder / "files")
    crop = max(options.height_width)
    full_resize, full_crop = resolution(crop * crop)
    resize = max(crop, round(crop * full_resize / full_crop))
    draws = inputs.draws(Views(resize, crop, flip=True), len(files), EPOCHS, options.seed)
    shared = {"files": [str(path) for path in files], "resize": resize, "crop": crop, "seed": options.seed}
    reference, candidate = ladder.both("fp64", "pixels", epochs=EPOCHS, draws=draws, **shared)
    lines = _in_float64("pixels", _single(reference), _single(candidate), fail_fast=options.fail_fast)
    return RungResult("pixels", lines + _absent("pixels", "fp64", reference, candidate))


def forward(ladder: Ladder) -> RungResult:
    """Compares every unit's output, free-running; where one differs, also with the reference's input for each unit."""
    result = _judge(ladder, "forward", "forward", lambda look: {"images": ladder.pictures(look)}, _single)
    if ladder.options.precision == "fp16" and result.verdict != "bug":
        _name_products(ladder, result)
    if ladder.options.precision != "fp64" and result.verdict != "bug":
        ulps = ladder.amplitude_in_ulp
        result.details["amplitude"] = {"ulp": ulps, "precision": ladder.options.precision}
        if ulps > NARROW:
            note = f"both err as if every weight and pixel were disturbed by {ulps:.0f} ulp: products are narrower"
            line = Line("forward", "all units", ladder.options.precision, "bug", ulps, NARROW, note=note)
            result.lines.append(line)
            result.findings.append(f"{note} than {ladder.options.precision}")
    unseen = [line.name for line in result.lines if line.note.startswith(NOT_COMPARED)]
    if unseen:
        result.findings.append(f"not compared, as a side has no module of its own for them: {', '.join(unseen)}")
    failed = [line for line in result.lines if line.verdict == "bug" and line.name not in ("all units", *OPERANDS)]
    if failed:
        _diverge(ladder, result, failed)
    return result


OPERANDS = ("matrix products", "convolution products")  # of what: lines of `_name_products`


def _name_products(ladder: Ladder, result: RungResult) -> None:
    """A bug, said first, for each kind of product that a side does not multiply in float16. It errs 8 times less than
    bfloat16, which is within `NARROW` and hardly beyond what errors may differ by, so errors alone would not tell."""
    precision = ladder.options.precision
    wrong = [
        (kind, f"{precision} was asked for, but the {role} multiplies in {used}")
        for role in ROLES
        for kind, used in zip(OPERANDS, ladder.ask(role, precision, "products").info, strict=True)
        if used != PRODUCTS[precision]
    ]
    lines = [Line("forward", kind, precision, "bug", np.inf, 0.0, note=note) for kind, note in wrong]
    result.lines[:0] = lines
    result.findings += [f"{kind}: {note}" for kind, note in wrong]


def loss(ladder: Ladder) -> RungResult:
    """Compares normalization and mixup, which each side does itself, then the loss of the reference's mixed batch."""
    result = _judge(ladder, "loss", "mix", lambda look: {"batches": ladder.pictures(look)}, _single, disturb=False)
    if result.verdict == "bug":
        return result
    rest = _judge(ladder, "loss", "loss", lambda look: {"mixed": ladder.mixed_pictures(look)}, _single)
    return RungResult("loss", result.lines + rest.lines)


def gradients(ladder: Ladder) -> RungResult:
    """Compares the gradient of every parameter, under the checkpoint's key."""
    batches = ladder.options.batches
    result = _judge(
        ladder,
        "gradients",
        "gradients",
        lambda look: {"mixed": ladder.mixed_pictures(look), "count": batches},
        _by_batch,
        differentiates=True,
    )
    failed = [line for line in result.lines if line.verdict == "bug" and line.name != LOSS_SCALE]
    if failed:
        last = max(failed, key=lambda line: _order(line.name))
        result.findings.append(
            f"the first gradient to differ on the way back from the loss is {last.name} "
            f"({_size(last)}); {len(failed)} of {len(result.lines)} lines differ"
        )
    return result


def optimizer(ladder: Ladder) -> RungResult:
    """Compares parameters and momentum after one step in the warm-up, with the reference's gradients and a momentum."""
    options = ladder.options
    gradients = ladder.ask("reference", "fp64", "gradients", mixed=ladder.mixed_pictures(), count=options.batches)
    arguments = {
        "gradients": gradients.arrays.path,
        "schedule": options.schedule | {"warmup_steps": max(options.warmup_steps, SCHEDULE_STEP + 1)},
        "momentum": options.momentum,
        "step": SCHEDULE_STEP,
    }
    result = _judge(ladder, "optimizer", "optimizer", lambda look: arguments, _single, disturb=False)
    _name_first(result)
    return result


def curve(ladder: Ladder) -> RungResult:
    """Compares the losses of some steps on identical batches after mixup, and the parameters after them."""
    options = ladder.options
    training = {"count": options.steps, "schedule": options.schedule, "momentum": options.momentum}
    result = _judge(
        ladder,
        "curve",
        "curve",
        lambda look: {"mixed": ladder.mixed_batches(look)} | training,
        _single,
        chaotic=True,
        differentiates=True,
    )
    reference, candidate = result.details["losses"]["fp64"]
    apart = np.abs(np.subtract(reference, candidate)) > LIMIT * np.abs(reference)
    if result.verdict == "bug" and apart.any():
        step = int(np.argmax(apart))
        result.findings.append(
            f"the losses part at step {step} of {options.steps}: {reference[step]:.12g}, {candidate[step]:.12g}"
        )
    _name_first(result)
    return result


RUNGS: dict[str, Callable[[Ladder], RungResult]] = {
    "weights": weights,
    "pixels": pixels,
    "forward": forward,
    "loss": loss,
    "gradients": gradients,
    "optimizer": optimizer,
    "curve": curve,
    "accuracy": accuracy,
}

Grouping = Callable[[Arrays], dict[str, list[Callable[[], np.ndarray]]]]
Asking = Callable[[int], dict[str, Any]]


def _judge(
    ladder: Ladder,
    rung: str,
    task: str,
    arguments: Asking,
    group: Grouping,
    *,
    disturb: bool = True,
    chaotic: bool = False,
    differentiates: bool = False,
) -> RungResult:
    """Float64, then the precision asked for; lines that luck may have brought beyond their limits are looked at again.

    Args:
        rung, task: what to ask.
        arguments: (number of the look) -> what the task is given; every look has other images.
        group: the answer's arrays by name, one a batch.
        disturb: whether the task can be disturbed to see which error to expect; else one ulp is.
        chaotic: whether rounding may grow so much that float64 has to be disturbed too, to tell.
        differentiates: whether the task takes gradients: in float16 of the scaled loss, see `_loss_scales`.
    """
    precision, fail_fast = ladder.options.precision, ladder.options.fail_fast
    reference, candidate = ladder.both("fp64", task, **arguments(0))
    lines = _in_float64(rung, group(reference), group(candidate), fail_fast=fail_fast)

    def grown(look: int, doubtful: Sequence[str]) -> dict[str, tuple[float, float]]:
        return _growth(ladder, task, arguments(look), look, doubtful)

    beyond = [line.name for line in lines if line.verdict == "bug" and np.isfinite(line.difference)]
    if chaotic and beyond:
        again = _telling(ladder, grown)
        judged = verdict.look_again(grown(0, beyond), again, lambda name, looks: _allow_for_growth(rung, name, looks))
        allowed = {line.name: line for line in judged}
        lines = [allowed.get(line.name, line) for line in lines]
    result = RungResult(rung, lines + _absent(rung, "fp64", reference, candidate))
    if "losses" in reference.names:
        result.details["losses"] = {"fp64": [reference["losses"].tolist(), candidate["losses"].tolist()]}
    if result.verdict == "bug" or precision == "fp64":
        return result

    def scaled(look: int) -> dict[str, Any]:
        """What both sides are told beside the arguments: the same scale."""
        if not (differentiates and precision == "fp16"):
            return {}
        return {"scale": min(_loss_scales(ladder, task, arguments(look)).values())}

    def measured(look: int, doubtful: Sequence[str] | None = None) -> dict[str, verdict.Look]:
        return _look(ladder, task, arguments(look), scaled(look), group, look, doubtful, disturb=disturb)

    lines = verdict.look_again(
        measured(0),
        _telling(ladder, measured),
        lambda name, looks: verdict.calibrated(rung, name, precision, looks),
    )
    if scaled(0):
        lines.insert(0, line := _scale_line(rung, precision, _loss_scales(ladder, task, arguments(0))))
        result.findings += [line.note] if line.note else []
    failed = next((place for place, line in enumerate(lines) if line.verdict == "bug"), len(lines))
    result.lines += lines[: failed + 1] if fail_fast else lines
    if "losses" in reference.names:
        results = ladder.both(precision, task, **arguments(0), **scaled(0))
        result.details["losses"][precision] = [side["losses"].tolist() for side in results]
    return result


Again = Callable[[int, list[str]], dict[str, Any]]


def _telling(ladder: Ladder, look: Again) -> Again:
    """A further look, of which a person is told and whose files are not kept."""

    def again(number: int, doubtful: list[str]) -> dict[str, Any]:
        ladder.say(f"beyond its limit, by chance perhaps: {', '.join(doubtful[:SHOWN])}; looking at other images")
        with ladder.forgetting():
            return look(number, doubtful)

    return again


def _look(
    ladder: Ladder,
    task: str,
    arguments: dict[str, Any],
    scaled: dict[str, Any],
    group: Grouping,
    number: int,
    names: Sequence[str] | None,
    *,
    disturb: bool,
) -> dict[str, verdict.Look]:
    """One look in the precision asked for, where the task is told `scaled` too; at the arrays of those names, or
    all."""
    exact = group(ladder.ask("reference", "fp64", task, **arguments).arrays)
    disturbed = ladder.disturbed(task, MULTIPLE * ladder.amplitude, number, **arguments) if disturb else []
    others = [group(arrays) for arrays in disturbed]
    reference, candidate = (
        group(arrays) for arrays in ladder.both(ladder.options.precision, task, **arguments, **scaled)
    )
    return {
        name: verdict.look(
            _read(batches), _read(reference[name]), _read(candidate[name]), [_read(other[name]) for other in others]
        )
        for name, batches in exact.items()
        if name in reference and name in candidate and (names is None or name in names)
    }


def _loss_scales(ladder: Ladder, task: str, arguments: dict[str, Any]) -> dict[str, float]:
    """{role: the largest of train.py's first loss scale and its halves at which no gradient of that side overflows in
    float16}. Training, too, halves its scale until none does; both sides are judged at the smaller of theirs."""
    scales = {}
    for role in ROLES:
        scale = FIRST_SCALE
        while scale > LEAST_SCALE:
            answer = ladder.ask(role, ladder.options.precision, task, **arguments, scale=scale)
            if not answer.info["overflows"]:
                break
            answer.discard()
            scale /= 2
        scales[role] = scale
    return scales


def _scale_line(rung: str, precision: str, scales: dict[str, float]) -> Line:
    """A bug where gradients of one side are finite at more than SCALES_APART times the other's scale; within that, it
    is said."""
    reference, candidate = (scales[role] for role in ROLES)
    apart = max(reference, candidate) / min(reference, candidate)
    note = ""
    if (reference, candidate) != (FIRST_SCALE, FIRST_SCALE):
        note = (
            f"gradients are finite up to a loss scale of {reference:g} on the reference, {candidate:g} on the candidate"
        )
    judged = "equal" if apart == 1 else "rounding" if apart <= SCALES_APART else "bug"
    return Line(rung, LOSS_SCALE, precision, judged, apart - 1, SCALES_APART - 1, note=note)


def _in_float64(rung: str, reference: dict[str, list], candidate: dict[str, list], *, fail_fast: bool) -> list[Line]:
    """A line a name: the worst of its batches."""
    lines = []
    for name, batches in reference.items():
        if name not in candidate:
            continue
        pairs = zip(batches, candidate[name], strict=True)
        of_batches = [verdict.in_float64(rung, name, ours(), theirs()) for ours, theirs in pairs]
        lines.append(max(of_batches, key=lambda line: (line.verdict == "bug", line.difference)))
        if fail_fast and lines[-1].verdict == "bug":
            break
    return lines


def _growth(
    ladder: Ladder, task: str, arguments: dict[str, Any], number: int, names: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """{name: (how far the two are apart, what float64's own rounding grows to)} in one look."""
    reference, candidate = ladder.both("fp64", task, **arguments)
    disturbed = ladder.disturbed(task, DISTURBED_ULPS * ULP["fp64"], number, **arguments)
    return {
        name: (
            verdict.relative_difference(reference[name], candidate[name]),
            max(verdict.relative_difference(reference[name], arrays[name]) for arrays in disturbed),
        )
        for name in names
    }


def _allow_for_growth(rung: str, name: str, looks: Sequence[tuple[float, float]]) -> Line:
    """The verdict on an array beyond the limit of float64."""
    difference = min(apart for apart, _ in looks)
    grown = sorted(grown for _, grown in looks)[(len(looks) - 1) // 2]
    limit = max(grown, LIMIT)
    note = f"{DISTURBED_ULPS:g} ulp of float64 grow to {grown:.1e} here; a lower --base-lr would tell more"
    judged = "rounding" if difference <= limit else "bug"
    return Line(rung, name, "fp64", judged, difference, limit, disturbed_error=grown, note=note, looks=len(looks))


def _absent(rung: str, precision: str, reference: Arrays, candidate: Arrays) -> list[Line]:
    """What only one side has. A model without a module for a unit cannot be looked into there: that is no fault."""
    names = [(name, "candidate") for name in reference.names if name not in candidate]
    names += [(name, "reference") for name in candidate.names if name not in reference]
    if rung == "forward":
        return [Line(rung, name, precision, "equal", 0.0, np.inf, note=f"{NOT_COMPARED} {who}") for name, who in names]
    return [Line(rung, name, precision, "bug", np.inf, 0.0, note=f"the {who} has none") for name, who in names]


def _diverge(ladder: Ladder, result: RungResult, failed: list[Line]) -> None:
    """Says where the two first part, and whether that unit errs on its own or only passes on what it was given."""
    precision = failed[0].precision
    path = ladder.ask("reference", "fp64", "forward", images=ladder.pictures()).arrays.path
    exact = Arrays(path)
    arguments = {"images": ladder.pictures(), "teacher": path}
    forced = [ladder.ask(role, precision, "forward", **arguments).arrays for role in ladder.sides]
    guilty, errors = [], {}
    for site in exact.names:
        if any(site not in side for side in forced):
            continue
        if precision == "fp64":
            errors[site] = verdict.relative_difference(exact[site], forced[1][site])
            wrong = not errors[site] <= LIMIT
        else:
            reference, candidate = forced
            look = verdict.look([exact[site]], [reference[site]], [candidate[site]], [])
            line = verdict.calibrated("forward", site, precision, [look])
            errors[site] = verdict.relative_rmse(exact[site], forced[1][site])
            wrong = line.verdict == "bug"
        if wrong:
            guilty.append(site)
    first = failed[0]
    if first.name in guilty:
        cause = f"fed the reference's input it still differs, by {errors[first.name]:.1e}: the fault is in this unit"
    elif guilty:
        cause = f"fed the reference's input it does not, but {guilty[0]} does: the fault is there"
    else:
        cause = "fed the reference's input no unit differs: rounding accumulates, no unit is wrong by itself"
    result.findings.append(f"first divergence in {precision}: {first.name} ({_size(first)}); {cause}")
    if len(guilty) > 1:
        result.findings.append(f"units that differ on their own: {', '.join(guilty)}")
    result.details["divergence"] = {
        "precision": precision,
        "free_running": first.name,
        "teacher_forced": guilty,
        "teacher_forced_errors": errors,
    }


def _name_first(result: RungResult) -> None:
    failed = [line for line in result.lines if line.verdict == "bug"]
    if failed:
        result.findings.append(f"{len(failed)} of {len(result.lines)} lines differ, the most {_most(failed)}")


def _most(lines: list[Line]) -> str:
    line = max(lines, key=lambda line: line.difference)
    return f"{line.name} ({_size(line)})"


def _size(line: Line) -> str:
    return line.note or f"relative difference {line.difference:.1e}, limit {line.limit:.0e}"


def _single(arrays: Arrays) -> dict[str, list[Callable[[], np.ndarray]]]:
    return {name: [lambda name=name: arrays[name]] for name in arrays.names}


def _by_batch(arrays: Arrays) -> dict[str, list[Callable[[], np.ndarray]]]:
    """Names begin with the batch's number."""
    batches = defaultdict(list)
    for name in arrays.names:
        batches[name.split("/", 1)[1]].append(lambda name=name: arrays[name])
    return dict(batches)


def _read(batches: Iterable[Callable[[], np.ndarray]]) -> list[np.ndarray]:
    return [read() for read in batches]


def _order(key: str) -> tuple:
    """Depth in the network of a parameter's key."""
    place = re.match(r"resnet/(?:block(\d)/unit(\d+)/([abc])/(proj)?|(root_block)|(group_norm)|(head))", key)
    if place is None:
        return (9,)
    if place[5]:
        return (0,)
    if place[6] or place[7]:
        return (7,) if place[6] else (8,)
    return int(place[1]), int(place[2]), place[3], place[4] is None
