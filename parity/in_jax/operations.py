"""Observes and feeds the operations of one site of a JAX model; see `sides/operations.py`."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bit_jax.formats import weights
from bit_jax.model import layers, resnetv2
from bit_jax.training import steps
from parity.sides.operations import STANDARDIZATION, Operation, Pass, Recording, fed_results

Arrays = dict[str, Any]
OBSERVED = (resnetv2.RootBlock, resnetv2.BottleneckUnit, layers.GroupNormRelu, layers.StdConv, resnetv2.HeadConv)


class Observed:
    """A model of which one site's operations are observed, on batches of one shape. What is asked again, on other
    parameters or another recording, is not traced again.

    Args:
        model: the model. What its backward pass would compute or gather again is kept instead, because nothing within
            such a part can be observed.
        site, ops: the site, and its operations.
        jit: function that compiles a function as the side does.
    """

    def __init__(
        self, model: resnetv2.ResNetV2, site: str, ops: dict[str, Operation], jit: Callable[[Callable], Callable]
    ):
        self._model = model.clone(remat="none", paced=False, gather=None)
        self._site, self._ops = site, ops
        self._dtype = layers.param_dtype(model.dtype)
        self._by_values = jit(jax.grad(self._loss, has_aux=True))
        self._by_inputs = jit(jax.grad(self._product, has_aux=True))
        self._fed: tuple[Arrays, Arrays] | None = None  # zeros and the shapes of values of a pass that is fed

    def record(self, params: Any, images: jax.Array, targets: jax.Array) -> Recording:
        """Returns every value of the site, and the gradient of the mean loss by it."""
        zeros, _ = self._shapes(params, images, None)
        gradients, values = self._by_values(zeros, params, images, targets)
        gradients = {name.removesuffix(", gradient"): array for name, array in self._arrays(gradients).items()}
        return Recording.of(self._ops, self._arrays(values), gradients)

    def _loss(self, zeros: Arrays, params: Any, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, Arrays]:
        logits, values = self._run(zeros, params, images, None)
        return steps.cross_entropy(logits, targets).mean(), values

    def feed(self, params: Any, images: jax.Array, recording: Recording) -> dict[str, np.ndarray]:
        """Returns what the operations make of the recorded values and gradients; see `fed_results`."""
        fed = {name: array.astype(self._dtype) for name, array in recording.values.items()}
        if self._fed is None:
            self._fed = self._shapes(params, images, fed)
        zeros, values = self._fed
        keys = [key for op in self._ops.values() for key in op.parameters.values()]
        own = {key: array for key, array in weights.flatten(params).items() if key in keys}
        silent = {name: np.zeros_like(array, self._dtype) for name, array in recording.gradients.items()}
        silent = {name: array for name, array in silent.items() if name in values}

        def run(incoming: dict[str, np.ndarray]) -> tuple[Any, Arrays]:
            whole = silent | {name: array.astype(self._dtype) for name, array in incoming.items()}
            return self._by_inputs((zeros, own), params, images, fed, whole)

        def backward(incoming: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            (by_zeros, by_own), _ = run(incoming)
            return self._arrays(by_zeros | by_own)

        return fed_results(self._ops, self._site, recording, self._arrays(run({})[1]), backward)

    def _product(
        self, wanted: tuple[Arrays, Arrays], rest: Any, images: jax.Array, fed: Arrays, incoming: Arrays
    ) -> tuple[jax.Array, Arrays]:
        zeros, own = wanted
        _, values = self._run(zeros, weights.unflatten(weights.flatten(rest) | own), images, fed)
        products = [(gradient * values[name].astype(self._dtype)).sum() for name, gradient in incoming.items()]
        return sum(products, start=jnp.zeros((), self._dtype)), values

    def _run(self, zeros: Arrays, params: Any, images: jax.Array, fed: Arrays | None) -> tuple[jax.Array, Arrays]:
        """Returns logits and {name: value} of a pass with these zeros added; see `Pass`."""
        return self._observed(lambda name, x: x + zeros[name] if name in zeros else x, params, images, fed)

    def _shapes(self, params: Any, images: jax.Array, fed: dict[str, np.ndarray] | None) -> tuple[Arrays, Arrays]:
        """Returns the zeros that a pass needs, and the shapes of its values."""
        zeros: Arrays = {}

        def noted(name: str, x: jax.Array) -> jax.Array:
            zeros[name] = np.zeros(x.shape, x.dtype)
            return x

        seen = jax.eval_shape(
            lambda params, images, fed: self._observed(noted, params, images, fed), params, images, fed
        )
        return zeros, seen[1]

    def _observed(
        self, zero: Callable[[str, Any], Any], params: Any, images: jax.Array, fed: Arrays | None
    ) -> tuple[jax.Array, Arrays]:
        def recorded(name: str, x: jax.Array) -> jax.Array:
            return fed[name].astype(x.dtype) if fed is not None and name in fed else x

        observed = Pass(self._site, self._ops, None if fed is None else recorded, zero)
        standardize, convolution = layers.standardize, ""

        def observe(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            nonlocal convolution
            module, name = context.module, "/".join(context.module.path)
            if not isinstance(module, OBSERVED) or (name not in self._ops and name != self._site):
                return call(*args, **kwargs)
            convolution = name
            y = call(observed.enter(name, args[0]), *args[1:], **kwargs)
            convolution = ""
            return observed.leave(name, y, active=isinstance(module, layers.GroupNormRelu))

        def observe_standardization(kernel: jax.Array, *eps: float | None) -> jax.Array:
            standard, name = standardize(kernel, *eps), f"{convolution}/{STANDARDIZATION}"
            return observed.leave(name, standard) if name in self._ops else standard

        with mock.patch.object(layers, "standardize", observe_standardization), nn.intercept_methods(observe):
            logits = steps.apply_model(self._model, params, images)
        return logits, observed.values

    def _arrays(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Returns arrays that an .npz can hold, which bfloat16 is not."""
        return {name: np.asarray(array, self._dtype) for name, array in arrays.items()}
