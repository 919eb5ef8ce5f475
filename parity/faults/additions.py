"""Faults in what may be added to BiT's recipe; each is found with all of `ADDED`, which has every addition."""

import contextlib
from typing import Any
from unittest import mock

from parity.faults.registry import fault

# strong enough that each of them shows in a step of the self-test: the gradient there is longer than the norm
ADDED: dict[str, Any] = {
    "weight_decay": 0.05,
    "weight_decay_kind": "decoupled",
    "clip_norm": 0.5,
    "label_smoothing": 0.1,
    "schedule": "cosine",
    "ema": 0.9,
    "crop_style": "inception",
    "train": "block4|head",
}


def _with(**settings: Any) -> Any:
    """Replaces additions of the optimizer by others."""
    import dataclasses

    from bit_jax.training import optimizer

    sgd = optimizer.sgd

    def other(schedule, momentum, additions):
        return sgd(schedule, momentum, dataclasses.replace(additions, **settings))

    return mock.patch("bit_jax.training.optimizer.sgd", other)


@fault("weight decay before the momentum, though decoupled", "optimizer", "momentum/", additions=ADDED)
def coupled_decay() -> Any:
    return _with(weight_decay_kind="coupled")


@fault("biases and GroupNorm decay, too", "optimizer", "params/", additions=ADDED)
def decay_of_all() -> Any:
    import jax

    def decayed(updates, params, weight_decay):
        return jax.tree.map(lambda update, param: update + weight_decay * param, updates, params)

    return mock.patch("bit_jax.training.optimizer.decayed", decayed)


@fault("clipping by each array's norm, not by that of all", "optimizer", "params/", additions=ADDED)
def clip_by_array() -> Any:
    import jax

    from bit_jax.training import optimizer

    clipped = optimizer.clipped
    return mock.patch(
        "bit_jax.training.optimizer.clipped", lambda grads, most: jax.tree.map(lambda leaf: clipped(leaf, most), grads)
    )


@fault("labels smoothed over the other classes only", "loss", "loss of each row", additions=ADDED)
def smoothing() -> Any:
    from bit_jax.training import steps

    cross_entropy = steps.cross_entropy

    def over_others(logits, targets, smoothing=0.0):
        others = (1 - targets) * smoothing / (targets.shape[1] - 1)
        return cross_entropy(logits, (1 - smoothing) * targets + others)

    return mock.patch("bit_jax.training.steps.cross_entropy", over_others)


@fault("cosine counted from step 0, not from the warm-up's end", "curve", "losses", additions=ADDED)
def cosine_start() -> Any:
    import jax.numpy as jnp

    from bit_jax.training import optimizer

    learning_rate = optimizer.learning_rate

    def from_zero(schedule):
        right = learning_rate(schedule)

        def rate(step):
            cosine = schedule.base_lr * (1 + jnp.cos(jnp.pi * step / schedule.steps)) / 2
            return jnp.where(step < schedule.warmup_steps, right(step), cosine)

        return rate

    return mock.patch("bit_jax.training.optimizer.learning_rate", from_zero)


@fault("average with the two shares swapped", "optimizer", "ema/", additions=ADDED)
def ema_shares() -> Any:
    from bit_jax.training import optimizer

    averaged = optimizer.averaged
    return mock.patch(
        "bit_jax.training.optimizer.averaged",
        lambda before, params, decay, finite: averaged(before, params, 1 - decay, finite),
    )


@fault("average corrected for its beginning, as Adam's moments", "optimizer", "ema/", additions=ADDED)
def ema_correction() -> Any:
    import jax

    from bit_jax.training import optimizer

    averaged = optimizer.averaged

    def corrected(before, params, decay, finite):
        return jax.tree.map(lambda mean: mean / (1 - decay), averaged(before, params, decay, finite))

    return mock.patch("bit_jax.training.optimizer.averaged", corrected)


@fault("GroupNorm of frozen blocks trains", "gradients", "resnet/block1", additions=ADDED)
def norms_train() -> Any:
    from bit_jax.training import trained

    trains = trained.trains
    return mock.patch(
        "bit_jax.training.trained.trains", lambda path, pattern: trains(path, pattern) or "group_norm" in path
    )


@fault("frozen kernels decay", "optimizer", "params/resnet/root_block", additions=ADDED)
def frozen_decay() -> Any:
    import jax

    from bit_jax.training import steps

    update = steps.update

    def decaying(state, gradients, *rest):
        new = update(state, gradients, *rest)
        flat = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(gradients)}

        def of_leaf(path, leaf):
            frozen = jax.tree_util.keystr(path) not in flat and path[-1].key == "kernel"
            return leaf * (1 - 1e-6) if frozen else leaf

        return new.replace(params=jax.tree_util.tree_map_with_path(of_leaf, new.params))

    return mock.patch("bit_jax.training.steps.update", decaying)


@fault("Inception's box with rows and columns swapped", "pixels", "train, epoch", additions=ADDED)
def swapped_box() -> contextlib.AbstractContextManager[Any]:
    from input_pipeline.preprocess import Views

    of_box = Views.of_box

    def swapped(self, pixels, box, into=None):
        top = min(box.left, pixels.shape[0] - box.height)
        left = min(box.top, pixels.shape[1] - box.width)
        return of_box(self, pixels, box._replace(top=top, left=left), into)

    return mock.patch.object(Views, "of_box", swapped)
