"""The ladder's rungs: what each asks of both sides, and what it says of a difference.

A rung is a function of the ladder that returns the rung's result. `question.Question` judges the answers.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from bit_jax.training.hyperrule import resolution
from input_pipeline.preprocess import Views
from parity.ladder import verdict
from parity.ladder.accuracy import accuracy
from parity.ladder.attestation import PRODUCTS
from parity.ladder.divergence import depth, diverge, name_operation, sites_behind, size
from parity.ladder.ladder import ROLES, Ladder, RungResult
from parity.ladder.question import LOSS_SCALE, NOT_COMPARED, Question, absent_lines
from parity.ladder.reference import by_batch
from parity.ladder.verdict import LIMIT, Line
from parity.sides import inputs
from parity.sides.tasks import UNKNOWN

Rung = Literal["weights", "pixels", "forward", "loss", "gradients", "optimizer", "curve", "accuracy"]
EPOCHS = 2  # epochs in the pixels rung: augmentation differs between them
SCHEDULE_STEP = 2  # step of the optimizer rung: inside the warm-up, where the rate changes every step
NARROW = 64.0  # ulps: two correct sides are seen below 10; products one format narrower are above 500
OPERANDS = ("matrix products", "convolution products")  # names of the lines of `_name_products`


def weights(ladder: Ladder) -> RungResult:
    """Compares every array of the weight file as both loaders read it."""
    question = of_weights(ladder)
    candidate, lines, missing = question.candidate("fp64").arrays, [], []
    for key, (array,) in ladder.reference.oracle(question, 0):
        if key in candidate:
            lines.append(verdict.exact("weights", key, "fp64", array, candidate[key]))
        else:
            missing.append(key)
    known = {line.name for line in lines}
    unexpected = [key for key in candidate.names if key not in known]
    return RungResult("weights", lines + absent_lines("weights", "fp64", missing=missing, unexpected=unexpected))


def pixels(ladder: Ladder) -> RungResult:
    """Compares what both input pipelines make of the same image files, in evaluation and in training."""
    return of_pixels(ladder).judge()


def forward(ladder: Ladder) -> RungResult:
    """Compares every unit's output; if one differs, compares again with the reference's input given to each unit."""
    result = of_forward(ladder).judge()
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
    if unseen and ladder.exported is not None:
        result.findings.append(f"not compared, as an exported file shows no units: {', '.join(unseen)}")
    elif unseen:
        result.findings.append(f"not compared, as a side has no module of its own for them: {', '.join(unseen)}")
    failed = [line for line in result.lines if line.verdict == "bug" and line.name not in ("all units", *OPERANDS)]
    if failed and ladder.exported is not None:
        result.findings.append(f"{failed[0].name}: {size(failed[0])}; {_of_a_file(ladder, failed[0])}")
    elif failed:
        diverge(ladder, result, failed)
    return result


def _of_a_file(ladder: Ladder, line: Line) -> str:
    """Returns what can be said of logits that fail if one side is an exported file."""
    other = next(role for role in ROLES if role != ladder.exported)
    if line.note.startswith(f"the {other}'s"):
        precision = ladder.options.precision
        return f"the file errs less than {precision} does: ask for the precision that it was exported in"
    return "where it begins, an exported file does not show"


def _name_products(ladder: Ladder, result: RungResult) -> None:
    """Puts first in the result a bug for each kind of product that a side does not multiply in float16.

    Float16 errs only 8 times less than bfloat16, which is within `NARROW` and hardly more than two sides' errors may
    differ by, so errors alone would not tell the two formats apart.
    """
    precision = ladder.options.precision
    multiplies = {
        "reference": ladder.reference.products(),
        "candidate": ladder.ask("candidate", precision, "products").info,
    }
    wrong = [
        (kind, f"{precision} was asked for, but the {role} multiplies in {used}")
        for role, both in multiplies.items()
        for kind, used in zip(OPERANDS, both, strict=True)
        if used not in (PRODUCTS[precision], UNKNOWN)
    ]
    lines = [Line("forward", kind, precision, "bug", np.inf, 0.0, note=note) for kind, note in wrong]
    result.lines[:0] = lines
    result.findings += [f"{kind}: {note}" for kind, note in wrong]


def loss(ladder: Ladder) -> RungResult:
    """Compares normalization and mixup, which each side does itself, then the loss of the reference's mixed batch."""
    if ladder.exported is not None:  # a file neither normalizes nor mixes
        return of_losses(ladder).judge()
    mixed = of_mixup(ladder).judge()
    if mixed.verdict == "bug":
        return mixed
    return RungResult("loss", mixed.lines + of_losses(ladder).judge().lines)


def gradients(ladder: Ladder) -> RungResult:
    """Compares the gradient of every parameter, under the checkpoint's key."""
    result = of_gradients(ladder).judge()
    failed = [line for line in result.lines if line.verdict == "bug" and line.name != LOSS_SCALE]
    if failed:
        last = max(failed, key=lambda line: depth(line.name))
        result.findings.append(
            f"the first gradient to differ on the way back from the loss is {last.name} "
            f"({size(last)}); {len(failed)} of {len(result.lines)} lines differ"
        )
        # the gradients of what lies behind it are right, up to the first parameter there
        name_operation(ladder, result, sites_behind(last.name, ladder.architecture), last.precision)
    return result


def optimizer(ladder: Ladder) -> RungResult:
    """Compares parameters and momentum after one step, inside the warm-up, with the reference's gradients."""
    result = of_update(ladder).judge()
    count_differing(result)
    return result


def curve(ladder: Ladder) -> RungResult:
    """Compares the losses of some steps on identical batches after mixup, and the parameters after them."""
    result = of_curve(ladder).judge()
    reference, candidate = result.details["losses"]["fp64"]
    apart = np.abs(np.subtract(reference, candidate)) > LIMIT * np.abs(reference)
    if result.verdict == "bug" and apart.any():
        step = int(np.argmax(apart))
        result.findings.append(
            f"the losses part at step {step} of {ladder.options.steps}: {reference[step]:.12g}, {candidate[step]:.12g}"
        )
    count_differing(result)
    return result


def of_weights(ladder: Ladder) -> Question:
    """Asks for the arrays of the weight file."""
    return Question(ladder, "weights", "weights", lambda look: {}, judged=False)


def of_pixels(ladder: Ladder) -> Question:
    """Asks for image files as evaluation and training show them, with the same draws of crop and flip."""
    options, files = ladder.options, ladder.image_files()
    crop = max(options.height_width)
    full_resize, full_crop = resolution(crop * crop)
    resize = max(crop, round(crop * full_resize / full_crop))
    style = options.additions.crop_style
    views = Views(resize, crop, flip=True, crop_style=style)
    draws = inputs.draws(views, inputs.Files(files), EPOCHS, options.seed)
    shared = {"files": [str(path) for path in files], "resize": resize, "crop": crop, "seed": options.seed}
    arguments = shared | {"epochs": EPOCHS, "draws": draws} | ({} if style == "bit" else {"crop_style": style})
    return Question(ladder, "pixels", "pixels", lambda look: arguments, judged=False)


def of_forward(ladder: Ladder) -> Question:
    """Asks for every unit's output."""
    return Question(ladder, "forward", "forward", lambda look: {"images": ladder.pictures(look)})


def of_mixup(ladder: Ladder) -> Question:
    """Asks for the picture batches after normalization and mixup."""
    return Question(ladder, "loss", "mix", lambda look: {"batches": ladder.pictures(look)}, disturb=False)


def of_losses(ladder: Ladder) -> Question:
    """Asks for the loss of each row of a batch, and for their mean."""
    added = ladder.options.added
    return Question(ladder, "loss", "loss", lambda look: {"mixed": ladder.mixed_pictures(look)} | added)


def of_gradients(ladder: Ladder) -> Question:
    """Asks for the gradient of every parameter on each batch."""
    count = ladder.options.batches

    def arguments(look: int) -> dict[str, Any]:
        return {"mixed": ladder.mixed_pictures(look), "count": count} | ladder.options.added

    return Question(ladder, "gradients", "gradients", arguments, by_batch, differentiates=True)


def of_update(ladder: Ladder) -> Question:
    """Asks for parameters and momentum after one step, inside the warm-up."""
    options = ladder.options
    schedule = options.schedule | {"warmup_steps": max(options.warmup_steps, SCHEDULE_STEP + 1)}
    shared = {"schedule": schedule, "momentum": options.momentum, "step": SCHEDULE_STEP} | options.added

    def arguments(look: int) -> dict[str, Any]:
        return {"gradients": ladder.gradients()} | shared

    return Question(ladder, "optimizer", "optimizer", arguments, disturb=False)


def of_curve(ladder: Ladder) -> Question:
    """Asks for the losses of some steps of training, and for the parameters after them."""
    options = ladder.options
    training = {"count": options.steps, "schedule": options.schedule, "momentum": options.momentum} | options.added

    def arguments(look: int) -> dict[str, Any]:
        return {"mixed": ladder.mixed_batches(look)} | training

    return Question(ladder, "curve", "curve", arguments, chaotic=True, differentiates=True)


QUESTIONS: dict[str, tuple[Callable[[Ladder], Question], ...]] = {
    "weights": (of_weights,),
    "pixels": (of_pixels,),
    "forward": (of_forward,),
    "loss": (of_mixup, of_losses),
    "gradients": (of_gradients,),
    "optimizer": (of_update,),
    "curve": (of_curve,),
}  # {rung: what it asks}; accuracy counts, and asks nothing that a `Question` judges
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


def count_differing(result: RungResult) -> None:
    """Adds to the result how many lines differ, and which of them most."""
    failed = [line for line in result.lines if line.verdict == "bug"]
    if failed:
        most = max(failed, key=lambda line: line.difference)
        result.findings.append(
            f"{len(failed)} of {len(result.lines)} lines differ, the most {most.name} ({size(most)})"
        )
