"""BiT's ResNetV2: pre-activation bottlenecks, GroupNorm and weight-standardized convolutions.

The parameter tree is the checkpoint: the path of an array, joined by "/", is its key in the official
`.npz` without the leading `resnet/`. See Kolesnikov et al., "Big Transfer (BiT)", arXiv:1912.11370.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bit_jax.errors import RequestError

GROUPS = 32
NORM_EPS = 1e-5  # BiT; Flax's default is 1e-6
STANDARDIZE_EPS = 1e-10  # BiT; timm's is 1e-8, which float64 tells apart

UNITS = {14: (1, 1, 1, 1), 26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def is_architecture_name(name: str) -> bool:
    """Whether it has the form R<depth>x<width>, as no file or published model's name has."""
    return re.fullmatch(r"R\d+x\d+(\.\d+)?", name) is not None


def parse_architecture(name: str) -> tuple[tuple[int, ...], float]:
    """Units a stage and width factor of a name such as `R50x1`, `R152x4` or `R14x0.5`.

    Raises:
        RequestError: the name is of another form, the depth unknown, or the channels do not divide into 32 groups.
    """
    match = re.fullmatch(r"R(\d+)x(\d+(?:\.\d+)?)", name)
    if match is None or int(match[1]) not in UNITS:
        raise RequestError(f"unknown architecture {name!r}; write R<depth>x<width> with a depth of {sorted(UNITS)}")
    width = float(match[2])
    if width <= 0 or 64 * width % GROUPS:
        raise RequestError(
            f"width {match[2]} gives {64 * width:g} root channels; GroupNorm needs a multiple of {GROUPS}"
        )
    return UNITS[int(match[1])], width


def architecture_name(units: tuple[int, ...], width: float) -> str:
    """`R50x1` for a known depth, `R(3,4,5,3)x1` for any other number of units."""
    depth = next((depth for depth, known in UNITS.items() if known == units), None)
    return f"R{depth or '(' + ','.join(map(str, units)) + ')'}x{width:g}"


def standardize(kernel: Float[Array, "kh kw cin cout"]) -> Float[Array, "kh kw cin cout"]:
    """The kernel with mean 0 and (population) variance 1 over everything that feeds one output channel."""
    mean = kernel.mean(axis=(0, 1, 2), keepdims=True)
    centred = kernel - mean
    variance = (centred**2).mean(axis=(0, 1, 2), keepdims=True)
    return centred / jnp.sqrt(variance + STANDARDIZE_EPS)


def group_norm(
    x: Float[Array, "batch height width channels"], gamma: Float[Array, " channels"], beta: Float[Array, " channels"]
) -> Float[Array, "batch height width channels"]:
    """GroupNorm over 32 groups of neighbouring channels, statistics and result in the parameters' dtype.

    The variance is that of the centred values: a difference of two large sums would lose digits.
    """
    batch, height, width, channels = x.shape
    grouped = x.astype(gamma.dtype).reshape(batch, height, width, GROUPS, channels // GROUPS)
    centred = grouped - grouped.mean(axis=(1, 2, 4), keepdims=True)
    variance = (centred**2).mean(axis=(1, 2, 4), keepdims=True)
    normalized = (centred * lax.rsqrt(variance + NORM_EPS)).reshape(x.shape)
    return normalized * gamma + beta


class StdConv(nn.Module):
    """Convolution without bias whose kernel is standardized on every use; padded by (size - 1) / 2 on each side."""

    features: int
    size: int
    stride: int
    dtype: jnp.dtype
    precision: lax.Precision

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width cin"]) -> Float[Array, "batch out_h out_w cout"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, param_dtype(self.dtype))
        pad = (self.size - 1) // 2
        return lax.conv_general_dilated(
            x,
            standardize(kernel).astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=self.precision,
        )


class GroupNorm(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],), param_dtype(self.dtype))
        beta = self.param("beta", nn.initializers.zeros, (x.shape[-1],), param_dtype(self.dtype))
        return group_norm(x, gamma, beta).astype(self.dtype)


class Projection(nn.Module):
    """The 1x1 convolution that fits a stage's input to its output, under the checkpoint's name for it."""

    features: int
    stride: int
    dtype: jnp.dtype
    precision: lax.Precision

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width cin"]) -> Float[Array, "batch out_h out_w cout"]:
        conv = StdConv(self.features, 1, self.stride, self.dtype, self.precision, name="standardized_conv2d")
        return conv(x)


class PreActivationConv(nn.Module):
    """GroupNorm, ReLU, convolution; and, where `project_to` is set, the unit's shortcut from the same activation.

    Returns (convolved, shortcut); the shortcut is the untouched input where nothing is projected.
    """

    features: int
    size: int
    dtype: jnp.dtype
    precision: lax.Precision
    stride: int = 1
    project_to: int | None = None
    project_stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width cin"]
    ) -> tuple[Float[Array, "batch out_h out_w cout"], Float[Array, "batch short_h short_w cshort"]]:
        active = nn.relu(GroupNorm(self.dtype, name="group_norm")(x))
        shortcut = x
        if self.project_to is not None:
            proj = Projection(self.project_to, self.project_stride, self.dtype, self.precision, name="proj")
            shortcut = proj(active)
        conv = StdConv(self.features, self.size, self.stride, self.dtype, self.precision, name="standardized_conv2d")
        return conv(active), shortcut


class BottleneckUnit(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the channels, added to the shortcut."""

    channels: int
    stride: int
    project: bool
    dtype: jnp.dtype
    precision: lax.Precision

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width cin"]) -> Float[Array, "batch out_h out_w cout"]:
        mid, out = self.channels, 4 * self.channels
        numerics = {"dtype": self.dtype, "precision": self.precision}
        project_to = out if self.project else None
        y, shortcut = PreActivationConv(
            mid, 1, **numerics, project_to=project_to, project_stride=self.stride, name="a"
        )(x)
        y, _ = PreActivationConv(mid, 3, **numerics, stride=self.stride, name="b")(y)
        y, _ = PreActivationConv(out, 1, **numerics, name="c")(y)
        return y + shortcut


class Stage(nn.Module):
    channels: int
    units: int
    stride: int
    dtype: jnp.dtype
    precision: lax.Precision

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width cin"]) -> Float[Array, "batch out_h out_w cout"]:
        for unit in range(1, self.units + 1):
            first = unit == 1
            x = BottleneckUnit(
                self.channels,
                self.stride if first else 1,
                project=first,
                dtype=self.dtype,
                precision=self.precision,
                name=f"unit{unit:02d}",
            )(x)
        return x


class RootBlock(nn.Module):
    channels: int
    dtype: jnp.dtype
    precision: lax.Precision

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width 3"]) -> Float[Array, "batch out_h out_w cout"]:
        x = StdConv(self.channels, 7, 2, self.dtype, self.precision, name="standardized_conv2d")(x)
        # zeros, not -inf: the checkpoints were trained with a zero-padded pool, and negative maxima are common here
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


class HeadConv(nn.Module):
    """The classifier: a dense layer kept as a 1x1 convolution, as the checkpoint stores it; zero at first."""

    num_classes: int
    dtype: jnp.dtype
    precision: lax.Precision

    @nn.compact
    def __call__(self, features: Float[Array, "batch channels"]) -> Float[Array, "batch classes"]:
        shape = (1, 1, features.shape[-1], self.num_classes)
        kernel = self.param("kernel", nn.initializers.zeros, shape, param_dtype(self.dtype))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,), param_dtype(self.dtype))
        return jnp.dot(features, kernel[0, 0], precision=self.precision) + bias


class Head(nn.Module):
    num_classes: int
    dtype: jnp.dtype
    precision: lax.Precision

    @nn.compact
    def __call__(self, features: Float[Array, "batch channels"]) -> Float[Array, "batch classes"]:
        return HeadConv(self.num_classes, self.dtype, self.precision, name="conv2d")(features)


class ResNetV2(nn.Module):
    """Maps images [batch, height, width, 3] in [-1, 1], of any height and width, to logits [batch, num_classes].

    Attributes:
        units: bottleneck units in each of the four stages.
        width: channels as a multiple of ResNet's 64.
        num_classes: size of the head.
        dtype: of convolutions and activations between them. Parameters, statistics and logits are float32 or
            wider: in bfloat16 only what is multiplied and stored between layers is narrow.
        precision: of the products; HIGHEST keeps float32 products IEEE on hardware that would use TF32.
    """

    units: tuple[int, ...]
    width: float
    num_classes: int
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    precision: lax.Precision = lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch classes"]:
        numerics = {"dtype": self.dtype, "precision": self.precision}
        channels = round(64 * self.width)
        x = RootBlock(channels, **numerics, name="root_block")(images.astype(self.dtype))
        for stage, units in enumerate(self.units, start=1):
            stride = 1 if stage == 1 else 2
            x = Stage(channels * 2 ** (stage - 1), units, stride, **numerics, name=f"block{stage}")(x)
        x = nn.relu(GroupNorm(self.dtype, name="group_norm")(x))
        features = x.astype(param_dtype(self.dtype)).mean(axis=(1, 2))
        return Head(self.num_classes, **numerics, name="head")(features)

    def init_params(self, seed: int) -> dict:
        """Random kernels, a zero head: what training from scratch starts from."""
        image = jnp.zeros((1, 32, 32, 3), param_dtype(self.dtype))
        return jax.jit(self.init)(jax.random.key(seed), image)["params"]


def param_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What parameters and statistics are kept in when products are computed in `dtype`: never less than float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
