"""BiT's ResNetV2: pre-activation bottlenecks, GroupNorm and weight-standardized convolutions.

The parameter tree is the checkpoint: the path of an array, joined by "/", is its key in the official
`.npz` without the leading `resnet/`. See Kolesnikov et al., "Big Transfer (BiT)", arXiv:1912.11370.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from bit_jax.model import ops
from bit_jax.model.architecture import GROUPS, STANDARDIZED
from bit_jax.model.ops import max_pool
from input_pipeline.errors import RequestError

NORM_EPS = 1e-5  # BiT; Flax's default is 1e-6
STANDARDIZE_EPS = 1e-10  # BiT; timm's is 1e-8, which float64 tells apart

Remat = Literal["none", "norm", "unit"]
CONVOLVED = "convolved"  # with `ops.STATISTICS` what `remat` "norm" keeps, by the name given where it is made
GATHERED = "gathered"  # what is never kept
# of all random numbers; named, because JAX_DEFAULT_PRNG_IMPL would otherwise decide what a seed means
GENERATOR = "threefry2x32"

WANTED = "floats [batch, height, width, 3] in [-1, 1]"  # images


class Numerics(NamedTuple):
    """How layers compute.

    Attributes:
        dtype: what convolutions and the activations between them are computed in.
        precision: how exactly products are computed.
        gather: (kernel in `dtype`, split over devices) -> the same, whole on each, used and dropped again: the backward
            pass gathers it a second time. None where parameters are not split.
        recompute: the backward pass computes activations again from convolutions' outputs.
        paced: the backward pass goes on to the next unit only with this one's kernel gradients; see `_in_step`.
        products: 1x1 convolutions, and those of fewer places than channels, are written as matrix products.
        standardized: kernels are given standardized already.
    """

    dtype: jnp.dtype
    precision: lax.Precision
    gather: Callable[[Array], Array] | None
    recompute: bool
    paced: bool
    products: bool
    standardized: bool

    def whole(self, kernel: Array) -> Array:
        return kernel if self.gather is None else checkpoint_name(self.gather(kernel), GATHERED)


def standardize(kernel: Float[Array, "kh kw cin cout"]) -> Float[Array, "kh kw cin cout"]:
    """The kernel with mean 0 and (population) variance 1 over everything that feeds one output channel."""
    return ops.standardize(kernel, STANDARDIZE_EPS)


def group_norm_relu(
    x: Float[Array, "batch height width channels"],
    gamma: Float[Array, " channels"],
    beta: Float[Array, " channels"],
    recompute: bool = False,
) -> Float[Array, "batch height width channels"]:
    """max(0, GroupNorm(x)) over 32 groups of neighbouring channels, in x's dtype, computed in the parameters'.

    Args:
        x: a convolution's output, or a sum of such.
        gamma, beta: scale and shift of each channel.
        recompute: the result will be computed again in the backward pass (within `jax.checkpoint`).
    """
    return ops.group_norm_relu(x, gamma, beta, GROUPS, NORM_EPS, recompute)


class StdConv(nn.Module):
    """Convolution without bias whose kernel is standardized on every use; padded by (size - 1) / 2 on each side."""

    features: int
    size: int
    stride: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width cin"]) -> Float[Array, "batch out_h out_w cout"]:
        numerics, dtype = self.numerics, self.numerics.dtype
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, param_dtype(dtype))
        standard = kernel if numerics.standardized else standardize(kernel)
        whole = numerics.whole(standard.astype(dtype))
        convolved = ops.convolve(x, whole, self.stride, numerics.precision, products=numerics.products)
        return checkpoint_name(convolved, CONVOLVED)


class GroupNormRelu(nn.Module):
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        dtype = param_dtype(self.numerics.dtype)
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],), dtype)
        beta = self.param("beta", nn.initializers.zeros, (x.shape[-1],), dtype)
        return group_norm_relu(x, gamma, beta, self.numerics.recompute)


class Projection(nn.Module):
    """The 1x1 convolution that fits a stage's input to its output, under the checkpoint's name for it."""

    features: int
    stride: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width cin"]) -> Float[Array, "batch out_h out_w cout"]:
        conv = StdConv(self.features, 1, self.stride, self.numerics, name=STANDARDIZED)
        return conv(x)


class PreActivationConv(nn.Module):
    """GroupNorm, ReLU, convolution; and, where `project_to` is set, the unit's shortcut from the same activation.

    Returns (convolved, shortcut); the shortcut is the untouched input where nothing is projected.
    """

    features: int
    size: int
    numerics: Numerics
    stride: int = 1
    project_to: int | None = None
    project_stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width cin"]
    ) -> tuple[Float[Array, "batch out_h out_w cout"], Float[Array, "batch short_h short_w cshort"]]:
        active = GroupNormRelu(self.numerics, name="group_norm")(x)
        shortcut = x
        if self.project_to is not None:
            proj = Projection(self.project_to, self.project_stride, self.numerics, name="proj")
            shortcut = proj(active)
        conv = StdConv(self.features, self.size, self.stride, self.numerics, name=STANDARDIZED)
        return conv(active), shortcut


class BottleneckUnit(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels, added to the shortcut."""

    channels: int
    stride: int
    project: bool
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width cin"]) -> Float[Array, "batch out_h out_w cout"]:
        mid, out = self.channels, 4 * self.channels
        project_to = out if self.project else None
        y, shortcut = PreActivationConv(
            mid, 1, self.numerics, project_to=project_to, project_stride=self.stride, name="a"
        )(x)
        y, _ = PreActivationConv(mid, 3, self.numerics, stride=self.stride, name="b")(y)
        y, _ = PreActivationConv(out, 1, self.numerics, name="c")(y)
        return y + shortcut


class Stage(nn.Module):
    channels: int
    units: int
    stride: int
    remat: Remat
    numerics: Numerics

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width cin"], later: Float[Array, ""]
    ) -> tuple[Float[Array, "batch out_h out_w cout"], Float[Array, ""]]:
        bottleneck = _rematerialized(BottleneckUnit, self.remat, sharded=self.numerics.gather is not None)
        for unit in range(1, self.units + 1):
            first = unit == 1
            stride = self.stride if first else 1
            made = bottleneck(self.channels, stride, first, self.numerics, name=f"unit{unit:02d}")
            x, later = _in_step(made, x, later) if self.numerics.paced else (made(x), later)
        return x, later


def _in_step(unit: nn.Module, x: Array, later: Array) -> tuple[Array, Array]:
    """(unit(x), later), where `later` is 0 and only carries an order through the backward pass: the gradient of x waits
    for the kernel gradients of the unit after this one.

    Free to choose, XLA's latency-hiding scheduler puts off all kernel gradients, and with them what they are computed
    from, to the end of the step: 25 GiB instead of 14 for R152x2 on eight GPUs. One unit's delay leaves each reduction
    a unit's time to finish behind computation. XLA keeps the dependency because 0 * x is not 0 for every x.
    """

    def forward(unit, x, later):
        y, gradient = nn.vjp(lambda unit, x: unit(x), unit, x)
        return (y, later), gradient

    def backward(gradient, given):
        of_y, after = given
        of_params, of_x = gradient(of_y)
        own = sum(
            (0 * leaf[0, 0, 0, 0] for leaf in jax.tree.leaves(of_params) if leaf.ndim == 4),
            start=jnp.zeros((), after.dtype),
        )
        return of_params, of_x + after.astype(of_x.dtype), own

    return nn.custom_vjp(lambda unit, x, later: (unit(x), later), forward, backward)(unit, x, later)


def _rematerialized(unit: Any, remat: Remat, *, sharded: bool) -> Any:
    """The unit's class, keeping for the backward pass what `remat` says; its input is kept always."""
    policies = jax.checkpoint_policies
    if remat == "norm":
        return nn.remat(unit, policy=policies.save_only_these_names(CONVOLVED, ops.STATISTICS))
    if remat == "unit":
        return nn.remat(unit)
    return nn.remat(unit, policy=policies.save_anything_except_these_names(GATHERED)) if sharded else unit


class RootBlock(nn.Module):
    channels: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 3"]) -> Float[Array, "batch out_h out_w cout"]:
        x = StdConv(self.channels, 7, 2, self.numerics, name=STANDARDIZED)(x)
        # zeros, not -inf: the checkpoints were trained with a zero-padded pool, and negative maxima are common here
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return max_pool(x)


class HeadConv(nn.Module):
    """The classifier: a dense layer kept as a 1x1 convolution, as the checkpoint stores it; zero at first."""

    num_classes: int
    numerics: Numerics

    @nn.compact
    def __call__(self, features: Float[Array, "batch channels"]) -> Float[Array, "batch classes"]:
        dtype = param_dtype(self.numerics.dtype)
        shape = (1, 1, features.shape[-1], self.num_classes)
        kernel = self.param("kernel", nn.initializers.zeros, shape, dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,), dtype)
        return jnp.dot(features, self.numerics.whole(kernel)[0, 0], precision=self.numerics.precision) + bias


class Head(nn.Module):
    num_classes: int
    numerics: Numerics

    @nn.compact
    def __call__(self, features: Float[Array, "batch channels"]) -> Float[Array, "batch classes"]:
        return HeadConv(self.num_classes, self.numerics, name="conv2d")(features)


def check_images(images: Any) -> None:
    """Looks at shape and dtype while the model is traced, and at no value.

    Raises:
        RequestError: they are not floats [batch, height, width, 3]; the message says how to make them so.
    """
    if not isinstance(images, (jax.Array, np.ndarray)):
        raise RequestError(f"images are a {type(images).__name__}, not an array; give {WANTED}")
    shape = images.shape
    if len(shape) == 3 and 3 in (shape[0], shape[2]):
        remedy = "add a batch axis: images[None]"
    elif len(shape) == 4 and shape[1] == 3 != shape[3]:
        remedy = "move the channels to the end: images.transpose(0, 2, 3, 1)"
    elif len(shape) == 4 and shape[3] == 1:
        remedy = "repeat the grey channel: images.repeat(3, axis=-1)"
    elif len(shape) == 4 and shape[3] == 4:
        remedy = "leave out the fourth channel: images[..., :3]"
    elif len(shape) != 4 or shape[3] != 3 or not shape[1] * shape[2]:
        remedy = "bring them into that shape"
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        remedy = "bring 0..255 into that range: (images.astype('float32') - 127.5) / 127.5"
    else:
        return
    raise RequestError(f"images are {images.dtype} {list(shape)}, and the model takes {WANTED}; {remedy}")


class ResNetV2(nn.Module):
    """Maps images [batch, height, width, 3] in [-1, 1], of any height and width, to logits [batch, num_classes].

    Attributes:
        units: bottleneck units in each of the four stages.
        width: channels as a multiple of ResNet's 64.
        num_classes: size of the head.
        dtype: what convolutions and the activations between them are computed in. Parameters, statistics and logits
            are float32 or wider: in bfloat16 only what is multiplied and stored between layers is narrow.
        precision: how exactly products are computed; HIGHEST keeps float32 products IEEE on hardware that would use
            TF32.
        remat: what the backward pass computes again instead of keeping it: nothing; `norm`, GroupNorm and ReLU, from
            convolutions' outputs; `unit`, whole bottleneck units, from their inputs.
        gather, paced, products, standardized: see `Numerics`.
    """

    units: tuple[int, ...]
    width: float
    num_classes: int
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    precision: lax.Precision = lax.Precision.HIGHEST
    remat: Remat = "none"
    gather: Callable[[Array], Array] | None = None
    paced: bool = False
    products: bool = False
    standardized: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch classes"]:
        check_images(images)
        numerics = Numerics(
            self.dtype,
            self.precision,
            self.gather,
            self.remat != "none",
            self.paced,
            self.products,
            self.standardized,
        )
        channels = round(64 * self.width)
        x = RootBlock(channels, numerics, name="root_block")(images.astype(self.dtype))
        later = jnp.zeros((), param_dtype(self.dtype))
        for stage, units in enumerate(self.units, start=1):
            stride = 1 if stage == 1 else 2
            stage_channels = channels * 2 ** (stage - 1)
            x, later = Stage(stage_channels, units, stride, self.remat, numerics, name=f"block{stage}")(x, later)
        x = GroupNormRelu(numerics._replace(recompute=False), name="group_norm")(x)
        features = x.astype(param_dtype(self.dtype)).mean(axis=(1, 2))
        return Head(self.num_classes, numerics, name="head")(features)

    def init_params(self, seed: int) -> dict:
        """Random kernels, a zero head: what training from scratch starts from."""
        image = jnp.zeros((1, 32, 32, 3), param_dtype(self.dtype))
        return jax.jit(self.init)(jax.random.key(seed, impl=GENERATOR), image)["params"]


def param_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What parameters and statistics are kept in when products are computed in `dtype`: never less than float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
