"""What is watched while a run trains: numbers of some steps, by a program of its own, and the loss of every step.

The training step's program stays as it is, to the bit: it is not asked for anything more.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bit_jax.config import NO_ADDITIONS, Additions
from bit_jax.model.layers import INTERMEDIATES, param_dtype
from bit_jax.model.resnetv2 import ResNetV2
from bit_jax.scale import hosts
from bit_jax.training.steps import TrainState, mixup_weight, prepare, scaled_loss, shares
from bit_jax.training.trained import overlaid, restricted, trained
from bit_jax.watching import numbers
from bit_jax.watching.spikes import Spikes, Window, mixing

if TYPE_CHECKING:
    from bit_jax.training.run import Run


def make_watch_step(
    model: ResNetV2,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    mixup: float,
    seed: int,
    microbatches: int = 1,
    additions: Additions = NO_ADDITIONS,
) -> Callable[[TrainState, dict], dict[str, Float[Array, ""]]]:
    """Makes a function (state, batch) -> the `numbers.of_step` of the training step with the same arguments, which
    takes the same time as that step and changes nothing. In float16 the gradient is the one before scaling."""
    dtype = param_dtype(model.dtype)

    def watch_step(state: TrainState, batch: dict) -> dict[str, Float[Array, ""]]:
        weight = mixup_weight(seed, state.step, mixup) if mixup else None
        images, targets = prepare(batch, model.num_classes, dtype, weight)
        scale = None if state.loss_scale is None else state.loss_scale.scale
        gradients, sown = gradients_and_activations(
            model, state.params, images, targets, microbatches, scale, additions
        )
        own = restricted(state.params, gradients)
        updates, _ = optimizer.update(gradients, state.opt_state, own)
        return numbers.of_step(gradients, updates, own, sown)

    return watch_step


def gradients_and_activations(
    model: ResNetV2,
    params: Any,
    images: Float[Array, "batch ..."],
    targets: Float[Array, "batch classes"],
    microbatches: int,
    scale: Float[Array, ""] | None,
    additions: Additions,
) -> tuple[Any, Any]:
    """Returns the gradient that `steps.loss_and_gradients` returns, and the largest values of activations that the
    model keeps in "intermediates", over the whole batch."""

    def loss_of(own, images, targets):
        method = "classify" if images.ndim == 2 else None
        logits, kept = model.apply({"params": overlaid(params, own)}, images, method=method, mutable=INTERMEDIATES)
        return scaled_loss(logits, targets, scale, additions), kept.get(INTERMEDIATES, {})

    own, gradient_of = trained(params, additions.train), jax.grad(loss_of, has_aux=True)

    def accumulate(before, share):
        gradients, largest = gradient_of(own, *share)
        return (jax.tree.map(jnp.add, before[0], gradients), jax.tree.map(jnp.maximum, before[1], largest)), None

    if microbatches == 1:
        gradients, largest = gradient_of(own, images, targets)
    else:
        parts = shares(images, microbatches), shares(targets, microbatches)
        like = jax.eval_shape(gradient_of, own, *(part[0] for part in parts))
        # the largest absolute values begin with zeros as well as the sums do
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        (gradients, largest), _ = jax.lax.scan(accumulate, zeros, parts)
        gradients = jax.tree.map(lambda total: total / microbatches, gradients)
    if scale is not None:
        gradients = jax.tree.map(lambda leaf: leaf / scale, gradients)
    return gradients, largest


@contextlib.contextmanager
def spikes_of(run: "Run", note: Callable[[str], object]) -> Iterator[Spikes | None]:
    """Yields what the run's losses are given to while the `with` block runs; None on all hosts but the first."""
    if not hosts.is_first():
        yield None
        return
    loader, mixup = run.loader(run.train), run.recipe.mixup
    drawn = jax.jit(mixup_weight, static_argnums=(0, 2))

    def examples(step: int) -> list[str]:
        return [run.train[index]["id"] for index in loader.examples(step - 1)]

    def mixed(step: int) -> float:
        weight = float(drawn(run.config.run.seed, np.int32(step - 1), mixup)) if mixup else 1.0
        return mixing(weight, run.architecture.num_classes)

    spikes = Spikes(run.workdir.spikes, Window(run.global_batch, mixed), examples, note)
    with contextlib.closing(spikes):
        yield spikes
