"""Computes one operation by itself, by the very module of the model that computes it, and writes its program."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from bit_jax.model import layers, resnetv2
from bit_jax.training import optimizer, steps
from bit_jax.training.hyperrule import Schedule
from parity.sides.operations import Operation

Arrays = dict[str, Any]


class At(nn.Module):
    """A module at a path of a model, and nothing else of the model.

    Attributes:
        place: names of the modules that lead there, and its own.
        make: function (name) -> the module.
    """

    place: tuple[str, ...]
    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        first, *rest = self.place
        if not rest:
            return self.make(name=first)(x)
        return At(tuple(rest), self.make, name=first)(x)


class Single:
    """One operation of a model, computed by the model's module.

    Args:
        model: the model.
        params, images: its parameters, and the shape of a batch.
        op: the operation.
        kind: its kind, see `script.py`.
    """

    def __init__(self, model: resnetv2.ResNetV2, params: Any, images: jax.ShapeDtypeStruct, op: Operation, kind: str):
        self._op, self._kind, self._dtype = op, kind, model.dtype
        place = op.name.removesuffix("/standardization").removesuffix("/pool")
        self._path = tuple(place.split("/"))
        self._module = _module(model, params, images, self._path)

    def compute(self, operands: Arrays, gradient: jax.Array) -> Arrays:
        """Returns {`value`, `by NAME` of each operand: array}; differentiable, and compiled by the caller."""
        value, backward = jax.vjp(lambda operands: self._value(operands).astype(gradient.dtype), operands)
        return {"value": value} | {f"by {name}": array for name, array in backward(gradient)[0].items()}

    def _value(self, operands: Arrays) -> Any:
        if self._kind == "pool":
            return self._pool(operands["input"])
        settings, params = {}, dict(operands)
        if "kernel" in operands:
            classes = "num_classes" if self._kind == "head" else "features"
            settings = {classes: operands["kernel"].shape[-1]}
        x = params.pop("input", None)
        if self._kind == "standardization":
            size, _, channels, _ = operands["kernel"].shape
            x = jnp.zeros((1, size, size, channels))
        if self._kind != "head":
            x = x.astype(self._dtype)
        standardize, standard = layers.standardize, []

        def observed(kernel: jax.Array, *eps: float | None) -> jax.Array:
            # the kernel that a convolution is given here is standardized already
            standard.append(kernel if self._kind == "convolution" else standardize(kernel, *eps))
            return standard[-1]

        make = functools.partial(type(self._module), **(_settings(self._module) | settings))
        nested = functools.reduce(lambda inner, name: {name: inner}, reversed(self._path), params)
        with mock.patch.object(layers, "standardize", observed):
            y = At(self._path, make).apply({"params": nested}, x)
        return standard[0] if self._kind == "standardization" else y

    def _pool(self, x: jax.Array) -> Any:
        """Returns what the root makes of its convolution's result."""
        make = functools.partial(type(self._module), **_settings(self._module) | {"channels": x.shape[-1]})
        images = jnp.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2], 3), self._dtype)
        kernel = jnp.zeros((7, 7, 3, x.shape[-1]), x.dtype)
        params = {"root_block": {"standardized_conv2d": {"kernel": kernel}}}

        def replaced(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            return x.astype(self._dtype) if isinstance(context.module, layers.StdConv) else call(*args, **kwargs)

        with nn.intercept_methods(replaced):
            # initialized kernels would be drawn; these are given, and not used
            return At(self._path, make).apply({"params": params}, images)


def update(question: dict[str, Any]) -> Callable[[Arrays, jax.Array], Arrays]:
    """Returns a function (parameter and momentum, gradient) -> both after the update that the question describes."""
    fields = question["schedule"] | {"decay_steps": tuple(question["schedule"]["decay_steps"])}
    sgd = optimizer.sgd(Schedule(**fields), question["momentum"])

    def compute(operands: Arrays, gradient: jax.Array) -> Arrays:
        params = {"parameter": operands["parameter"]}
        state, count = steps.init_state(params, sgd), jnp.asarray(question["step"], jnp.int32)
        trace = {"parameter": operands["buffer"]}
        opt_state: Any = optax.tree_utils.tree_set(state.opt_state, trace=trace, count=count)
        state = steps.update(state.replace(step=count, opt_state=opt_state), {"parameter": gradient}, sgd)
        held = optax.tree_utils.tree_get(state.opt_state, "trace")
        return {"value": state.params["parameter"], "momentum": held["parameter"]}

    return compute


def write(
    compute: Callable,
    jit: Callable[[Callable], Any],
    results: Sequence[str],
    operands: Arrays,
    gradient: np.ndarray,
    folder: Path,
) -> None:
    """Writes the program of a function (operands, gradient) -> {name: result} as StableHLO, in text and to be run, and
    as the compiler optimized it, when `jit` compiles it."""
    names = list(operands)

    def listed(*given: jax.Array) -> tuple[jax.Array, ...]:
        computed = compute(dict(zip(names, given[:-1], strict=True)), given[-1])
        return tuple(computed[name] for name in results)

    given = (*operands.values(), gradient)
    exported = export.export(jax.jit(listed))(*given)
    (folder / "jax_program.bin").write_bytes(exported.serialize())
    (folder / "jax_program.mlir").write_text(exported.mlir_module())
    (folder / "jax_program.hlo").write_text(jit(listed).lower(*given).compile().as_text() or "")


def _settings(module: nn.Module) -> dict[str, Any]:
    """Returns the attributes that a module is made with."""
    fields = [field.name for field in dataclasses.fields(module) if field.init]
    return {name: getattr(module, name) for name in fields if name not in ("parent", "name")}


def _module(model: resnetv2.ResNetV2, params: Any, images: jax.ShapeDtypeStruct, path: tuple[str, ...]) -> nn.Module:
    """Returns the model's module of that path, as it is made when the model runs."""
    found: list[nn.Module] = []

    def find(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.module.path == path:
            found.append(context.module)
        return call(*args, **kwargs)

    plain = model.clone(remat="none", paced=False, gather=None)
    with nn.intercept_methods(find):
        jax.eval_shape(lambda params, images: steps.apply_model(plain, params, images), params, images)
    return found[0]
