"""Updates of PyTorch's side: torch.optim.SGD and what may be added to it, of PyTorch's own pieces where it has any."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from parity.in_torch import devices


def freeze(model: nn.Module, keys: dict[str, str], pattern: str | None) -> None:
    """Lets no gradient reach the parameters that the pattern, a regular expression, does not name.

    Args:
        keys: {parameter name: key in the checkpoint}.
        pattern: it matches a run of whole parts of a key; None: every parameter trains.
    """
    if pattern is None:
        return
    for name, parameter in model.named_parameters():
        parts = keys[name].removeprefix("resnet/").split("/")
        runs = ["/".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
        parameter.requires_grad_(any(re.fullmatch(pattern, run) for run in runs))


class Updates:
    """Updates of a model by SGD with momentum.

    Attributes:
        sgd: the optimizer, of the parameters that train.
        ema: the model's exponential moving average, or None.
    """

    def __init__(self, model: nn.Module, keys: dict[str, str], momentum: float, additions: dict[str, Any]):
        """Makes the optimizer; `freeze` comes before.

        Args:
            model: the model, or a replica of it.
            keys: {parameter name: key in the checkpoint}.
            additions: fields of `Additions`.
        """
        self._model, self._keys = devices.unwrapped(model), keys
        self._clip_norm: float | None = additions.get("clip_norm")
        decay, kind = additions.get("weight_decay", 0.0), additions.get("weight_decay_kind", "coupled")
        self._decoupled: float = decay if kind == "decoupled" else 0.0
        groups: dict[float, list[nn.Parameter]] = {0.0: []}
        for name, parameter in self.training():
            coupled = decay if kind == "coupled" and keys[name].endswith("kernel") else 0.0
            groups.setdefault(coupled, []).append(parameter)
        groups = {coupled: params for coupled, params in groups.items() if params}
        self.sgd = torch.optim.SGD(
            [{"params": params, "weight_decay": coupled} for coupled, params in groups.items()],
            lr=0.0,
            momentum=momentum,
        )
        self.ema: AveragedModel | None = None
        if "ema" in additions:
            self.ema = AveragedModel(self._model, multi_avg_fn=get_ema_multi_avg_fn(additions["ema"]))
            self.ema.update_parameters(self._model)  # the first call copies: the average begins with the parameters

    def training(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, parameter) of the parameters that train."""
        return ((name, param) for name, param in self._model.named_parameters() if param.requires_grad)

    def averages(self) -> dict[str, Tensor]:
        """Returns {parameter name: its average} of the parameters that train; nothing if no average is kept."""
        if self.ema is None:
            return {}
        means = dict(self.ema.module.named_parameters())
        return {name: means[name] for name, _ in self.training()}

    def step(self, rate: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """Makes one update by the gradients that the parameters have, or none if the scaler finds one not finite.

        Args:
            rate: the learning rate.
            scaler: scaler of float16's loss, by which the gradients are multiplied.
        """
        scaler = scaler or torch.amp.GradScaler(enabled=False)
        kernels = [param for name, param in self.training() if self._keys[name].endswith("kernel")]
        before = [kernel.detach().clone() for kernel in kernels] if self._decoupled else []
        for group in self.sgd.param_groups:
            group["lr"] = rate
        if self._clip_norm is not None:
            scaler.unscale_(self.sgd)
            self._clip(self._clip_norm)
        scale = scaler.get_scale()
        scaler.step(self.sgd)
        scaler.update()
        if scaler.get_scale() < scale:
            return
        with torch.no_grad():
            for kernel, old in zip(kernels, before, strict=False):
                kernel.sub_(old, alpha=rate * self._decoupled)
        if self.ema is not None:
            self.ema.update_parameters(self._model)

    def _clip(self, largest: float) -> None:
        """Does what torch.nn.utils.clip_grad_norm_ does, with a norm of float64: PyTorch's sums of squares in float32
        err by 1e-5 on CPUs, which would be all that a comparison sees."""
        trained = [param for _, param in self.training()]
        norm = get_total_norm([param.grad.double() for param in trained if param.grad is not None])
        clip_grads_with_norm_(trained, largest, norm)
