"""The operations of BiT's ResNetV2, written so that XLA moves little memory.

Most have a gradient in closed form; a comment beside each says what that saves. docs/notebook.md has the figures.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

FEEDS = (0, 1, 2)  # a kernel's axes that feed one output channel
SUMS = 2048  # sums per image that `_over_places` computes in its first pass
STATISTICS = "statistics"  # checkpoint name of what GroupNorm and standardization keep for the backward pass


def standardize(kernel: Float[Array, "kh kw cin cout"], eps: float) -> Float[Array, "kh kw cin cout"]:
    """Returns (kernel - mean) / sqrt(variance + eps), with statistics over all values that feed one output channel."""
    return jax.jit(_standardize, static_argnums=1)(kernel, eps)  # see `group_norm_relu`


# The gradient in closed form needs the kernel and two numbers per channel. Differentiated by JAX, the centred kernels
# are kept and reread: 2 % more memory traffic in a step of R152x2.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _standardize(kernel, eps):
    return _standardize_forward(kernel, eps)[0]


def _standardize_forward(kernel, eps):
    mean, scale = (checkpoint_name(statistic, STATISTICS) for statistic in _kernel_statistics(kernel, eps))
    return (kernel - mean) * scale, (kernel, mean, scale)


def _standardize_backward(eps, saved, gradient):
    kernel, mean, scale = saved
    # The barrier makes XLA's GPU compiler compute this again instead of reading the forward pass's result: 0.4 % less
    # memory traffic in a float32 step of R152x2.
    standard = (kernel - lax.optimization_barrier(mean)) * scale
    across, along = (array.mean(axis=FEEDS) for array in (gradient, gradient * standard))
    return (scale * (gradient - across - standard * along),)


_standardize.defvjp(_standardize_forward, _standardize_backward)


def _kernel_statistics(kernel: Array, eps: float) -> tuple[Array, Array]:
    """Returns mean and 1 / standard deviation, [cout], in one pass over the kernel, like `_group_statistics`.

    The sample is a sixteenth of the values, so that E[d^2] is at most 16 times the variance for any kernel.
    """
    sample = kernel[:, :, : max(1, kernel.shape[2] // 16)].mean(axis=FEEDS)
    d = kernel - sample
    mean, square = (array.mean(axis=FEEDS) for array in (d, d * d))
    return sample + mean, lax.rsqrt(square - mean * mean + eps)


def group_norm_relu(
    x: Float[Array, "batch height width channels"],
    gamma: Float[Array, " channels"],
    beta: Float[Array, " channels"],
    groups: int,
    eps: float,
    recompute: bool,
) -> Float[Array, "batch height width channels"]:
    """Returns max(0, gamma * (x - mean) / sqrt(variance + eps) + beta), with statistics over groups of neighbouring
    channels.

    Args:
        recompute: whether the backward pass computes the result again.

    Returns:
        The result in x's dtype; it is computed in gamma's.
    """
    # Under a jit of its own, this is traced once per shape, not once per layer, and XLA gets (and inlines) calls of it.
    # With the same for `standardize`, R152x2 is lowered to 30 % of the lines in less than half of the time.
    return jax.jit(_group_norm_relu, static_argnums=(3, 4, 5))(x, gamma, beta, groups, eps, recompute)


# The gradient in closed form keeps x and two numbers per group. Differentiated by JAX, it reads and writes the layer's
# size 8.5 times instead of 5: 13 % more memory traffic in a step of R152x2.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _group_norm_relu(x, gamma, beta, groups, eps, recompute):
    return _group_norm_relu_forward(x, gamma, beta, groups, eps, recompute)[0]


def _group_norm_relu_forward(x, gamma, beta, groups, eps, recompute):
    statistics = _group_statistics(x, groups, eps, gamma.dtype)
    mean, scale = (checkpoint_name(_spread(statistic, x.shape[-1]), STATISTICS) for statistic in statistics)
    active = nn.relu(_normalized(x, mean, scale, gamma, beta)).astype(x.dtype)
    return active, (x, mean, scale, gamma, beta)


def _group_norm_relu_backward(groups, eps, recompute, saved, gradient):
    x, mean, scale, gamma, beta = saved
    _, height, width, channels = x.shape

    def inside(x, gradient):
        """Returns the gradient of ReLU's input, and the centred x."""
        before_relu = _normalized(x, mean, scale, gamma, beta)
        gradient = gradient.astype(gamma.dtype)
        centred = x.astype(gamma.dtype) - mean
        if recompute:
            # With this, XLA writes the activation, which the next convolution's gradient needs, in the same pass over x
            # as the sums below. It would store and reread a comparison: 6 % more memory traffic.
            return gradient * jnp.sign(nn.relu(before_relu)), centred
        return jnp.where(before_relu > 0, gradient, 0), centred

    inner, centred = inside(x, gradient)
    of_beta, of_scaled = _over_places(inner, inner * centred)
    # the barrier keeps the two passes from sharing large arrays: the second computes them again instead of reading them
    x, gradient, of_beta, of_scaled = lax.optimization_barrier((x, gradient, of_beta, of_scaled))
    inner, centred = inside(x, gradient)
    of_gamma, slope = of_scaled * scale[:, 0, 0], scale * gamma
    summands = (of_channels * slope[:, 0, 0] for of_channels in (of_beta, of_gamma * scale[:, 0, 0]))
    shift, tilt = _sums(2, *(_in_groups(array, groups, height * width) for array in summands))
    of_x = slope * inner - _spread(shift, channels) - centred * _spread(tilt, channels)
    of_gamma, of_beta = jnp.stack((of_gamma, of_beta)).sum(axis=1)  # over the batch, which several devices may share
    return of_x.astype(x.dtype), of_gamma, of_beta


_group_norm_relu.defvjp(_group_norm_relu_forward, _group_norm_relu_backward)


def _over_places(*arrays: Array) -> list[Array]:
    """Returns each array's sums over height and width, [batch, channels]; stripes of rows are summed first.

    Without stripes there are so few sums that XLA does not fuse the summands into them, but writes the summands to
    memory first: 3 % more memory traffic in a bfloat16 step of R152x2.
    """
    batch, height, width, channels = arrays[0].shape
    wanted = max(1, SUMS // channels)
    stripes = max(count for count in range(1, wanted + 1) if height % count == 0)
    shape = (batch, stripes, height // stripes * width, channels)
    # the barrier keeps XLA from merging the two sums into one
    of_stripes = lax.optimization_barrier([array.reshape(shape).sum(axis=2) for array in arrays])
    return _sums(1, *of_stripes)


def _sums(axis: int, *arrays: Array) -> list[Array]:
    """Returns each array's sums over an axis, all in one pass.

    A GPU spends as long on launching a kernel for small arrays as on its work, and XLA makes one of each `sum`.
    """

    def add(sums, values):
        return [one + other for one, other in zip(sums, values, strict=True)]

    return lax.reduce(list(arrays), [jnp.zeros((), array.dtype) for array in arrays], add, (axis,))


def _group_statistics(x: Array, groups: int, eps: float, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Returns mean and 1 / standard deviation, [batch, groups], in one pass over x.

    E[d^2] - E[d]^2 loses digits if the mean of d is large compared with its deviation; so d is the difference between
    the values and the mean of a sample, the middle row.
    """
    _, height, width, channels = x.shape
    sample = _in_groups(_middle_row(x).astype(dtype).sum(axis=1), groups, width).sum(axis=2)
    d = x.astype(dtype) - _spread(sample, channels)
    summands = (_in_groups(array.sum(axis=(1, 2)), groups, height * width) for array in (d, d * d))
    mean, square = _sums(2, *summands)
    return sample + mean, lax.rsqrt(square - mean * mean + eps)


def _in_groups(sums: Array, groups: int, places: int) -> Array:
    """Turns sums over so many places, [batch, channels], into [batch, groups, channels of a group], which add up to
    means of groups. Dividing before the sum leaves nothing to be done after it."""
    of_group = sums.shape[-1] // groups
    return sums.reshape(sums.shape[0], groups, of_group) / (places * of_group)


def _middle_row(x: Array) -> Array:
    """Returns the row [batch, width, channels] at half the height, which may be symbolic (see `jax.export`)."""
    middle = x.shape[1] // 2
    return x[:, middle] if isinstance(middle, int) else lax.dynamic_index_in_dim(x, middle, 1, keepdims=False)


def _normalized(x: Array, mean: Array, scale: Array, gamma: Array, beta: Array) -> Array:
    """Returns (x - mean) * scale * gamma + beta, with one product and one sum per value."""
    slope = scale * gamma
    return x.astype(gamma.dtype) * slope + (beta - mean * slope)


def _spread(of_groups: Array, channels: int) -> Array:
    """Repeats values of groups, [batch, groups], for their channels: [batch, 1, 1, channels]."""
    return jnp.repeat(of_groups, channels // of_groups.shape[-1], axis=-1)[:, None, None]


def convolve(
    x: Float[Array, "batch height width cin"],
    kernel: Float[Array, "size size cin cout"],
    stride: int,
    precision: lax.Precision,
    *,
    products: bool,
) -> Float[Array, "batch out_h out_w cout"]:
    """Convolves x, padded by (size - 1) / 2 on each side.

    Args:
        products: whether to compute a matrix product instead where that is faster on a CPU.
    """
    size, (batch, height, width, channels) = kernel.shape[0], x.shape
    pad = (size - 1) // 2
    if products and (size == 1 or batch * height * width <= channels * stride**2):
        places = _patches(jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))), size, stride)
        return _product(places, kernel.reshape(-1, kernel.shape[-1]), precision)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


def _patches(x: Array, size: int, stride: int) -> Array:
    """Returns the input patch of every output position, [batch, out_h, out_w, size * size * channels]."""
    height, width = (side - size + 1 for side in x.shape[1:3])
    shifted = [x[:, i : i + height : stride, j : j + width : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifted, axis=-1)


# The kernel's gradient is written as one matrix product, which Eigen computes without a copy. Differentiated by JAX, it
# is a product of arrays of rank 4, and XLA's CPU compiler first transposes one of them together with everything that it
# is computed from, which takes a seventh of a training step of R50x1.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, kernel: Array, precision: lax.Precision) -> Array:
    return jnp.tensordot(x, kernel, axes=1, precision=precision)


def _product_forward(x, kernel, precision):
    return _product(x, kernel, precision), (x, kernel)


def _product_backward(precision, saved, gradient):
    x, kernel = saved
    rows, of_rows = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))
    of_x = lax.dot_general(gradient, kernel, (((3,), (1,)), ((), ())), precision=precision)
    return of_x, lax.dot_general(rows, of_rows, (((0,), (0,)), ((), ())), precision=precision)


_product.defvjp(_product_forward, _product_backward)


def max_pool(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch out_h out_w channels"]:
    """Returns maxima of 3x3 windows with stride 2; the gradient goes to the first of equal maxima in reading order."""
    return _max_of_three(_max_of_three(x, 2), 1)


# The gradient has a closed form, because XLA's own carries the position of each maximum in four index arrays.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_three(x, axis):
    return functools.reduce(jnp.maximum, _thirds(x, axis))


def _max_of_three_forward(x, axis):
    largest = _max_of_three(x, axis)
    return largest, (x, largest)


def _max_of_three_backward(axis, saved, gradient):
    x, largest = saved
    first, second, _ = (third == largest for third in _thirds(x, axis))
    of_first, of_second = jnp.where(first, gradient, 0), jnp.where(second & ~first, gradient, 0)
    of_third = jnp.where(first | second, 0, gradient)

    def placed(third, start):
        padding = [(0, 0, 0)] * x.ndim
        padding[axis] = (start, x.shape[axis] - (2 * largest.shape[axis] - 1) - start, 1)
        return lax.pad(third, jnp.zeros((), third.dtype), padding)

    return (placed(of_first, 0) + placed(of_second, 1) + placed(of_third, 2),)


_max_of_three.defvjp(_max_of_three_forward, _max_of_three_backward)


def _thirds(x: Array, axis: int) -> list[Array]:
    """Returns the first, second and third elements of all windows of three along an axis, at every second position."""
    windows = (x.shape[axis] - 1) // 2
    return [lax.slice_in_dim(x, start, start + 2 * windows - 1, 2, axis) for start in range(3)]
