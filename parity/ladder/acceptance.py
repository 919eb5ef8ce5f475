"""Accepted differences: a constant of another's model is put into this project's side, and the rest is judged.

timm and Hugging Face add 1e-8 to a kernel's variance where BiT adds 1e-10. Whoever knows that wants to know whether
anything else differs. The constant is put in before the side's processes start, so that every rung, task and precision
computes with it and every limit stays as strict as ever.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from bit_jax.model import layers
from input_pipeline.errors import RequestError
from parity.ladder.ladder import ROLES, Ladder
from parity.sides.side import ACCEPTABLE

# what this project's model computes with, unless a side or the weight file says otherwise
BIT = {"standardization eps": layers.STANDARDIZE_EPS, "group norm eps": layers.NORM_EPS}


def accept(ladder: Ladder, attested: Callable[[str], dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Puts the other side's value of every entry of --accept into the side of the ladder that is this project's own.

    If both sides are its own, that is the reference.

    Args:
        ladder: comparison, no process of which runs.
        attested: function (role) -> the entries that this side attests.

    Returns:
        Clauses on the differences that were accepted, and sentences on entries that do not differ.

    Raises:
        RequestError: no side is this project's own, or the other side's value is not one number.
    """
    entries = tuple(dict.fromkeys(ladder.options.accept))
    if not entries:
        return [], []
    role = next((role for role, side in ladder.sides.items() if side.ours), None)
    if role is None:
        both = " and ".join(ladder.names.values())
        raise RequestError(
            f"--accept puts a constant into this project's own side, and {both} are not; give jax or torch"
        )
    side = ladder.sides[role]
    other = next(other for other in ROLES if other != role)
    if ladder.exported == other:
        raise RequestError(f"--accept {entries[0]!r}: no constant can be read from the file of {ladder.names[other]}")
    theirs, accepted, same = attested(other), [], []
    ours = BIT | {"standardization eps": ladder.architecture.standardize_eps}
    for entry in entries:
        value = theirs[entry]
        if not isinstance(value, float):
            raise RequestError(
                f"--accept {entry!r}: {ladder.names[other]} has {value} there, and one number is needed to compute with"
            )
        if value == ours[entry]:
            same.append(f"{entry} was to be accepted, but does not differ: it is {value:g} on both sides")
            continue
        side = dataclasses.replace(side, **{ACCEPTABLE[entry]: value})
        accepted.append(f"{entry} {value:g} instead of {_whose(entry, ours)} {ours[entry]:g}, put into {side}")
    ladder.sides[role] = side
    return accepted, same


def _whose(entry: str, ours: dict[str, float]) -> str:
    return "BiT's" if ours[entry] == BIT[entry] else "the weight file's"
