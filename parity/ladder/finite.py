"""Where does a step stop being finite? For the step at which a run ended with a loss of NaN or infinity."""

import dataclasses
from typing import Any

import numpy as np

from input_pipeline.errors import RequestError
from parity.ladder.ladder import ROLES, Ladder, RungResult
from parity.ladder.rungs import depth
from parity.ladder.verdict import Line
from parity.sides.recorded import State
from parity.sides.worker import Arrays

RUNG = "finite"


def require(state: State, name: str) -> None:
    """Refuses a state from which no step can be finite.

    Raises:
        RequestError: the state holds NaN or infinity; the message names the arrays.
    """
    if broken := state.not_finite:
        raise RequestError(
            f"{name} holds NaN or infinity in {len(broken)} of its {len(state.named)} arrays, the first {broken[0]}; "
            "an earlier step went wrong, so give an earlier --step, or --first"
        )


def finite(ladder: Ladder, update: dict[str, Any]) -> RungResult:
    """Compares which of both sides' losses, gradients and updates are finite, in float64 and in the precision asked
    for. If some are not, says where that begins, and leaves the rungs after it to float64 alone.

    Args:
        update: arguments of the task `optimizer` for the step's update.
    """
    result, precision = RungResult(RUNG, []), ladder.options.precision
    for judged in dict.fromkeys(("fp64", precision)):
        places = {role: _first(ladder, role, judged, update) for role in ROLES}
        same = len({place is None for place in places.values()}) == 1
        note = "; ".join(
            f"{ladder.sides[role]} is {'finite' if place is None else f'not finite from {place} on'}"
            for role, place in places.items()
        )
        verdict = "equal" if same else "bug"
        name = "loss, gradients and update"
        result.lines.append(Line(RUNG, name, judged, verdict, 0.0 if same else np.inf, 0.0, note=note))
        if any(place is not None for place in places.values()):
            result.findings.append(f"in {judged}, {note}")
            result.details.setdefault("not finite", []).append(judged)
    broken = result.details.get("not finite", [])
    if broken == [precision] != ["fp64"]:
        result.findings.append(
            f"float64 is finite: the numbers of this step leave the range of {precision}, and the rungs after this one "
            "are judged in float64 alone"
        )
        ladder.options = dataclasses.replace(ladder.options, precision="fp64")
    elif "fp64" in broken:
        result.findings.append("float64 is not finite either, so the run had diverged before this step")
    return result


def ends(result: RungResult) -> bool:
    """Whether nothing can be compared after this rung, because float64 is not finite."""
    return result.name == RUNG and "fp64" in result.details.get("not finite", [])


def _first(ladder: Ladder, role: str, precision: str, update: dict[str, Any]) -> str | None:
    """Returns the first that is not finite of a side's units, its loss, its gradients on the way back, and its update;
    None if all are."""
    mixed, added = ladder.mixed_pictures(), ladder.options.added
    losses = ladder.ask(role, precision, "loss", mixed=mixed, **added).arrays
    if not _all_finite(losses, losses.names):
        units = ladder.ask(role, precision, "forward", images=mixed).arrays
        return next((site for site in units.names if not _all_finite(units, [site])), "the loss")
    if precision != "fp16":  # its gradients are those of a scaled loss, and training lowers the scale until they are
        gradients = ladder.ask(role, precision, "gradients", mixed=mixed, count=1, **added).arrays
        names = sorted(gradients.names, key=lambda name: depth(name.removeprefix("0/")), reverse=True)
        broken = next((name for name in names if not _all_finite(gradients, [name])), None)
        if broken is not None:
            return f"the gradient of {broken.removeprefix('0/')}"
    updated = ladder.ask(role, precision, "optimizer", **update).arrays
    broken = next((name for name in updated.names if not _all_finite(updated, [name])), None)
    return None if broken is None else f"the update of {broken}"


def _all_finite(arrays: Arrays, names: list[str]) -> bool:
    return all(np.isfinite(arrays[name]).all() for name in names)
