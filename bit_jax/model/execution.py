"""How the architecture is executed: in which numbers, what the backward pass keeps, and in which order it goes.

None of it changes what is computed, but for rounding and for the two constants of `Numerics`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from bit_jax.model import ops
from bit_jax.model.architecture import Remat

# the names that values are given where they are made, for `remat` to choose by
CONVOLVED = "convolved"  # kept by "norm", with `ops.STATISTICS`
GATHERED = "gathered"  # never kept


class Numerics(NamedTuple):
    """How layers compute.

    Attributes:
        dtype: what convolutions and the activations between them are computed in.
        precision: how exactly products are computed.
        gather: (kernel in `dtype`, split over devices) -> the same, whole on each, used and dropped again: the backward
            pass gathers it a second time. None where parameters are not split.
        recompute: the backward pass computes activations again from convolutions' outputs.
        paced: the backward pass goes on to the next unit only with this one's kernel gradients; see `in_step`.
        products: 1x1 convolutions, and those of fewer places than channels, are written as matrix products.
        standardized: kernels are given standardized already.
        norm_eps, standardize_eps: what is added to the variances of GroupNorm and of kernels; None: what BiT adds.
            These two change what is computed: a model that was trained with another value needs that value.
    """

    dtype: jnp.dtype
    precision: lax.Precision
    gather: Callable[[Array], Array] | None
    recompute: bool
    paced: bool
    products: bool
    standardized: bool
    norm_eps: float | None = None
    standardize_eps: float | None = None

    def whole(self, kernel: Array) -> Array:
        return kernel if self.gather is None else checkpoint_name(self.gather(kernel), GATHERED)


def in_step(unit: nn.Module, x: Array, later: Array) -> tuple[Array, Array]:
    """(unit(x), later), where `later` is 0 and only carries an order through the backward pass: the gradient of x waits
    for the kernel gradients of the unit after this one.

    Free to choose, XLA's latency-hiding scheduler puts off all kernel gradients, and with them what they are computed
    from, to the end of the step: 25 GiB instead of 14 for R152x2 on eight GPUs. One unit's delay leaves each reduction
    a unit's time to finish behind computation. XLA keeps the dependency because 0 * x is not 0 for every x.
    """

    def forward(unit, x, later):
        y, gradient = nn.vjp(lambda unit, x: unit(x), unit, x)
        return (y, later), gradient

    def backward(gradient, cotangents):
        of_y, after = cotangents
        of_params, of_x = gradient(of_y)
        own = sum(
            (0 * leaf[0, 0, 0, 0] for leaf in jax.tree.leaves(of_params) if leaf.ndim == 4),
            start=jnp.zeros((), after.dtype),
        )
        return of_params, of_x + after.astype(of_x.dtype), own

    return nn.custom_vjp(lambda unit, x, later: (unit(x), later), forward, backward)(unit, x, later)


def rematerialized(unit: Any, remat: Remat, *, sharded: bool) -> Any:
    """The unit's class, keeping for the backward pass what `remat` says; its input is kept always."""
    policies = jax.checkpoint_policies
    if remat == "norm":
        return nn.remat(unit, policy=policies.save_only_these_names(CONVOLVED, ops.STATISTICS))
    if remat == "unit":
        return nn.remat(unit)
    return nn.remat(unit, policy=policies.save_anything_except_these_names(GATHERED)) if sharded else unit
