"""The tasks of the ladder in PyTorch, for the reference or any other BiT; the counterpart of `in_jax/tasks.py`."""

import contextlib
import copy
import platform
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bit_jax.model import probe
from input_pipeline.examples import Source, Subset
from parity import faults
from parity.in_torch import devices, models, names, pipeline, resnetv2
from parity.sides import inputs
from parity.sides.classes import open_labelled
from parity.sides.fingerprint import fingerprint
from parity.sides.images import rgb
from parity.sides.inputs import Files
from parity.sides.side import Side
from parity.sides.tasks import Disturb, Result

# of parameters, images and the loss
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.float32,
    "fp16": torch.float32,
    "fp64": torch.float64,
}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of products, and of activations between layers
FIRST_SCALE = 2.0**16  # GradScaler's own
MOMENTUM_FROM_PARAMS = 0.1  # as on the JAX side


class TorchSide:
    def __init__(
        self,
        side: Side,
        precision: str,
        weight_file: str,
        progress: Callable[[int, int], None],
        *,
        rank: int,
        meeting: Path,
    ):
        self.side, self.precision, self.weight_file, self.progress = side, precision, weight_file, progress
        # float64, the gate, runs on the CPU whatever else there is
        on_gpu = torch.cuda.is_available() and precision != "fp64"
        self.devices = devices.Devices.join(side.devices, rank, meeting, gpu=on_gpu)
        self.device = self.devices.device
        multiply_in("tf32" if precision == "tf32" else "ieee")
        self._loaded: dict[str | None, tuple[nn.Module, dict[str, str]]] = {}
        self._fault: str | None = None

    def injected(self, fault: str | None) -> contextlib.AbstractContextManager[None]:
        self._fault = fault
        return faults.injected(fault)

    def model(self) -> tuple[nn.Module, dict[str, str]]:
        """The model and {parameter name: key in the file}."""
        if self._fault not in self._loaded:
            model = models.build(self.side, self.weight_file)
            keys = names.official_keys(model, _file(self.weight_file))
            self._loaded = {self._fault: (model.to(self.device, DTYPES[self.precision]), keys)}
        return self._loaded[self._fault]

    def attest(self, images: str, dataset: Sequence[Any] = ()) -> Result:
        model, keys = self.model()
        if self.side.model is not None:
            shown = pipeline.to_tensor(np.load(images)["image"][0, :2], DTYPES[self.precision])
            models.check(model, self.side.model, shown.to(self.device), self._classes())
        matrix, convolution = self._products()
        cuda = self.device.type == "cuda"
        norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        convolutions = [
            module for module in model.modules() if isinstance(module, nn.Conv2d) and hasattr(module, "eps")
        ]
        eps = resnetv2.NORM_EPS, resnetv2.STANDARDIZE_EPS, resnetv2.GROUPS
        if not isinstance(model, resnetv2.ResNetV2):
            eps = _one(norms, "eps"), _one(convolutions, "eps"), _one(norms, "num_groups")
        return {
            "framework": "torch",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "device": f"cuda: {torch.cuda.get_device_name(self.device)}" if cuda else "cpu: cpu",
            "topology": {"devices": self.devices.count, "threads": torch.get_num_threads()},
            "precision": self.precision,
            "matrix products": matrix,
            "convolution products": convolution,
            "group norm eps": eps[0],
            "standardization eps": eps[1],
            "groups": eps[2],
            "layout": "activations NCHW, kernels OIHW",
            "settings": {
                **{f"{name}.fp32_precision": backend.fp32_precision for name, backend in _multiplying().items()},
                "autocast": str(self.precision in AUTOCAST),
                "cudnn": str(torch.backends.cudnn.version()),
                "model": self.side.model or "parity.in_torch.resnetv2",
            },
            "architecture": f"{type(model).__module__}.{type(model).__qualname__}",
            "weights sha256": fingerprint(self._named(model, keys, lambda parameter: parameter)),
            "pictures sha256": fingerprint({"images": np.load(images)["image"]}),
        } | inputs.described(dataset), None

    def weights(self) -> Result:
        model, keys = self.model()
        return None, self._named(model, keys, lambda parameter: parameter)

    def pixels(self, files: Sequence[str], resize: int, crop: int, epochs: int, seed: int, draws: list[Any]) -> Result:
        source, saved = Files(files), {}
        for index in range(len(source)):
            example = source[index]
            image = rgb(example, source.name)
            views = {"evaluation": pipeline.evaluation(image, crop)}
            for epoch, of_epoch in enumerate(draws):
                views[f"train, epoch {epoch}"] = pipeline.train(image, resize, crop, *of_epoch[index])
            saved |= {
                f"{view}: {example['id']}": _nhwc(pipeline.to_tensor(pixels, DTYPES[self.precision]))
                for view, pixels in views.items()
            }
        return None, saved

    def forward(self, images: str, teacher: str | None = None, disturb: Disturb | None = None) -> Result:
        """Every unit's output; with a `teacher` file, of units that are each given the teacher's input."""
        model, keys = self.model()
        given = None
        if teacher is not None:
            with np.load(teacher) as file:
                given = {site: self._tensor(file[site]) for site in file.files if file[site].ndim == 4}
        batch = pipeline.to_tensor(np.load(images)["image"][0], DTYPES[self.precision])
        model, batch = self._disturbed_model(disturb), _disturbed(batch, "images", disturb).to(self.device)
        with torch.no_grad(), self._autocast():
            outputs = record_units(model, keys, batch, given)
        return None, {site: _nhwc(output) for site, output in outputs.items()}

    def mix(self, batches: str) -> Result:
        """Every batch after normalization and mixup, by the given weights."""
        classes = self._classes()
        saved = {}
        with np.load(batches) as file:
            image, label, weight = file["image"], file["label"], file["weight"]
        for number in range(len(label)):
            images = pipeline.to_tensor(image[number], DTYPES[self.precision])
            targets = F.one_hot(torch.from_numpy(label[number]).long(), classes).to(images.dtype)
            images, targets = (pipeline.mixup(rows, float(weight[number])) for rows in (images, targets))
            saved |= {f"images/{number}": _nhwc(images), f"targets/{number}": _nhwc(targets)}
        return None, saved

    def loss(self, mixed: str, disturb: Disturb | None = None) -> Result:
        model = self._replica(disturb)
        images, targets = self._mixed(mixed, 0, disturb)
        with torch.no_grad(), self._autocast():
            logits = self.devices.joined(model(images).to(targets.dtype))
        targets = self.devices.joined(targets)
        rows = F.cross_entropy(logits, targets, reduction="none")
        return None, {"loss of each row": _numpy(rows), "mean loss": _numpy(F.cross_entropy(logits, targets))}

    def gradients(self, mixed: str, count: int, disturb: Disturb | None = None, scale: float = FIRST_SCALE) -> Result:
        """Gradients of the mean loss by every parameter, for each of `count` batches. In float16 the loss is multiplied
        by `scale` and its gradients are divided by it; the answer says how many batches' gradients are not finite."""
        _, keys = self.model()
        model = self._replica(disturb)
        saved, overflows = {}, 0
        for number in range(count):
            model.zero_grad()
            loss = self._loss(model, *self._mixed(mixed, number, disturb))
            if self._scales_loss:
                (loss * scale).backward()
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad /= scale
            else:
                loss.backward()
            gradients = self._named(model, keys, lambda parameter: parameter.grad)
            saved |= {f"{number}/{key}": array for key, array in gradients.items()}
            overflows += not all(np.isfinite(array).all() for array in gradients.values())
            self.progress(number + 1, count)
        return {"overflows": overflows}, saved

    def optimizer(self, gradients: str, schedule: dict, momentum: float, step: int) -> Result:
        """Parameters and momentum after update number `step` with the first of the given gradients; the momentum
        before it is not zero."""
        _, keys = self.model()
        model = self._disturbed_model(None)
        sgd = torch.optim.SGD(model.parameters(), lr=learning_rate(schedule, step), momentum=momentum)
        with np.load(gradients) as file:
            for name, parameter in model.named_parameters():
                sgd.state[parameter]["momentum_buffer"] = MOMENTUM_FROM_PARAMS * parameter.detach().clone()
                given = torch.from_numpy(names.to_torch(file[f"0/{keys[name]}"])).reshape(parameter.shape)
                parameter.grad = given.to(parameter)
        sgd.step()
        params = self._named(model, keys, lambda parameter: parameter)
        after = self._named(model, keys, lambda parameter: sgd.state[parameter]["momentum_buffer"])
        named = {f"params/{key}": array for key, array in params.items()}
        return None, named | {f"momentum/{key}": array for key, array in after.items()}

    def curve(
        self,
        mixed: str,
        count: int,
        schedule: dict,
        momentum: float,
        disturb: Disturb | None = None,
        scale: float = FIRST_SCALE,
    ) -> Result:
        """The loss of each of `count` steps on the replayed batches, and the parameters after them; in float16 with
        GradScaler, from `scale` on. Says how many steps it skipped."""
        _, keys = self.model()
        model = self._replica(disturb)
        sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=momentum)
        scaler = self._scaler(scale)
        losses, overflows = [], 0
        for number in range(count):
            sgd.param_groups[0]["lr"] = learning_rate(schedule, number)
            before = scaler.get_scale()
            losses.append(self._step(model, sgd, scaler, *self._mixed(mixed, number, disturb)))
            overflows += scaler.get_scale() < before
            self.progress(number + 1, count)
        params = self._named(model, keys, lambda parameter: parameter)
        saved = {"losses": np.stack(losses)} | {f"params/{key}": array for key, array in params.items()}
        return {"overflows": overflows}, saved

    def accuracy(
        self,
        dataset: str,
        split: str,
        data_dir: str | None,
        class_names: Sequence[str] | None,
        size: int,
        batch: int,
        limit: int | None,
    ) -> Result:
        """Logits, label and number of every example of the split."""
        model, _ = self.model()
        source: Source = open_labelled(dataset, split, data_dir, class_names)
        if limit is not None:
            source = Subset(source, np.arange(min(limit, len(source))), f"{source.name} (first {limit})")
        logits, labels, indices = [], [], []
        for images, label, index in pipeline.evaluation_batches(source, size, batch, DTYPES[self.precision]):
            with torch.no_grad(), self._autocast():
                logits.append(_numpy(model(images.to(self.device)).to(images.dtype)))
            labels.append(label)
            indices.append(index)
            self.progress(int(index[-1]) + 1, len(source))
        saved = {
            "logits": np.concatenate(logits),
            "labels": np.concatenate(labels),
            "index": np.concatenate(indices),
        }
        ranks = pipeline.label_rank(torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"]).long())
        return {
            "correct1": int((ranks < 1).sum()),
            "correct5": int((ranks < 5).sum()),
            "seen": len(ranks),
            "examples": len(source),
        }, saved

    def _loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            logits = model(images)
        return F.cross_entropy(logits.to(targets.dtype), targets)

    def _step(
        self,
        model: nn.Module,
        sgd: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        images: Tensor,
        targets: Tensor,
    ) -> np.ndarray:
        """One update; the loss before it, of the whole batch."""
        sgd.zero_grad()
        loss = self._loss(model, images, targets)
        update(sgd, scaler, loss)
        return _numpy(self.devices.mean(loss))

    def _scaler(self, scale: float = FIRST_SCALE) -> torch.amp.GradScaler:
        """What float16 scales the loss by; in other precisions it passes everything on as it is."""
        return torch.amp.GradScaler(self.device.type, init_scale=scale, enabled=self._scales_loss)

    @property
    def _scales_loss(self) -> bool:
        return self.precision == "fp16"

    def _named(
        self, model: nn.Module, keys: dict[str, str], what: Callable[[nn.Parameter], Tensor | None]
    ) -> dict[str, np.ndarray]:
        """{key: array in the file's layout} of something that every parameter has; zeros where it has None."""
        named: dict[str, np.ndarray] = {}
        for name, parameter in devices.bare(model).named_parameters():
            tensor = what(parameter)
            array = _numpy(torch.zeros_like(parameter) if tensor is None else tensor)
            named[keys[name]] = np.array(names.to_official(array, keys[name]))  # the tensor may change
        return named

    def _tensor(self, nhwc: np.ndarray) -> Tensor:
        dtype = AUTOCAST.get(self.precision, DTYPES[self.precision])
        return torch.from_numpy(nhwc).permute(0, 3, 1, 2).contiguous().to(self.device, dtype)

    def _mixed(self, mixed: str, number: int, disturb: Disturb | None) -> tuple[Tensor, Tensor]:
        """This device's rows of a batch."""
        with np.load(mixed) as file:
            images, targets = (torch.from_numpy(file[f"{what}/{number}"]) for what in ("images", "targets"))
        images = _disturbed(images.permute(0, 3, 1, 2), f"images/{number}", disturb)
        images, targets = self.devices.own(images), self.devices.own(targets)
        return self._placed(images), targets.to(self.device, DTYPES[self.precision])

    def _placed(self, images: Tensor) -> Tensor:
        """NCHW images as this side's model wants them."""
        layout = torch.channels_last if self.side.channels_last else torch.contiguous_format
        return images.to(self.device, DTYPES[self.precision], memory_format=layout)

    def _classes(self) -> int:
        model, keys = self.model()
        return dict(model.named_parameters())[_name_of(keys, names.HEAD_KERNEL)].shape[0]

    def _disturbed_model(self, disturb: Disturb | None) -> nn.Module:
        """A copy of the model as the side runs it on one device, its parameters disturbed."""
        model, keys = self.model()
        model = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(_disturbed(parameter, keys[name], disturb))
        if self.side.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.side.compile and self.devices.count == 1:
            model.compile()
        return model

    def _replica(self, disturb: Disturb | None) -> nn.Module:
        """A copy of the model as the side runs it on all of its devices, its parameters disturbed."""
        replica = self.devices.replica(self._disturbed_model(disturb))
        if self.side.compile and self.devices.count > 1:
            replica.compile()  # from outside: its graph is then cut where gradients are exchanged meanwhile
        return replica

    def _autocast(self) -> contextlib.AbstractContextManager:
        narrow = AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, narrow, enabled=narrow is not None)

    def products(self) -> Result:
        """What a matrix product and a convolution multiply with."""
        return self._products(), None

    def _products(self) -> tuple[str, str]:
        dtype = DTYPES[self.precision]
        left, right = (torch.from_numpy(operand).to(self.device, dtype) for operand in probe.operands())
        with self._autocast():
            matrix = left @ right
            convolved = F.conv2d(left.T[None, :, :, None], right.T[:, :, None, None])[0, :, :, 0].T
        return probe.multiplied_in(_numpy(matrix)), probe.multiplied_in(_numpy(convolved))


def record_units(
    model: nn.Module, keys: dict[str, str], images: Tensor, teacher: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """{site: output} of the units that have a module of their own, and `logits`.

    With a teacher, {site: output} of another implementation, each unit is given what came before it there.
    """
    outputs: dict[str, Tensor] = {}
    units, sites = names.units(model, keys), names.sites(keys)
    given = {} if teacher is None else {after: teacher[site] for site, after in pairwise(sites) if site in teacher}

    def give(site: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            return (given[site],) if site in given else None

        return hook

    def keep(site: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            outputs[site] = output
            return teacher.get(site) if teacher is not None and site == sites[-1] else None

        return hook

    with contextlib.ExitStack() as hooks:
        for site, module in units.items():
            hooks.callback(module.register_forward_pre_hook(give(site)).remove)
            hooks.callback(module.register_forward_hook(keep(site)).remove)
        logits = model(images)
    return outputs | {"logits": logits}


def _multiplying() -> dict[str, Any]:
    """PyTorch's parts that have a `fp32_precision`, by name."""
    backends: Any = torch.backends
    return {
        "torch.backends": backends,
        "torch.backends.cuda.matmul": backends.cuda.matmul,
        "torch.backends.cudnn": backends.cudnn,
        "torch.backends.cudnn.conv": backends.cudnn.conv,
    }


def multiply_in(form: str) -> None:
    """What float32 products are computed in, `ieee` or `tf32`.

    Each part is told by itself: in PyTorch 2.11 cuDNN's convolutions stay in TF32, their default, when
    `torch.backends.fp32_precision` alone is set.
    """
    for backend in _multiplying().values():
        backend.fp32_precision = form


def update(sgd: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    """One update by the loss's gradient; none where the scaler is in use and the gradient is not finite."""
    scaler.scale(loss).backward()
    scaler.step(sgd)
    scaler.update()


def _disturbed(tensor: Tensor, name: str, disturb: Disturb | None) -> Tensor:
    """The tensor after the seed's disturbance. The two sides lay arrays out differently, so each value is disturbed by
    another factor of the same size, which is what matters."""
    if disturb is None:
        return tensor
    factor = torch.from_numpy(inputs.disturbance(name, tuple(tensor.shape), *disturb))
    return tensor * factor.to(tensor.device, tensor.dtype)


def learning_rate(schedule: dict, step: int) -> float:
    """Learning rate of update number `step`: linear warm-up from 0, then a tenth for each decay step that is passed."""
    if step < schedule["warmup_steps"]:
        return schedule["base_lr"] * step / schedule["warmup_steps"]
    return schedule["base_lr"] / 10 ** sum(step > decay for decay in schedule["decay_steps"])


def _file(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {f"resnet/{resnetv2.official(key).replace('.', '/')}": file[key] for key in file.files}


def _one(modules: list, attribute: str) -> Any:
    values = sorted({getattr(module, attribute) for module in modules})
    return values[0] if len(values) == 1 else values or "unknown"


def _name_of(keys: dict[str, str], wanted: str) -> str:
    return next(name for name, key in keys.items() if key == wanted)


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True)


def _nhwc(tensor: Tensor) -> np.ndarray:
    array = _numpy(tensor)
    if array.ndim == 3:
        return np.ascontiguousarray(array.transpose(1, 2, 0))
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array
