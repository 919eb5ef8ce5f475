"""The tasks of the ladder in PyTorch that train: gradients, one update, and a curve of steps; the counterpart of
`in_jax/training_tasks.py`."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from parity.in_torch import devices, resnetv2
from parity.in_torch.arrays import to_numpy, to_official
from parity.in_torch.precision import FIRST_SCALE
from parity.in_torch.schedule import learning_rate
from parity.in_torch.tasks import Added, TorchSide, disturbed, named_arrays
from parity.in_torch.updates import Updates
from parity.sides.tasks import Disturb, Result

MOMENTUM_FROM_PARAMS, EMA_FROM_PARAMS = 0.1, 0.8  # as in in_jax/training_tasks.py


class TrainingTorch(TorchSide):
    """A `TorchSide` with the tasks that train."""

    def gradients(
        self,
        mixed: str,
        count: int,
        disturb: Disturb | None = None,
        scale: float = FIRST_SCALE,
        additions: Added = None,
    ) -> Result:
        """Returns the gradient by every parameter that trains of each batch's mean loss, and {"overflows": number of
        batches with gradients that are not finite}. In float16 the loss is multiplied by `scale` and its gradients are
        divided by it."""
        _, keys = self.model()
        added = additions or {}
        model = self._replica(disturb, added.get("train"))
        saved, overflows = {}, 0
        for number in range(count):
            model.zero_grad()
            loss = self._loss(model, *self._mixed(mixed, number, disturb), added.get("label_smoothing", 0.0))
            if self.precision.scales_loss:
                (loss * scale).backward()
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= scale
            else:
                loss.backward()
            named = named_arrays(model, keys, lambda parameter: parameter.grad, f"{number}/", training=True)
            saved |= named
            overflows += not all(np.isfinite(array).all() for array in named.values())
            self.progress(number + 1, count)
        return {"overflows": overflows}, saved

    def optimizer(
        self,
        gradients: str,
        schedule: dict,
        momentum: float,
        step: int,
        start: str | None = None,
        additions: Added = None,
    ) -> Result:
        """Returns parameters, momentum and average, if one is kept, after update number `step` with the first batch's
        gradients. The momentum and the average before it are those of the file `start`, or `MOMENTUM_FROM_PARAMS` and
        `EMA_FROM_PARAMS` times the parameters, so that neither is zero or the parameters themselves."""
        _, keys = self.model()
        added = additions or {}
        model = self._disturbed_model(None, added.get("train"))
        updates = Updates(model, keys, momentum, added)
        for _, parameter in updates.training():
            updates.sgd.state[parameter]["momentum_buffer"] = MOMENTUM_FROM_PARAMS * parameter.detach().clone()
        for mean in updates.averages().values():
            mean.detach().mul_(EMA_FROM_PARAMS)
        if start is not None:
            _continue_from(start, model, keys, updates)
        for parameter, gradient in _read(gradients, "0/", model, keys, training=True):
            parameter.grad = gradient
        updates.step(learning_rate(schedule, step))
        return None, named_arrays(model, keys, prefix="params/") | _state(model, keys, updates)

    def curve(
        self,
        mixed: str,
        count: int,
        schedule: dict,
        momentum: float,
        disturb: Disturb | None = None,
        scale: float = FIRST_SCALE,
        start: str | None = None,
        step: int = 0,
        additions: Added = None,
    ) -> Result:
        """Returns the loss of each of `count` training steps on the file's batches, the parameters and the average, if
        one is kept, after them, and {"overflows": number of skipped steps}. In float16 GradScaler scales the loss, by
        `scale` at first.

        With `start`, a file of the state after `step` steps, training goes on from there, and the momentum after the
        steps is returned too. A disturbance is then of the parameters that each step's gradients are taken at, and not
        of the state; it is the same in all steps, because parameters that hardly change are rounded alike.
        """
        _, keys = self.model()
        added = additions or {}
        model = self._replica(disturb if start is None else None, added.get("train"))
        if start is not None:
            with torch.no_grad():
                for parameter, values in _read(start, "params/", model, keys):
                    parameter.copy_(values)
        updates = Updates(model, keys, momentum, added)
        if start is not None:
            _continue_from(start, model, keys, updates)
        scaler = self._scaler(scale)
        losses, overflows = [], 0
        for number in range(count):
            before = scaler.get_scale()
            updates.sgd.zero_grad()
            with _at_disturbed(model, keys, disturb if start is not None else None):
                batch = self._mixed(mixed, number, disturb)
                loss = self._loss(model, *batch, added.get("label_smoothing", 0.0))
                scaler.scale(loss).backward()
            updates.step(learning_rate(schedule, step + number), scaler)
            losses.append(to_numpy(self.devices.mean(loss)))
            overflows += scaler.get_scale() < before
            self.progress(number + 1, count)
        ended = named_arrays(model, keys, prefix="params/") | _state(model, keys, updates, momentum=start is not None)
        return {"overflows": overflows}, {"losses": np.stack(losses)} | ended

    def _scaler(self, scale: float = FIRST_SCALE) -> torch.amp.GradScaler:
        """Returns the scaler of float16's loss; in other precisions it changes nothing."""
        return torch.amp.GradScaler(self.device.type, init_scale=scale, enabled=self.precision.scales_loss)


def update(sgd: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    """Makes one update by the gradient of the loss, or none if the scaler is enabled and a gradient is not finite."""
    scaler.scale(loss).backward()
    scaler.step(sgd)
    scaler.update()


def _read(
    path: str, prefix: str, model: nn.Module, keys: dict[str, str], *, training: bool = False
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yields each parameter, or each that trains, with the file's array of that prefix and the parameter's key, in the
    parameter's shape."""
    with np.load(path) as file:
        for name, parameter in devices.unwrapped(model).named_parameters():
            if training and not parameter.requires_grad:
                continue
            tensor = torch.from_numpy(resnetv2.to_torch(file[prefix + keys[name]]))
            yield parameter, tensor.reshape(parameter.shape).to(parameter)  # a dense head has two axes


def _continue_from(start: str, model: nn.Module, keys: dict[str, str], updates: Updates) -> None:
    """Gives the optimizer the momentum and the average of a state's file."""
    for parameter, momentums in _read(start, "momentum/", model, keys, training=True):
        updates.sgd.state[parameter]["momentum_buffer"] = momentums
    means = updates.averages()
    if means:
        names = [name for name, _ in updates.training()]
        for name, (_, values) in zip(names, _read(start, "ema/", model, keys, training=True), strict=True):
            means[name].detach().copy_(values)


@contextlib.contextmanager
def _at_disturbed(model: nn.Module, keys: dict[str, str], disturb: Disturb | None) -> Iterator[None]:
    """Has disturbed parameters in the model while the `with` block runs."""
    if disturb is None:
        yield
        return
    named = list(devices.unwrapped(model).named_parameters())
    kept = [parameter.detach().clone() for _, parameter in named]
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(disturbed(parameter, keys[name], disturb))
    yield
    with torch.no_grad():
        for (_, parameter), values in zip(named, kept, strict=True):
            parameter.copy_(values)


def _state(model: nn.Module, keys: dict[str, str], updates: Updates, *, momentum: bool = True) -> dict[str, np.ndarray]:
    """Returns the momentum, if that is asked for, and the average, if one is kept, of the parameters that train."""

    def held(parameter: nn.Parameter) -> Tensor | None:
        return updates.sgd.state[parameter].get("momentum_buffer")  # none before the first update that is made

    named = named_arrays(model, keys, held, "momentum/", training=True) if momentum else {}
    means = {keys[name]: to_numpy(mean) for name, mean in updates.averages().items()}
    averages = {f"ema/{key}": np.array(to_official(mean, key)) for key, mean in means.items()}
    return named | averages
