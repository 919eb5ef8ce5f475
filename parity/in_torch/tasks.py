"""The tasks of the ladder in PyTorch, for the reference or any other BiT; the counterpart of `in_jax/tasks.py`."""

import contextlib
import copy
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from parity import faults
from parity.in_torch import devices, models, names, operations, pipeline, resnetv2, script, single, units
from parity.in_torch.arrays import HEAD_KERNEL, to_nhwc, to_numpy, to_official
from parity.in_torch.precision import FIRST_SCALE, choose, float32_settings, products
from parity.in_torch.schedule import learning_rate
from parity.in_torch.updates import Updates, freeze
from parity.sides import inputs
from parity.sides.classes import open_labelled
from parity.sides.fingerprint import fingerprint
from parity.sides.images import rgb
from parity.sides.inputs import Files
from parity.sides.operations import Recording
from parity.sides.operations import operations as operations_of
from parity.sides.side import Side
from parity.sides.tasks import Disturb, Result

MOMENTUM_FROM_PARAMS, EMA_FROM_PARAMS = 0.1, 0.8  # as in in_jax/tasks.py
Added = dict[str, Any] | None  # fields of `Additions`; None: all of them are off


class TorchSide:
    """A weight file's model in PyTorch, and the tasks of `sides/tasks.py` that compute with it.

    Attributes:
        side, precision: the side and the precision to compute in.
        weight_file: path of an official `.npz`.
        progress: function (number done, number in all) -> None; tasks call it after each batch.
        devices: this process among those of its side.
        device: this process's device.
        dtype: dtype of parameters, images and the loss.
    """

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
        self.precision = choose(precision)
        torch.use_deterministic_algorithms(side.deterministic)
        self.side, self.weight_file, self.progress = side, weight_file, progress
        # float64, which decides what is right, runs on the CPU even if there is a GPU, unless that is asked for
        on_gpu = torch.cuda.is_available() and (precision != "fp64" or side.device64)
        self.devices = devices.Devices.join(side.devices, rank, meeting, gpu=on_gpu)
        self.device = self.devices.device
        self.dtype = self.precision.param_dtype
        self._loaded: dict[str | None, tuple[nn.Module, dict[str, str]]] = {}
        self._fault: str | None = None

    def injected(self, fault: str | None) -> contextlib.AbstractContextManager[None]:
        """Has the fault of that name while the `with` block runs; None: no fault."""
        self._fault = fault
        return faults.injected(fault)

    def model(self) -> tuple[nn.Module, dict[str, str]]:
        """Returns the model, with the fault if there is one, and {parameter name: key in the checkpoint}."""
        if self._fault not in self._loaded:
            model = models.build(self.side, self.weight_file)
            keys = names.official_keys(model, models.checkpoint(self.weight_file))
            self._loaded = {self._fault: (model.to(self.device, self.dtype), keys)}
        return self._loaded[self._fault]

    def attest(self, images: str, dataset: Sequence[Any] = (), *, program: bool = False) -> Result:
        """Describes what computes here: versions, device, precision and constants, and hashes of weights and data.

        Args:
            program: not used: PyTorch has no optimized program to hash.

        Raises:
            RequestError: the model is not this project's and fails on the images, or its logits are misshapen.
        """
        model, keys = self.model()
        if self.side.model is not None:
            batch = pipeline.to_tensor(np.load(images)["image"][0, :2], self.dtype)
            models.check(model, self.side.model, batch.to(self.device), self._classes())
        matrix, convolution = products(self.precision, self.device)
        on_gpu = self.device.type == "cuda"
        norm_eps, standardize_eps, groups = models.constants(model)
        return {
            "framework": "torch",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "device": f"cuda: {torch.cuda.get_device_name(self.device)}" if on_gpu else "cpu: cpu",
            "topology": {"devices": self.devices.count, "threads": torch.get_num_threads()},
            "precision": self.precision.name,
            "matrix products": matrix,
            "convolution products": convolution,
            "group norm eps": norm_eps,
            "standardization eps": standardize_eps,
            "groups": groups,
            "layout": "activations NCHW, kernels OIHW",
            "settings": {
                **float32_settings(),
                "autocast": str(self.precision.autocasts),
                "cudnn": str(torch.backends.cudnn.version()),
                "model": self.side.model or "parity.in_torch.resnetv2",
            },
            "architecture": f"{type(model).__module__}.{type(model).__qualname__}",
            "weights sha256": fingerprint(_named(model, keys)),
            "pictures sha256": fingerprint({"images": np.load(images)["image"]}),
        } | inputs.described(dataset), None

    def products(self) -> Result:
        """Returns the precisions in which a matrix product and a convolution are really computed."""
        return products(self.precision, self.device), None

    def weights(self) -> Result:
        """Returns every array of the weight file, as the model holds it."""
        return None, _named(*self.model())

    def pixels(
        self,
        files: Sequence[str],
        resize: int,
        crop: int,
        epochs: int,
        seed: int,
        draws: list[Any],
        crop_style: str = "bit",
    ) -> Result:
        """Returns each image file as evaluation and as each epoch of training show it, normalized.

        Args:
            files: paths of image files.
            resize, crop: sides in pixels of the images that training crops, and of the views.
            epochs, seed: not used: JAX's loader draws by them, and here the draws are given.
            draws: (top, left, mirrored) for [epoch][file], or of a crop of another style `Box`'s fields.
            crop_style: `bit` or `inception`.
        """
        source, saved = Files(files), {}
        sides = (crop,) if crop_style == "inception" else (resize, crop)
        train: Callable[..., np.ndarray] = pipeline.train_inception if crop_style == "inception" else pipeline.train
        for index in range(len(source)):
            example = source[index]
            image = rgb(example, source.name)
            views = {"evaluation": pipeline.evaluation(image, crop)}
            for epoch, windows in enumerate(draws):
                views[f"train, epoch {epoch}"] = train(image, *sides, *windows[index])
            saved |= {
                f"{view}: {example['id']}": to_nhwc(pipeline.to_tensor(pixels, self.dtype))
                for view, pixels in views.items()
            }
        return None, saved

    def forward(self, images: str, teacher: str | None = None, disturb: Disturb | None = None) -> Result:
        """Returns every unit's output and the logits, for the first batch of a file of pictures or of a mixed one.

        With a `teacher`, a file that another side returned, each unit computes on what the unit before it returned
        there.
        """
        _, keys = self.model()
        teacher_outputs = None
        if teacher is not None:
            with np.load(teacher) as file:
                teacher_outputs = {site: self._unit_input(file[site]) for site in file.files if file[site].ndim == 4}
        with np.load(images) as file:
            if "image" in file:
                batch = pipeline.to_tensor(file["image"][0], self.dtype)
            else:
                batch = torch.from_numpy(file["images/0"]).to(self.dtype).permute(0, 3, 1, 2).contiguous()
        model, batch = self._disturbed_model(disturb), _disturbed(batch, "images", disturb).to(self.device)
        with torch.no_grad(), self.precision.autocast(self.device):
            outputs = units.record(model, keys, batch, teacher_outputs)
        return None, {site: to_nhwc(output) for site, output in outputs.items()}

    def mix(self, batches: str) -> Result:
        """Returns every batch after normalization and mixup with the weights in the file; without any, as it is."""
        classes = self._classes()
        saved = {}
        with np.load(batches) as file:
            image, label = file["image"], file["label"]
            weight = file.get("weight")
        for number in range(len(label)):
            images = pipeline.to_tensor(image[number], self.dtype)
            targets = F.one_hot(torch.from_numpy(label[number]).long(), classes).to(images.dtype)
            if weight is not None:
                images, targets = (pipeline.mixup(rows, float(weight[number])) for rows in (images, targets))
            saved |= {f"images/{number}": to_nhwc(images), f"targets/{number}": to_nhwc(targets)}
        return None, saved

    def loss(self, mixed: str, disturb: Disturb | None = None, additions: Added = None) -> Result:
        """Returns the loss of each row of the first batch, and their mean."""
        smoothing = (additions or {}).get("label_smoothing", 0.0)
        model = self._replica(disturb)
        images, targets = self._mixed(mixed, 0, disturb)
        with torch.no_grad(), self.precision.autocast(self.device):
            logits = self.devices.gather(model(images).to(targets.dtype))
        targets = self.devices.gather(targets)
        rows = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        mean = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return None, {"loss of each row": to_numpy(rows), "mean loss": to_numpy(mean)}

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
            named = _named(model, keys, lambda parameter: parameter.grad, f"{number}/", training=True)
            saved |= named
            overflows += not all(np.isfinite(array).all() for array in named.values())
            self.progress(number + 1, count)
        return {"overflows": overflows}, saved

    def operations(self, mixed: str, site: str, teacher: str | None = None, disturb: Disturb | None = None) -> Result:
        """Records the first batch's values and gradients at a site; with a `teacher`, a recording, returns what each
        operation of the site makes of that. A model that is compiled otherwise is not compiled here."""
        _, keys = self.model()
        ops = operations_of(site, keys.values())
        with np.load(mixed) as file:
            images, targets = (torch.from_numpy(file[f"{name}/0"]) for name in ("images", "targets"))
        batch = self._placed(images.permute(0, 3, 1, 2)), targets.to(self.device, self.dtype)
        model = self._eager(disturb)
        observed = operations.Observed(model, keys, site, ops, lambda model: self._loss(model, *batch))
        if teacher is None:
            return None, observed.record().named()
        return None, observed.feed(Recording.load(teacher, disturb))

    def operation(
        self, question: dict[str, Any], operands: str, disturb: Disturb | None = None, programs: str | None = None
    ) -> Result:
        """Returns what one operation by itself makes of operands, as `JaxSide.operation` does; says the device."""
        if question["kind"] == "update":
            alone: single.Program = single.Update(question, self.precision, self.device)
        else:
            alone = single.Single(self._eager(None), self.model()[1], question, self.precision, self.device)
        arrays = inputs.disturbed_file(operands, disturb)
        given, gradient = {name: arrays[name] for name in question["operands"]}, arrays["gradient"]
        results = alone.compute(given, gradient)
        if programs is not None and self.devices.rank == 0:
            alone.write(given, gradient, Path(programs))
        return {"device": str(self.device)}, results | {
            f"plain {name}": array for name, array in script.plain(question, arrays).items()
        }

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
        return None, _named(model, keys, prefix="params/") | _state(model, keys, updates)

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
        ended = _named(model, keys, prefix="params/") | _state(model, keys, updates, momentum=start is not None)
        return {"overflows": overflows}, {"losses": np.stack(losses)} | ended

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
        """Returns logits, label and index of every example of the split, and how many there are, how many were seen,
        and for how many the label is among the first one and the first five."""
        model, _ = self.model()
        source = open_labelled(dataset, split, data_dir, class_names, limit)
        logits, labels, indices = [], [], []
        for images, label, index in pipeline.evaluation_batches(source, size, batch, self.dtype):
            with torch.no_grad(), self.precision.autocast(self.device):
                logits.append(to_numpy(model(images.to(self.device)).to(images.dtype)))
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

    def _loss(self, model: nn.Module, images: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        with self.precision.autocast(self.device):
            logits = model(images)
        return F.cross_entropy(logits.to(targets.dtype), targets, label_smoothing=smoothing)

    def _scaler(self, scale: float = FIRST_SCALE) -> torch.amp.GradScaler:
        """Returns the scaler of float16's loss; in other precisions it changes nothing."""
        return torch.amp.GradScaler(self.device.type, init_scale=scale, enabled=self.precision.scales_loss)

    def _unit_input(self, nhwc: np.ndarray) -> Tensor:
        """Returns a unit's output, NHWC, as the next unit's input."""
        return torch.from_numpy(nhwc).permute(0, 3, 1, 2).contiguous().to(self.device, self.precision.dtype)

    def _mixed(self, mixed: str, number: int, disturb: Disturb | None) -> tuple[Tensor, Tensor]:
        """Reads batch `number` of a file and disturbs its images; returns this device's rows of images and targets."""
        with np.load(mixed) as file:
            images, targets = (torch.from_numpy(file[f"{name}/{number}"]) for name in ("images", "targets"))
        images = _disturbed(images.permute(0, 3, 1, 2), f"images/{number}", disturb)
        images, targets = self.devices.share(images), self.devices.share(targets)
        return self._placed(images), targets.to(self.device, self.dtype)

    def _placed(self, images: Tensor) -> Tensor:
        """Returns NCHW images on the device, in the dtype and memory format of this side's model."""
        layout = torch.channels_last if self.side.channels_last else torch.contiguous_format
        return images.to(self.device, self.dtype, memory_format=layout)

    def _classes(self) -> int:
        """Returns the number of classes of the head."""
        model, keys = self.model()
        return next(param.shape[0] for name, param in model.named_parameters() if keys[name] == HEAD_KERNEL)

    def _disturbed_model(self, disturb: Disturb | None, train: str | None = None) -> nn.Module:
        """Returns a copy of the model with disturbed parameters, as the side runs it on one device."""
        model = self._eager(disturb)
        freeze(model, self.model()[1], train)
        if self.side.compile and self.devices.count == 1:
            model.compile()
        return model

    def _eager(self, disturb: Disturb | None) -> nn.Module:
        """Returns a copy of the model with disturbed parameters, which is not compiled."""
        model, keys = self.model()
        model = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(_disturbed(parameter, keys[name], disturb))
        if self.side.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def _replica(self, disturb: Disturb | None, train: str | None = None) -> nn.Module:
        """Returns a copy of the model with disturbed parameters, as the side runs it on all of its devices.

        Args:
            train: the parameters to train, see `updates.freeze`.
        """
        replica = self.devices.replica(self._disturbed_model(disturb, train))
        if self.side.compile and self.devices.count > 1:
            # compile the replica, not the model in it: its graph is then cut where devices exchange gradients
            replica.compile()
        return replica


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
            parameter.copy_(_disturbed(parameter, keys[name], disturb))
    yield
    with torch.no_grad():
        for (_, parameter), values in zip(named, kept, strict=True):
            parameter.copy_(values)


def _disturbed(tensor: Tensor, name: str, disturb: Disturb | None) -> Tensor:
    """Returns the tensor times the seed's disturbance. The layouts of the two sides differ, so a value's factor does
    too; only the size of the factors matters."""
    if disturb is None:
        return tensor
    factor = torch.from_numpy(inputs.disturbance(name, tuple(tensor.shape), *disturb))
    return tensor * factor.to(tensor.device, tensor.dtype)


def _state(model: nn.Module, keys: dict[str, str], updates: Updates, *, momentum: bool = True) -> dict[str, np.ndarray]:
    """Returns the momentum, if that is asked for, and the average, if one is kept, of the parameters that train."""

    def held(parameter: nn.Parameter) -> Tensor | None:
        return updates.sgd.state[parameter].get("momentum_buffer")  # none before the first update that is made

    named = _named(model, keys, held, "momentum/", training=True) if momentum else {}
    means = {keys[name]: to_numpy(mean) for name, mean in updates.averages().items()}
    averages = {f"ema/{key}": np.array(to_official(mean, key)) for key, mean in means.items()}
    return named | averages


def _named(
    model: nn.Module,
    keys: dict[str, str],
    value: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter,
    prefix: str = "",
    *,
    training: bool = False,
) -> dict[str, np.ndarray]:
    """Returns {prefix + key: array in the checkpoint's layout} of a value of each parameter, or of each that trains;
    None becomes zeros."""
    named: dict[str, np.ndarray] = {}
    for name, parameter in devices.unwrapped(model).named_parameters():
        if training and not parameter.requires_grad:
            continue
        tensor = value(parameter)
        array = to_numpy(torch.zeros_like(parameter) if tensor is None else tensor)
        named[prefix + keys[name]] = np.array(to_official(array, keys[name]))  # a copy: later steps change the tensor
    return named
