"""Faults inside one unit, of one operation, forward or on the way back; the ladder has to name that operation.

All but the last two are in JAX.
"""

import contextlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from parity.faults.ports import rounded
from parity.faults.registry import fault

NORM, CONV, STANDARDIZE = (
    "bit_jax.model.layers.group_norm_relu",
    "bit_jax.model.ops.convolve",
    "bit_jax.model.layers.standardize",
)


@contextlib.contextmanager
def _at(place: str, target: str, change: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replaces a function by change(function) within the module of that path."""
    import flax.linen as nn

    function = pkgutil.resolve_name(target)
    changed, inside = change(function), False

    def follow(call, args, kwargs, context):
        nonlocal inside
        if "/".join(context.module.path) != place:
            return call(*args, **kwargs)
        inside = True
        try:
            return call(*args, **kwargs)
        finally:
            inside = False

    def dispatched(*args, **settings):
        return (changed if inside else function)(*args, **settings)

    with mock.patch(target, dispatched), nn.intercept_methods(follow):
        yield


def _differentiated(change: Callable, arrays: int) -> Callable[[Callable], Callable]:
    """Gives a function, whose first arguments are that many arrays, another gradient: change(arrays, cotangent,
    gradients)."""
    import jax

    def altered(function):
        def call(*args, **settings):
            def inner(*given):
                return function(*given, *args[arrays:], **settings)

            def backward(given, cotangent):
                return change(given, cotangent, jax.vjp(inner, *given)[1](cotangent))

            outer = jax.custom_vjp(inner)
            outer.defvjp(lambda *given: (inner(*given), given), backward)
            return outer(*args[:arrays])

        return call

    return altered


def _norm(x: Any, gamma: Any, beta: Any, *, eps: float = 1e-5, axes: tuple[int, ...] = (1, 2, 4)) -> Any:
    """GroupNorm without its ReLU, of x split into [batch, height, width, group, channel]."""
    import jax.numpy as jnp

    grouped = x.astype(gamma.dtype).reshape(*x.shape[:3], 32, -1)
    centred = grouped - grouped.mean(axes, keepdims=True)
    normalized = centred / jnp.sqrt((centred * centred).mean(axes, keepdims=True) + eps)
    return normalized.reshape(x.shape) * gamma + beta


def _replaced_norm(**settings: Any) -> Callable[[Callable], Callable]:
    import flax.linen as nn

    return lambda _: lambda x, gamma, beta, *_: nn.relu(_norm(x, gamma, beta, **settings)).astype(x.dtype)


def _narrowed(function: Callable) -> Callable:
    """Rounds both operands of a product to bfloat16, forward alone."""
    import jax

    narrow = jax.custom_jvp(lambda x: rounded(x, 7))
    narrow.defjvps(lambda tangent, _, x: tangent)
    return lambda left, right, *args, **settings: function(narrow(left), narrow(right), *args, **settings)


@fault(
    "one norm's statistics over the batch, too",
    "forward",
    "block2/unit01",
    operation="block2/unit01/b/group_norm/statistics, value",
)
def batch_statistics() -> Any:
    return _at("block2/unit01/b/group_norm", NORM, _replaced_norm(axes=(0, 1, 2, 4)))


@fault("one norm without eps", "forward", "block3/unit01", operation="block3/unit01/c/group_norm/statistics, value")
def no_eps() -> Any:
    return _at("block3/unit01/c/group_norm", NORM, _replaced_norm(eps=0.0))


@fault(
    "one norm adds beta twice", "forward", "block2/unit01", operation="block2/unit01/c/group_norm/normalization, value"
)
def beta_twice() -> Any:
    return _at("block2/unit01/c/group_norm", NORM, lambda norm: lambda x, gamma, beta, *_: norm(x, gamma, 2 * beta))


@fault("one ReLU leaks", "forward", "block2/unit01", operation="block2/unit01/a/relu, value")
def leaky_relu() -> Any:
    import flax.linen as nn

    return _at("block2/unit01/a/group_norm", NORM, lambda _: lambda *arrays: nn.leaky_relu(_norm(*arrays[:3]), 0.01))


@fault(
    "one kernel's statistics over places alone",
    "forward",
    "block4/unit01",
    operation="block4/unit01/b/standardized_conv2d/standardization, value",
)
def standardized_by_places() -> Any:
    def change(_):
        return lambda k, *_: (k - k.mean((0, 1), keepdims=True)) / (k.var((0, 1, 2), keepdims=True) + 1e-10) ** 0.5

    return _at("block4/unit01/b/standardized_conv2d", STANDARDIZE, change)


@fault("a shortcut added twice", "forward", "block3/unit01", operation="block3/unit01/addition, value")
def shortcut_twice() -> Any:
    import flax.linen as nn

    def doubled(call, args, kwargs, context):
        result = call(*args, **kwargs)
        return (result[0], 2 * result[1]) if context.module.path == ("block3", "unit01", "a") else result

    return nn.intercept_methods(doubled)


@fault(
    "bfloat16 in one convolution",
    "forward",
    "block3/unit01",
    precision="fp32",
    operation="block3/unit01/b/standardized_conv2d, value",
)
def bfloat16_convolution() -> Any:
    return _at("block3/unit01/b/standardized_conv2d", CONV, _narrowed)


@fault("bfloat16 in the head's product", "forward", "logits", precision="fp32", operation="head/conv2d, value")
def bfloat16_head() -> Any:
    return _at("head/conv2d", "jax.numpy.dot", _narrowed)


@fault(
    "one 3x3 convolution's gradient by its input a place off",
    "gradients",
    "resnet/",
    operation="block3/unit01/b/standardized_conv2d, by input",
)
def shifted_gradient() -> Any:
    import jax.numpy as jnp

    def change(_, __, gradients):
        return jnp.roll(gradients[0], 1, axis=1), gradients[1]

    return _at("block3/unit01/b/standardized_conv2d", CONV, _differentiated(change, 2))


@fault(
    "one convolution's gradient by its kernel flipped",
    "gradients",
    "resnet/",
    operation="block2/unit01/b/standardized_conv2d, by kernel",
)
def flipped_gradient() -> Any:
    def change(_, __, gradients):
        return gradients[0], gradients[1][::-1, ::-1]

    return _at("block2/unit01/b/standardized_conv2d", CONV, _differentiated(change, 2))


@fault(
    "gradient of a gamma without the statistics",
    "gradients",
    "resnet/",
    operation="block3/unit01/a/group_norm, by gamma",
)
def gamma_gradient() -> Any:
    def change(given, cotangent, gradients):
        x, gamma, beta = given
        by_gamma = (cotangent * (_norm(x, gamma, beta) > 0) * x).sum((0, 1, 2))
        return gradients[0], by_gamma.astype(gamma.dtype), gradients[2]

    return _at("block3/unit01/a/group_norm", NORM, _differentiated(change, 3))


@fault(
    "gradient of a beta without the sum over the width",
    "gradients",
    "resnet/",
    operation="block2/unit01/c/group_norm, by beta",
)
def beta_gradient() -> Any:
    def change(given, cotangent, gradients):
        by_beta = (cotangent * (_norm(*given) > 0)).sum((0, 1))[0]
        return *gradients[:2], by_beta.astype(given[2].dtype)

    return _at("block2/unit01/c/group_norm", NORM, _differentiated(change, 3))


@fault("one ReLU's gradient at all places", "gradients", "resnet/", operation="block2/unit01/b/relu, by input")
def relu_gradient() -> Any:
    import jax

    def change(given, cotangent, _):
        return jax.vjp(_norm, *given)[1](cotangent.astype(given[1].dtype))

    return _at("block2/unit01/b/group_norm", NORM, _differentiated(change, 3))


@fault(
    "the pool's gradient to the last place of each window",
    "gradients",
    "resnet/root_block",
    operation="root_block/pool, by input",
)
def pool_gradient() -> Any:
    def change(given, cotangent, _):
        height, width = cotangent.shape[1:3]
        zeros = given[0] * 0
        return (zeros.at[:, 2 : 2 * height + 1 : 2, 2 : 2 * width + 1 : 2].add(cotangent),)

    return _at("root_block", "bit_jax.model.resnetv2.max_pool", _differentiated(change, 1))


@fault(
    "one standardization's mean without gradient",
    "gradients",
    "resnet/",
    operation="block2/unit01/c/standardized_conv2d/standardization, by kernel",
)
def detached_mean() -> Any:
    import jax

    def change(_):
        def standardize(kernel, *_):
            centred = kernel - jax.lax.stop_gradient(kernel.mean((0, 1, 2), keepdims=True))
            return centred / (kernel.var((0, 1, 2), keepdims=True) + 1e-10) ** 0.5

        return standardize

    return _at("block2/unit01/c/standardized_conv2d", STANDARDIZE, change)


def _in_torch(place: str, change: Callable) -> Any:
    """Replaces the forward pass of one module of the PyTorch reference by change(module, forward, x)."""
    load = pkgutil.resolve_name("parity.in_torch.resnetv2.load")

    def changed(path, **constants):
        model = load(path, **constants)
        module = model.get_submodule(place)
        kind = type(module)
        forward = {"forward": lambda self, x: change(self, lambda x: kind.forward(self, x), x)}
        module.__class__ = type(kind.__name__, (kind,), forward)  # of its own, because the model is copied
        return model

    return mock.patch("parity.in_torch.resnetv2.load", changed)


@fault(
    "one norm's eps 1e-6, in PyTorch",
    "forward",
    "block2/unit01",
    framework="torch",
    operation="block2/unit01/b/group_norm/statistics, value",
)
def torch_one_eps() -> Any:
    functional = pkgutil.resolve_name("parity.in_torch.resnetv2.F")

    def change(module, _, x):
        return functional.group_norm(x, 32, module.gamma, module.beta, 1e-6)

    return _in_torch("block2.unit01.b.group_norm", change)


@fault(
    "one 3x3 convolution's gradient by its input a place off, in PyTorch",
    "gradients",
    "resnet/",
    framework="torch",
    operation="block3/unit01/b/standardized_conv2d, by input",
)
def torch_shifted_gradient() -> Any:
    def change(_, forward, x):
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.roll(1, 2))
        return forward(x)

    return _in_torch("block3.unit01.b.standardized_conv2d", change)
