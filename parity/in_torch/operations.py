"""Observes and feeds the operations of one site of a PyTorch model; see `sides/operations.py`.

Operations are found by the parameters that their modules hold, so that a model needs no particular names. Two are found
by the function that a module calls: standardization, as the kernel that a convolution is given, and the ReLU behind a
norm.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.in_torch import units
from parity.in_torch.arrays import to_nhwc, to_numpy, to_official
from parity.in_torch.resnetv2 import to_torch
from parity.sides.operations import NORM, STANDARDIZATION, Operation, Pass, Recording, fed_results

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
CONVOLUTIONS = (F.conv2d, torch.conv2d)
PLAIN = ("pooling", "head/conv2d")  # values without places, which modules may keep two axes of size 1 for


class Observed:
    """A model on one batch, of which one site's operations are observed.

    Args:
        model: a BiT, whose parameters may be given zeros.
        keys: {parameter name: key in the checkpoint}.
        site, ops: the site, and its operations.
        run: function (model) -> mean loss of the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: dict[str, str],
        site: str,
        ops: dict[str, Operation],
        run: Callable[[nn.Module], Tensor],
    ):
        self._model, self._keys, self._site, self._ops, self._run = model, keys, site, ops, run
        self._modules = modules(model, keys, ops)
        if site_module := units.units(model, keys).get(site):
            self._modules[site] = site_module

    def record(self) -> Recording:
        """Returns every value of the site, and the gradient of the mean loss by it."""
        loss, values, zeros = self._observed(None)
        gradients = self._gradients(loss, zeros)
        gradients = {name.removesuffix(", gradient"): array for name, array in gradients.items()}
        return Recording.of(self._ops, _official(values), gradients)

    def feed(self, recording: Recording) -> dict[str, np.ndarray]:
        """Returns what the operations make of the recorded values and gradients; see `fed_results`."""
        of_key = {self._keys[name]: parameter for name, parameter in self._model.named_parameters()}
        own = {key: of_key[key].requires_grad_() for op in self._ops.values() for key in op.parameters.values()}
        _, values, zeros = self._observed(recording.values)

        def backward(incoming: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            products = []
            for name, gradient in incoming.items():
                value = values[name]
                value = value if value.dtype == torch.float64 else value.float()
                products.append((value * _like(name, gradient, value)).sum())
            return self._gradients(torch.stack(products).sum(), zeros | own)

        return fed_results(self._ops, self._site, recording, _official(values), backward)

    def _gradients(self, loss: Tensor, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Returns the gradient by each of the tensors, zeros where there is none."""
        found = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True, allow_unused=True)
        filled = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(tensors.values(), found, strict=True)
        ]
        return _official(dict(zip(tensors, filled, strict=True)))

    def _observed(self, fed: dict[str, np.ndarray] | None) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Returns the loss of a pass, its values, and the zeros that were added; see `Pass`."""
        zeros: dict[str, Tensor] = {}

        def zero(name: str, x: Tensor) -> Tensor:
            zeros[name] = torch.zeros_like(x, requires_grad=True)
            return x + zeros[name]

        def recorded(name: str, x: Tensor) -> Tensor:
            return _like(name, fed[name], x) if fed is not None and name in fed else x

        observed = Pass(self._site, self._ops, None if fed is None else recorded, zero)
        functions = Functions(observed, self._ops)

        def enter(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                functions.entered(name, module)
                return observed.enter(name, args[0]), *args[1:]

            return hook

        def leave(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                # a norm's results are as often negative as not, unless its module includes the ReLU
                active = name.endswith(NORM) and bool((output >= 0).all())
                functions.left(name, active=active)
                return observed.leave(name, output, active=active)

            return hook

        with contextlib.ExitStack() as stack:
            for name, module in self._modules.items():
                stack.callback(module.register_forward_pre_hook(enter(name)).remove)
                stack.callback(module.register_forward_hook(leave(name)).remove)
            stack.enter_context(functions)
            loss = self._run(self._model)
        return loss, observed.values, zeros


class Functions(TorchFunctionMode):
    """Observes the functions that modules call: the ReLU behind a norm, and a convolution's standardized kernel."""

    def __init__(self, observed: Pass, ops: dict[str, Operation]):
        super().__init__()
        self._observed, self._ops = observed, ops
        self._convolution = self._norm = ""
        self._held: list[nn.Parameter] = []

    def entered(self, name: str, module: nn.Module) -> None:
        self._convolution, self._held = name, list(module.parameters(recurse=False))

    def left(self, name: str, *, active: bool) -> None:
        self._convolution, self._norm = "", name if name.endswith(NORM) and not active else ""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result_of, kwargs = func, kwargs or {}
        standard = f"{self._convolution}/{STANDARDIZATION}"
        if func in CONVOLUTIONS and standard in self._ops and len(args) > 1:
            if not any(args[1] is parameter for parameter in self._held):
                args = (args[0], self._observed.leave(standard, args[1]), *args[2:])
        elif func in RELUS and self._norm:
            relu, self._norm = f"{self._norm.removesuffix(NORM)}relu", ""
            return self._observed.leave(relu, result_of(*args, **kwargs))
        return result_of(*args, **kwargs)


def modules(model: nn.Module, keys: dict[str, str], ops: dict[str, Operation]) -> dict[str, nn.Module]:
    """Returns {operation: module} of the operations with parameters: the innermost module that holds these and no
    others.

    Args:
        model: a BiT.
        keys: {parameter name: key in the checkpoint}.
        ops: operations of a site.
    """
    found = {}
    for op in ops.values():
        wanted = {name for name, key in keys.items() if key in op.parameters.values()}
        for name, module in model.named_modules() if wanted else ():
            if name and {parameter for parameter in keys if parameter.startswith(f"{name}.")} == wanted:
                found[op.name.removesuffix(f"/{STANDARDIZATION}")] = module
    return found


def _official(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Returns values, and gradients by them or by parameters, in the checkpoint's layout."""
    return {name: _array(name, tensor) for name, tensor in tensors.items()}


def _array(name: str, tensor: Tensor) -> np.ndarray:
    value, array = name.partition(", ")[0], to_numpy(tensor)
    if value.startswith("resnet/") or value.endswith(STANDARDIZATION):
        return np.array(to_official(array, value))
    return array.reshape(len(array), -1) if value in PLAIN else to_nhwc(tensor)


def _like(name: str, array: np.ndarray, x: Tensor) -> Tensor:
    """Returns a recorded value or gradient in the layout, dtype and memory format of this side's value x."""
    if name.endswith(STANDARDIZATION):
        array = to_torch(array)
    elif array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(np.ascontiguousarray(array)).reshape(x.shape)
    return torch.empty_like(x, requires_grad=False).copy_(tensor)
