"""The two layers that BiT is made of: a weight-standardized convolution, and GroupNorm with ReLU."""

import flax.linen as nn
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from bit_jax.model import ops
from bit_jax.model.architecture import GROUPS, STANDARDIZE_EPS
from bit_jax.model.execution import CONVOLVED, Numerics

NORM_EPS = 1e-5  # BiT; Flax's default is 1e-6
RELU, OUTPUT = "relu", "output"  # names under which `sow_largest` keeps largest values: of a ReLU, of a module's output
INTERMEDIATES = "intermediates"  # Flax's collection for such values; mutable only where a caller asks for it


def param_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What parameters and statistics are kept in when products are computed in `dtype`: never less than float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def standardize(kernel: Float[Array, "kh kw cin cout"], eps: float | None = None) -> Float[Array, "kh kw cin cout"]:
    """The kernel with mean 0 and (population) variance 1 over everything that feeds one output channel.

    Args:
        eps: what is added to the variance; None: `STANDARDIZE_EPS`.
    """
    return ops.standardize(kernel, STANDARDIZE_EPS if eps is None else eps)


def group_norm_relu(
    x: Float[Array, "batch height width channels"],
    gamma: Float[Array, " channels"],
    beta: Float[Array, " channels"],
    recompute: bool = False,
    eps: float | None = None,
) -> Float[Array, "batch height width channels"]:
    """max(0, GroupNorm(x)) over 32 groups of neighbouring channels, in x's dtype, computed in the parameters'.

    Args:
        x: a convolution's output, or a sum of such.
        gamma, beta: scale and shift of each channel.
        recompute: the result will be computed again in the backward pass (within `jax.checkpoint`).
        eps: what is added to the variance; None: `NORM_EPS`.
    """
    return ops.group_norm_relu(x, gamma, beta, GROUPS, NORM_EPS if eps is None else eps, recompute)


def parameter(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...], dtype: jnp.dtype
) -> Array:
    """Returns the module's parameter of that name; where it has none, it is being initialized and makes it.

    Flax's own `param` also traces the initializer of every parameter that there is, for its shape, which is known here:
    a quarter of the time in which Python traces R152x2 and its gradient.

    Raises:
        ScopeParamShapeError: the parameter has another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, initializer, shape, dtype)
    value = module.get_variable("params", name)
    if jnp.shape(value) != shape:
        where = "/".join(module.path)
        raise ScopeParamShapeError(name, f"/{where}", jnp.shape(value), shape)
    return value


def sow_largest(module: nn.Module, name: str, x: Float[Array, "batch height width channels"]) -> None:
    """Keeps the largest absolute value of each channel, [channels], in the module's "intermediates", if the model is
    applied with `mutable="intermediates"`. Otherwise nothing is computed, and the program is as without this call."""
    if module.is_mutable_collection(INTERMEDIATES):
        largest = jnp.abs(x).max(axis=(0, 1, 2)).astype(param_dtype(x.dtype))
        module.sow(INTERMEDIATES, name, largest)


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
        kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape, param_dtype(dtype))
        standard = kernel if numerics.standardized else standardize(kernel, numerics.standardize_eps)
        whole = numerics.whole(standard.astype(dtype))
        convolved = ops.convolve(x, whole, self.stride, numerics.precision, products=numerics.products)
        return checkpoint_name(convolved, CONVOLVED)


class GroupNormRelu(nn.Module):
    numerics: Numerics

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        numerics = self.numerics
        dtype = param_dtype(numerics.dtype)
        gamma = parameter(self, "gamma", nn.initializers.ones, (x.shape[-1],), dtype)
        beta = parameter(self, "beta", nn.initializers.zeros, (x.shape[-1],), dtype)
        active = group_norm_relu(x, gamma, beta, numerics.recompute, numerics.norm_eps)
        sow_largest(self, RELU, active)
        return active
