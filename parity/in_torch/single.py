"""Computes one operation by itself, by the very module of the model that computes it, and writes its program."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from parity.in_torch import operations, units
from parity.in_torch.arrays import to_numpy
from parity.in_torch.precision import Precision
from parity.in_torch.schedule import learning_rate
from parity.sides.operations import STANDARDIZATION, Pass
from parity.sides.operations import operations as operations_of


class Program(nn.Module):
    """A module that computes the results of one operation from its operands and a gradient.

    Attributes:
        operands, results: their names, in order.

    Args:
        question: the content of operation.json.
        precision: the precision to compute in.
        device: the device to compute on.
    """

    def __init__(self, question: dict[str, Any], precision: Precision, device: torch.device):
        super().__init__()
        self.operands: list[str] = question["operands"]
        self.results: list[str] = question["results"]
        self._kind, self._precision, self._device = question["kind"], precision, device

    def compute(self, operands: dict[str, np.ndarray], gradient: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {`value`, `by NAME` of each operand: array}."""
        given = self._given(operands, gradient)
        results = self(*given)
        return {name: to_numpy(result) for name, result in zip(self.results, results, strict=True)}

    def write(self, operands: dict[str, np.ndarray], gradient: np.ndarray, folder: Path) -> None:
        """Writes the program, its gradient included, as `torch.export` saves it."""
        given = self._given(operands, gradient)
        graph = make_fx(self)(*given)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        program = torch.export.export(graph, given)
        torch.export.save(program, folder / "torch_program.pt2")
        (folder / "torch_program.txt").write_text(str(program))

    def _given(self, operands: dict[str, np.ndarray], gradient: np.ndarray) -> tuple[Tensor, ...]:
        dtype = self._precision.param_dtype
        return tuple(torch.from_numpy(array).to(self._device, dtype) for array in (*operands.values(), gradient))


class Update(Program):
    """An update by SGD with momentum, of one parameter."""

    def __init__(self, question: dict[str, Any], precision: Precision, device: torch.device):
        super().__init__(question, precision, device)
        self._rate = learning_rate(question["schedule"], question["step"])
        self._momentum = question["momentum"]

    def forward(self, parameter: Tensor, buffer: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the parameter and the momentum after the update."""
        updated = parameter.clone()  # without a gradient of its own, so that the update can be exported
        sgd = torch.optim.SGD([updated], lr=self._rate, momentum=self._momentum)
        sgd.state[updated]["momentum_buffer"] = buffer.clone()
        updated.grad = gradient.clone()
        sgd.step()
        return updated.detach(), sgd.state[updated]["momentum_buffer"]


class Single(Program):
    """One operation of a model, computed by the model's module.

    Args:
        model: a BiT.
        keys: {parameter name: key in the checkpoint}.
        question: the content of operation.json; a norm includes its ReLU.
        precision: the precision to compute in.
        device: the device to compute on.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: dict[str, str],
        question: dict[str, Any],
        precision: Precision,
        device: torch.device,
    ):
        super().__init__(question, precision, device)
        ops = operations_of(question["site"], keys.values())
        held = operations.modules(model, keys, ops) | units.units(model, keys)
        self._place = question["name"].removesuffix(f"/{STANDARDIZATION}").removesuffix("/pool")
        self.module = held[self._place]
        self._conv = held.get("root_block/standardized_conv2d")
        name = next(name for name, module in model.named_modules() if module is self.module)
        self._local = {  # {name of the operand: parameter of the module}
            key.rpartition("/")[2]: parameter.removeprefix(f"{name}.")
            for parameter, key in keys.items()
            if parameter.startswith(f"{name}.")
        }
        self._shapes = {operand: self.module.get_parameter(local).ndim for operand, local in self._local.items()}
        self._site, self._ops = question["site"], ops

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Returns the value and the gradient by each operand.

        Args:
            given: the operands in the order of `operands`, NHWC and HWIO, and the gradient by the result.
        """
        *operands, gradient = (tensor.detach() for tensor in given)
        named = {name: tensor.requires_grad_() for name, tensor in zip(self.operands, operands, strict=True)}
        value = self._value(named).to(gradient.dtype)
        return value.detach(), *torch.autograd.grad(value, list(named.values()), gradient)

    def _value(self, operands: dict[str, Tensor]) -> Tensor:
        """Returns the result, NHWC or HWIO."""
        with self._precision.autocast(self._device):
            if self._kind == "pool":
                return self._pool(operands["input"])
            if self._kind in ("convolution", "standardization"):
                return self._convolved(operands)
            x = operands["input"]
            if self._kind == "head":
                channels_last = self._shapes["kernel"] == 4
                return self._called(operands, x[:, :, None, None] if channels_last else x).flatten(1)
            y = self._called(operands, self._activation(x))
            return F.relu(y).permute(0, 2, 3, 1)

    def _convolved(self, operands: dict[str, Tensor]) -> Tensor:
        """Returns the convolution with a kernel that is standardized already, or the standardized kernel."""
        kernel = operands["kernel"].permute(3, 2, 0, 1)
        standard = f"{self._place}/{STANDARDIZATION}"
        alone = self._kind == "standardization"
        x = operands["kernel"].new_zeros(1, *kernel.shape[1:]) if alone else self._activation(operands["input"])

        def fed(name: str, own: Tensor) -> Tensor:
            return own if alone else kernel.to(own.dtype)

        observed = Pass(self._site, self._ops, fed, lambda name, tensor: tensor)
        functions = operations.Functions(observed, self._ops)
        functions.entered(self._place, self.module)
        with functions:
            y = self._called({"kernel": operands["kernel"]}, x)
        return observed.values[standard].permute(2, 3, 1, 0) if alone else y.permute(0, 2, 3, 1)

    def _pool(self, x: Tensor) -> Tensor:
        """Returns what the root makes of its convolution's result."""
        assert self._conv is not None
        result = self._activation(x)
        hook = self._conv.register_forward_hook(lambda module, args, output: result)
        try:
            parameter = next(self.module.parameters())
            return self.module(parameter.new_zeros(len(x), 3, 2 * x.shape[1], 2 * x.shape[2])).permute(0, 2, 3, 1)
        finally:
            hook.remove()

    def _called(self, operands: dict[str, Tensor], x: Tensor) -> Tensor:
        """Returns what the module returns for x with these parameters."""
        params = {}
        for operand, local in self._local.items():
            tensor = operands[operand]
            if tensor.ndim == 4:
                tensor = tensor.permute(3, 2, 0, 1)
            params[local] = tensor[:, :, 0, 0] if self._shapes[operand] == 2 else tensor
        return torch.func.functional_call(self.module, params, (x,))

    def _activation(self, x: Tensor) -> Tensor:
        """Returns a value between layers as this side has it: NCHW, in the precision's dtype."""
        return x.permute(0, 3, 1, 2).contiguous().to(self._precision.dtype)
