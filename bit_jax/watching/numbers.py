"""The numbers that show whether training is in order: norms of gradient and update, activations, dead ReLUs.

All are of one step's batch, over all devices, before the step changes the parameters.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from bit_jax.model.layers import OUTPUT, RELU

GRADIENT, UPDATE = "watch/grad_norm", "watch/update_ratio"
LARGEST, DEAD = "watch/largest_activation", "watch/dead_relus"
WHOLE = (GRADIENT, UPDATE, LARGEST, DEAD)  # of the whole model; the terminal shows these


def of_step(gradients: Any, updates: Any, params: Any, sown: Any) -> dict[str, Float[Array, ""]]:
    """Returns the numbers by name. Each of the names in `WHOLE` is of the whole model; followed by "/" and a part of
    the model, it is of that part: a top-level key of the parameters for the first two, a unit for the others.

    - `GRADIENT`: the Euclidean norm of the gradient.
    - `UPDATE`: the norm of what the step adds to the parameters, divided by the norm of these before it.
    - `LARGEST`: the largest absolute value of the outputs of units and ReLUs.
    - `DEAD`: the share of the ReLUs' channels that are 0 in every place of every image.

    Args:
        gradients, updates, params: of the parameters that train, with the same keys.
        sown: "intermediates" of the model, the largest values of each channel; empty for a head alone.
    """
    squares = [{part: _squares(inner) for part, inner in tree.items()} for tree in (gradients, updates, params)]
    parts = {part: tuple(tree[part] for tree in squares) for part in params}
    numbers = {}
    for name, (gradient, update, weight) in {"": tuple(map(sum, zip(*parts.values(), strict=True))), **parts}.items():
        numbers[_of(GRADIENT, name)] = jnp.sqrt(gradient)
        numbers[_of(UPDATE, name)] = jnp.sqrt(update) / jnp.sqrt(weight)
    return numbers | _of_activations(sown)


def _of_activations(sown: Any) -> dict[str, Float[Array, ""]]:
    by_unit: dict[str, dict[str, list[Array]]] = {}
    flat: Any = traverse_util.flatten_dict(sown)
    for path, (largest,) in flat.items():
        by_unit.setdefault(_unit(path), {RELU: [], OUTPUT: []})[path[-1]].append(largest)
    if not by_unit:
        return {}
    every = {kind: [array for unit in by_unit.values() for array in unit[kind]] for kind in (RELU, OUTPUT)}
    numbers = {}
    for name, unit in {"": every, **dict(sorted(by_unit.items()))}.items():
        numbers[_of(LARGEST, name)] = jnp.stack([array.max() for array in unit[RELU] + unit[OUTPUT]]).max()
        if unit[RELU]:
            channels = jnp.concatenate(unit[RELU])
            numbers[_of(DEAD, name)] = (channels == 0).mean(dtype=channels.dtype)
    return numbers


def _unit(path: tuple[str, ...]) -> str:
    """Returns block1/unit01 for what is inside of that unit, and else the top-level module's name."""
    return "/".join(path[:2]) if path[0].startswith("block") else path[0]


def _of(name: str, part: str) -> str:
    return f"{name}/{part}" if part else name


def _squares(tree: Any) -> Float[Array, ""]:
    first, *others = (jnp.square(leaf).sum() for leaf in jax.tree.leaves(tree))
    return sum(others, start=first)


def finite(numbers: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers that are finite, as Python's: a ratio to weights that are all zero is none, as a new head's
    at first, and neither is the norm of a gradient that overflowed, as in float16."""
    return {name: float(number) for name, number in numbers.items() if math.isfinite(number)}
