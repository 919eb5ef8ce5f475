"""SGD with momentum, built with optax: v = momentum v + gradient, p -= lr v; no Nesterov. BiT adds nothing to it;
`Additions` says what may be."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from bit_jax.config import NO_ADDITIONS, Additions
from bit_jax.training.hyperrule import Schedule
from bit_jax.training.trained import trained

CLIP_EPS = 1e-6  # added to the norm that is divided by, as in torch.nn.utils.clip_grad_norm_; optax adds nothing


class Averaged(NamedTuple):
    """A part of the optimizer's state.

    Attributes:
        ema: exponential moving average of every parameter that trains.
    """

    ema: Any


def learning_rate(schedule: Schedule) -> optax.Schedule:
    """Returns a function of the step (the number of updates before this one) that returns the learning rate.

    As in google-research/big_transfer's `get_lr`, the first update has learning rate 0, and a decay takes effect at
    the first step greater than its number. A cosine is that of `optax.warmup_cosine_decay_schedule` from 0 to 0: with
    t steps since the warm-up of N from there to the end, base_lr (1 + cos(pi t / N)) / 2.
    """

    def rate(step):
        real = jnp.result_type(float)  # float64 in 64-bit mode
        step = jnp.asarray(step)
        if schedule.restart_every is not None:
            step = step % schedule.restart_every
        warmup = schedule.base_lr * step.astype(real) / max(schedule.warmup_steps, 1)
        if schedule.kind == "cosine":
            span = max(schedule.steps - schedule.warmup_steps, 1)
            share = jnp.clip((step.astype(real) - schedule.warmup_steps) / span, 0, 1)
            decayed = schedule.base_lr * (1 + jnp.cos(jnp.pi * share)) / 2
        else:
            decays = (step > jnp.asarray(schedule.decay_steps, step.dtype)).sum(dtype=step.dtype)
            decayed = schedule.base_lr / 10.0 ** decays.astype(real)
        return jnp.where(step < schedule.warmup_steps, warmup, decayed)

    return rate


def sgd(
    schedule: Schedule, momentum: float, additions: Additions = NO_ADDITIONS
) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.sgd` with additions, and with an extra argument for its update: if `finite`, a [] bool, is False,
    the update is 0, and neither the momentum nor the average changes.

    It is initialized with all parameters, has a state for those that train, and is given these and their gradients. In
    order: the gradient is clipped, decayed if that is coupled, and added to the momentum; decoupled decay joins the
    momentum's step, and the learning rate multiplies both.

    The selection is made on the momentum: selecting old or new parameters afterwards makes XLA's CPU compiler copy both
    and compute each gradient twice, which takes 5 % of a training step of R50x1.
    """
    trace, scale = optax.trace(momentum), optax.scale_by_learning_rate(learning_rate(schedule))
    decays = {additions.weight_decay_kind: additions.weight_decay}

    def selected(finite, tree, other):
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), tree, other)

    def init(params):
        own = trained(params, additions.train)
        # copies, because a step that uses up its state cannot use up one array twice
        averaged = () if additions.ema is None else (Averaged(jax.tree.map(jnp.array, own)),)
        return trace.init(own), scale.init(own), *averaged

    def update(updates, state, params: Any = None, *, finite=True, **_):
        held, count, *averages = state
        if additions.clip_norm is not None:
            updates = clipped(updates, additions.clip_norm)
        updates = decayed(updates, params, decays.get("coupled", 0.0))
        kept = selected(finite, trace.update(updates, held)[1], held)
        stepped = decayed(kept.trace, params, decays.get("decoupled", 0.0))
        updates, count = scale.update(stepped, count)
        updates = selected(finite, updates, jax.tree.map(jnp.zeros_like, updates))
        if additions.ema is not None:
            averages = [averaged(averages[0], optax.apply_updates(params, updates), additions.ema, finite)]
        return updates, (kept, count, *averages)

    return optax.GradientTransformationExtraArgs(init, update)


def clipped(gradients: Any, largest: float) -> Any:
    """Returns the gradients, scaled so that the norm of all together is at most `largest`."""
    norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradients)))
    scale = jnp.minimum(largest / (norm + CLIP_EPS), 1)
    return jax.tree.map(lambda leaf: leaf * scale.astype(leaf.dtype), gradients)


def decayed(updates: Any, params: Any, weight_decay: float) -> Any:
    """Returns the updates with `weight_decay` times the parameter added to those of kernels."""
    if not weight_decay:
        return updates

    def of_leaf(path: tuple, update: Array, param: Array) -> Array:
        return update + weight_decay * param if path[-1].key == "kernel" else update

    return jax.tree_util.tree_map_with_path(of_leaf, updates, params)


def averaged(before: Averaged, params: Any, decay: float, finite: Bool[Array, ""] | bool) -> Averaged:
    """Returns the average after one more step, decay times the average plus (1 - decay) times the parameters: it begins
    with the initial parameters and is not corrected for that. It stays the same if `finite` is False."""
    share = jnp.where(finite, 1 - decay, 0.0)
    return Averaged(
        jax.tree.map(lambda mean, param: mean + share.astype(mean.dtype) * (param - mean), before.ema, params)
    )
