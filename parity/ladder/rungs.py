"""The ladder's rungs: what each asks of both sides, and what it says of a difference.

A rung is a function of the ladder that returns the rung's result. `question.Question` judges the answers.
"""

import re
from collections.abc import Callable

import numpy as np

from bit_jax.training.hyperrule import resolution
from input_pipeline.preprocess import Views
from parity.ladder import verdict
from parity.ladder.accuracy import accuracy
from parity.ladder.attestation import PRODUCTS
from parity.ladder.ladder import ROLES, Ladder, RungResult
from parity.ladder.question import (
    LOSS_SCALE,
    NOT_COMPARED,
    Question,
    absent_lines,
    by_batch,
    float64_lines,
    one_batch,
)
from parity.ladder.verdict import LIMIT, Line
from parity.sides import inputs
from parity.sides.worker import Arrays

EPOCHS = 2  # epochs in the pixels rung: augmentation differs between them
SCHEDULE_STEP = 2  # step of the optimizer rung: inside the warm-up, where the rate changes every step
NARROW = 64.0  # ulps: two correct sides are seen below 10; products one format narrower are above 500
OPERANDS = ("matrix products", "convolution products")  # names of the lines of `_name_products`


def weights(ladder: Ladder) -> RungResult:
    """Compares every array of the weight file as both loaders read it."""
    reference, candidate = ladder.both("fp64", "weights")
    lines = [
        verdict.exact("weights", key, "fp64", reference[key], candidate[key])
        for key in reference.names
        if key in candidate
    ]
    return RungResult("weights", lines + absent_lines("weights", "fp64", reference, candidate))


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
    lines = float64_lines("pixels", one_batch(reference), one_batch(candidate), fail_fast=options.fail_fast)
    return RungResult("pixels", lines + absent_lines("pixels", "fp64", reference, candidate))


def forward(ladder: Ladder) -> RungResult:
    """Compares every unit's output; if one differs, compares again with the reference's input given to each unit."""
    result = Question(ladder, "forward", "forward", lambda look: {"images": ladder.pictures(look)}).judge()
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


def _name_products(ladder: Ladder, result: RungResult) -> None:
    """Puts first in the result a bug for each kind of product that a side does not multiply in float16.

    Float16 errs only 8 times less than bfloat16, which is within `NARROW` and hardly more than two sides' errors may
    differ by, so errors alone would not tell the two formats apart.
    """
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
    mixed = Question(ladder, "loss", "mix", lambda look: {"batches": ladder.pictures(look)}, disturb=False).judge()
    if mixed.verdict == "bug":
        return mixed
    losses = Question(ladder, "loss", "loss", lambda look: {"mixed": ladder.mixed_pictures(look)}).judge()
    return RungResult("loss", mixed.lines + losses.lines)


def gradients(ladder: Ladder) -> RungResult:
    """Compares the gradient of every parameter, under the checkpoint's key."""
    batches = ladder.options.batches
    result = Question(
        ladder,
        "gradients",
        "gradients",
        lambda look: {"mixed": ladder.mixed_pictures(look), "count": batches},
        by_batch,
        differentiates=True,
    ).judge()
    failed = [line for line in result.lines if line.verdict == "bug" and line.name != LOSS_SCALE]
    if failed:
        last = max(failed, key=lambda line: depth(line.name))
        result.findings.append(
            f"the first gradient to differ on the way back from the loss is {last.name} "
            f"({_size(last)}); {len(failed)} of {len(result.lines)} lines differ"
        )
    return result


def optimizer(ladder: Ladder) -> RungResult:
    """Compares parameters and momentum after one step, inside the warm-up, with the reference's gradients."""
    options = ladder.options
    gradients = ladder.ask("reference", "fp64", "gradients", mixed=ladder.mixed_pictures(), count=options.batches)
    arguments = {
        "gradients": gradients.arrays.path,
        "schedule": options.schedule | {"warmup_steps": max(options.warmup_steps, SCHEDULE_STEP + 1)},
        "momentum": options.momentum,
        "step": SCHEDULE_STEP,
    }
    result = Question(ladder, "optimizer", "optimizer", lambda look: arguments, disturb=False).judge()
    count_differing(result)
    return result


def curve(ladder: Ladder) -> RungResult:
    """Compares the losses of some steps on identical batches after mixup, and the parameters after them."""
    options = ladder.options
    training = {"count": options.steps, "schedule": options.schedule, "momentum": options.momentum}
    result = Question(
        ladder,
        "curve",
        "curve",
        lambda look: {"mixed": ladder.mixed_batches(look)} | training,
        chaotic=True,
        differentiates=True,
    ).judge()
    reference, candidate = result.details["losses"]["fp64"]
    apart = np.abs(np.subtract(reference, candidate)) > LIMIT * np.abs(reference)
    if result.verdict == "bug" and apart.any():
        step = int(np.argmax(apart))
        result.findings.append(
            f"the losses part at step {step} of {options.steps}: {reference[step]:.12g}, {candidate[step]:.12g}"
        )
    count_differing(result)
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


def _diverge(ladder: Ladder, result: RungResult, failed: list[Line]) -> None:
    """Adds to the result where the two sides first differ, and whether that unit is wrong by itself.

    Each unit is computed again from the float64 reference's input. A unit that only passed on the difference of its
    input then agrees.
    """
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


def count_differing(result: RungResult) -> None:
    """Adds to the result how many lines differ, and which of them most."""
    failed = [line for line in result.lines if line.verdict == "bug"]
    if failed:
        most = max(failed, key=lambda line: line.difference)
        result.findings.append(
            f"{len(failed)} of {len(result.lines)} lines differ, the most {most.name} ({_size(most)})"
        )


def _size(line: Line) -> str:
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
