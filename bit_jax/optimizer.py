"""SGD with momentum, by optax: v = momentum v + gradient, p -= lr v; no weight decay, no Nesterov."""

import jax.numpy as jnp
import optax

from bit_jax.hyperrule import Schedule


def learning_rate(schedule: Schedule) -> optax.Schedule:
    """Step (the number of updates before this one) -> learning rate.

    As in google-research/big_transfer's `get_lr`: the first update has learning rate 0, and a decay takes effect
    at the first step greater than its number.
    """

    def rate(step):
        real = jnp.result_type(float)  # float64 in 64-bit mode
        step = jnp.asarray(step)
        warmup = schedule.base_lr * step.astype(real) / max(schedule.warmup_steps, 1)
        decays = (step > jnp.asarray(schedule.decay_steps, step.dtype)).sum(dtype=step.dtype)
        decayed = schedule.base_lr / 10.0 ** decays.astype(real)
        return jnp.where(step < schedule.warmup_steps, warmup, decayed)

    return rate


def sgd(schedule: Schedule, momentum: float) -> optax.GradientTransformation:
    return optax.sgd(learning_rate(schedule), momentum=momentum)
