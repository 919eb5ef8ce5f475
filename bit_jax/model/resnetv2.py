"""BiT's ResNetV2: pre-activation bottlenecks, GroupNorm and weight-standardized convolutions.

The parameter tree is the checkpoint: the path of an array, joined by "/", is its key in the official
`.npz` without the leading `resnet/`. See Kolesnikov et al., "Big Transfer (BiT)", arXiv:1912.11370.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bit_jax.model.architecture import STANDARDIZED, Remat
from bit_jax.model.execution import Numerics, in_step, rematerialized
from bit_jax.model.images import check_images
from bit_jax.model.layers import OUTPUT, GroupNormRelu, StdConv, param_dtype, parameter, sow_largest
from bit_jax.model.ops import max_pool

# of all random numbers; named, because JAX_DEFAULT_PRNG_IMPL would otherwise decide what a seed means
GENERATOR = "threefry2x32"


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
        y = y + shortcut
        sow_largest(self, OUTPUT, y)
        return y


class Stage(nn.Module):
    """Residual units of the same width; the first has the stride and a projection."""

    channels: int
    units: int
    stride: int
    remat: Remat
    numerics: Numerics

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width cin"], later: Float[Array, ""]
    ) -> tuple[Float[Array, "batch out_h out_w cout"], Float[Array, ""]]:
        bottleneck = rematerialized(BottleneckUnit, self.remat, sharded=self.numerics.gather is not None)
        for unit in range(1, self.units + 1):
            first = unit == 1
            stride = self.stride if first else 1
            made = bottleneck(self.channels, stride, first, self.numerics, name=f"unit{unit:02d}")
            x, later = in_step(made, x, later) if self.numerics.paced else (made(x), later)
        return x, later


class RootBlock(nn.Module):
    """The first convolution, 7x7 with stride 2, and the maximum pooling after it, which halves the size again."""

    channels: int
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 3"]) -> Float[Array, "batch out_h out_w cout"]:
        x = StdConv(self.channels, 7, 2, self.numerics, name=STANDARDIZED)(x)
        # zeros, not -inf: the checkpoints were trained with a zero-padded pool, and negative maxima are common here
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = max_pool(x)
        sow_largest(self, OUTPUT, x)
        return x


class HeadConv(nn.Module):
    """The classifier: a dense layer kept as a 1x1 convolution, as the checkpoint stores it; zero at first."""

    num_classes: int
    numerics: Numerics

    @nn.compact
    def __call__(self, features: Float[Array, "batch channels"]) -> Float[Array, "batch classes"]:
        dtype = param_dtype(self.numerics.dtype)
        shape = (1, 1, features.shape[-1], self.num_classes)
        kernel = parameter(self, "kernel", nn.initializers.zeros, shape, dtype)
        bias = parameter(self, "bias", nn.initializers.zeros, (self.num_classes,), dtype)
        return jnp.dot(features, self.numerics.whole(kernel)[0, 0], precision=self.numerics.precision) + bias


class Head(nn.Module):
    """The classifier from pooled features to logits, under the checkpoint's name for it."""

    num_classes: int
    numerics: Numerics

    @nn.compact
    def __call__(self, features: Float[Array, "batch channels"]) -> Float[Array, "batch classes"]:
        return HeadConv(self.num_classes, self.numerics, name="conv2d")(features)


class ResNetV2(nn.Module):
    """Maps images [batch, height, width, 3] in [-1, 1], of any height and width, to logits [batch, num_classes].

    `model.apply({"params": params}, images, method="features")` returns what the logits are computed from.

    Attributes:
        units: bottleneck units in each of the four stages.
        width: channels as a multiple of ResNet's 64.
        num_classes: size of the head. 0: there is no head, and the model returns the pooled features.
        dtype: what convolutions and the activations between them are computed in. Parameters, statistics and logits
            are float32 or wider: in bfloat16 only what is multiplied and stored between layers is narrow.
        precision: how exactly products are computed; HIGHEST keeps float32 products IEEE on hardware that would use
            TF32.
        remat: what the backward pass computes again instead of keeping it: nothing; `norm`, GroupNorm and ReLU, from
            convolutions' outputs; `unit`, whole bottleneck units, from their inputs.
        gather, paced, products, standardized, norm_eps, standardize_eps: see `Numerics`.
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
    norm_eps: float | None = None
    standardize_eps: float | None = None

    def setup(self):
        numerics = Numerics(
            self.dtype,
            self.precision,
            self.gather,
            self.remat != "none",
            self.paced,
            self.products,
            self.standardized,
            self.norm_eps,
            self.standardize_eps,
        )
        channels = round(64 * self.width)
        self.root_block = RootBlock(channels, numerics)
        for stage, units in enumerate(self.units, start=1):
            stride = 1 if stage == 1 else 2
            made = Stage(channels * 2 ** (stage - 1), units, stride, self.remat, numerics)
            setattr(self, f"block{stage}", made)
        self.group_norm = GroupNormRelu(numerics._replace(recompute=False))
        if self.num_classes:
            self.head = Head(self.num_classes, numerics)

    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch classes"]:
        pooled = self._features(images)["pooled"]
        return self.head(pooled) if self.num_classes else pooled

    def features(self, images: Float[Array, "batch height width 3"]) -> dict[str, Float[Array, "batch ..."]]:
        """Returns what the logits are computed from, by name, without the head.

        Call it by `model.apply({"params": params}, images, method="features")`; the parameters may lack the head. Under
        `jax.jit`, what the caller does not use of the result is neither kept nor, at the end, computed.

        Returns:
            `root_block`, `block1` to `block4`: outputs of the root and of the stages, [batch, height, width, channels]
            with sides of a quarter, a quarter, an eighth, a 16th and a 32nd of the image's, rounded up, in the model's
            dtype; `last_activation`: the same shape as `block4`, after the last GroupNorm and ReLU; `pooled`: its mean
            over height and width, [batch, channels], which the head takes, in float32 or wider.
        """
        return self._features(images)

    def classify(self, pooled: Float[Array, "batch channels"]) -> Float[Array, "batch classes"]:
        """Returns the logits of pooled features, such as `features` gives; the parameters may be the head's alone.

        Call it by `model.apply({"params": params}, pooled, method="classify")`.
        """
        return self.head(pooled.astype(param_dtype(self.dtype)))

    @nn.nowrap
    def _features(self, images: Array) -> dict[str, Array]:
        check_images(images)
        x = self.root_block(images.astype(self.dtype))
        outputs = {"root_block": x}
        later = jnp.zeros((), param_dtype(self.dtype))
        for stage in range(1, len(self.units) + 1):
            x, later = getattr(self, f"block{stage}")(x, later)
            outputs[f"block{stage}"] = x
        x = self.group_norm(x)
        return outputs | {"last_activation": x, "pooled": x.astype(param_dtype(self.dtype)).mean(axis=(1, 2))}

    def init_params(self, seed: int) -> dict:
        """Returns random kernels and a zero head, from which training from scratch starts."""
        image = jnp.zeros((1, 32, 32, 3), param_dtype(self.dtype))
        return jax.jit(self.init)(jax.random.key(seed, impl=GENERATOR), image)["params"]
