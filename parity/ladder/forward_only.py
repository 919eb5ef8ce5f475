"""A comparison with an exported file: the rungs that it can climb, and the images that it takes."""

import math
from collections.abc import Collection, Sequence
from typing import Any

from input_pipeline.errors import RequestError
from parity.ladder.ladder import Ladder
from parity.sides.tasks import ANY

RUNGS = ("forward", "loss", "accuracy")  # what follows from logits
# dtype of a file's images -> precisions that can be asked of it; in which formats it multiplies is not to be seen
JUDGED_IN = {
    "float16": ("fp16",),
    "bfloat16": ("bf16",),
    "float32": ("fp32", "tf32", "bf16", "fp16"),
    "float64": ("fp64",),
}


def possible(ladder: Ladder, names: Sequence[str]) -> list[str]:
    """Returns those of the rungs that both sides can climb.

    Raises:
        RequestError: there are none.
    """
    if ladder.exported is None:
        return list(names)
    recorded = "reference" not in ladder.roles  # nobody is there who could mix batches in float64 for the loss
    kept = [name for name in names if name in RUNGS and not (recorded and name == "loss")]
    if not kept:
        raise RequestError(
            f"{ladder.sides[ladder.exported]} is an exported file, which gives logits alone: {', '.join(names)} cannot "
            f"be asked of it; it takes {', '.join(RUNGS)}, and all, which climbs these"
        )
    return kept


def notes(ladder: Ladder) -> list[str]:
    """Returns sentences on what is not compared because a side is an exported file."""
    if ladder.exported is None:
        return []
    side, precision = ladder.sides[ladder.exported], ladder.options.precision
    other = next(other for role, other in ladder.names.items() if role != ladder.exported)
    float64 = (
        f"{side} computes in the precision that it was exported in, and there is no float64 of it: whether both sides "
        f"agree in float64 is not asked, and its errors in {precision} are judged against the float64 of {other}"
    )
    return [
        *([float64] if precision != "fp64" else []),
        f"{side} gives logits alone: its units, weights, constants and formats of products cannot be looked into, and "
        "the rungs weights, pixels, gradients, optimizer and curve cannot be asked of it",
    ]


def check(ladder: Ladder, takes: dict[str, Any], rungs: Collection[str]) -> None:
    """Checks that an exported file takes the images of the rungs.

    Args:
        takes: the entry "takes" of its attestation: dtype, rows, height, width and classes; `ANY` where one is open.
        rungs: names of the rungs that will be climbed.

    Raises:
        RequestError: it does not; the message gives the flags that would fit.
    """
    assert ladder.exported is not None
    options, side = ladder.options, ladder.sides[ladder.exported]
    rows, height, width = (takes[name] for name in ("rows", "height", "width"))
    fitting = JUDGED_IN.get(takes["dtype"], ())
    if options.precision not in fitting:
        remedy = f"take --precision {' or '.join(fitting)}" if fitting else "export it with float32 images"
        asked = f"--precision {options.precision} is asked for"
        raise RequestError(f"{side} takes {takes['dtype']} images, and {asked}; {remedy}")
    classes = ladder.architecture.num_classes
    if takes["classes"] not in (ANY, classes):
        raise RequestError(
            f"{side} gives {takes['classes']:,} logits an image, and the head of {options.weights} has {classes:,} "
            "classes; give the --weights that it was exported from"
        )
    flags = []
    if set(rungs) & {"forward", "loss"}:
        given = options.height_width
        fixed = [own if own != ANY else ours for own, ours in zip((height, width), given, strict=True)]
        if tuple(fixed) != given:
            flags.append(f"--size {fixed[0]}x{fixed[1]}" if fixed[0] != fixed[1] else f"--size {fixed[0]}")
        if rows != ANY and options.rows % rows:
            flags.append(f"--rows {math.lcm(2, rows)}")
    if "accuracy" in rungs:
        sides = {own for own in (height, width) if own != ANY}
        if len(sides) > 1:
            raise RequestError(
                f"{side} takes images of {height}x{width}, and those of the accuracy rung are square; leave it out, "
                "with all --until loss, or export it for square images"
            )
        if sides and sides != {ladder.eval_size}:
            flags.append(f"--eval-size {sides.pop()}")
    if flags:
        raise RequestError(
            f"{side} takes {rows} images of {height}x{width}, and {options.rows} of {options.size} are to be compared"
            + (f" (accuracy: {ladder.eval_size})" if "accuracy" in rungs else "")
            + f"; {' '.join(flags)} fits it"
        )
