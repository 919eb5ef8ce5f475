"""The tasks of the ladder in PyTorch that train nothing, for the reference or any other BiT; the counterpart of
`in_jax/tasks.py`."""

import contextlib
import copy
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from input_pipeline.errors import RequestError
from parity import faults
from parity.in_torch import devices, models, names, operations, pipeline, resnetv2, script, single, units
from parity.in_torch.arrays import HEAD_KERNEL, to_nhwc, to_numpy, to_official
from parity.in_torch.precision import choose, float32_settings, products
from parity.in_torch.updates import freeze
from parity.sides import inputs
from parity.sides.classes import open_labelled
from parity.sides.fingerprint import fingerprint
from parity.sides.images import rgb
from parity.sides.inputs import Files
from parity.sides.operations import Recording
from parity.sides.operations import operations as operations_of
from parity.sides.side import Side
from parity.sides.tasks import Disturb, Result

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
        if side.cuda_graphs and not torch.cuda.is_available():  # PyTorch would leave them out and say nothing
            raise RequestError(f"side {side} needs an NVIDIA GPU, and PyTorch finds none here; leave out cuda_graphs")
        self.precision = choose(precision)
        if torch.are_deterministic_algorithms_enabled() != side.deterministic:  # setting it imports torch._inductor
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
            "weights sha256": fingerprint(named_arrays(model, keys)),
            "pictures sha256": fingerprint({"images": np.load(images)["image"]}),
        } | inputs.described(dataset), None

    def products(self) -> Result:
        """Returns the precisions in which a matrix product and a convolution are really computed."""
        return products(self.precision, self.device), None

    def weights(self) -> Result:
        """Returns every array of the weight file, as the model holds it."""
        return None, named_arrays(*self.model())

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
        model, batch = self._disturbed_model(disturb), disturbed(batch, "images", disturb).to(self.device)
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

    def _unit_input(self, nhwc: np.ndarray) -> Tensor:
        """Returns a unit's output, NHWC, as the next unit's input."""
        return torch.from_numpy(nhwc).permute(0, 3, 1, 2).contiguous().to(self.device, self.precision.dtype)

    def _mixed(self, mixed: str, number: int, disturb: Disturb | None) -> tuple[Tensor, Tensor]:
        """Reads batch `number` of a file and disturbs its images; returns this device's rows of images and targets."""
        with np.load(mixed) as file:
            images, targets = (torch.from_numpy(file[f"{name}/{number}"]) for name in ("images", "targets"))
        images = disturbed(images.permute(0, 3, 1, 2), f"images/{number}", disturb)
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
            model.compile(mode=self._compile_mode)
        if self.side.compile_units:
            compile_units(model, self._compile_mode)
        return model

    def _eager(self, disturb: Disturb | None) -> nn.Module:
        """Returns a copy of the model with disturbed parameters, which is not compiled."""
        model, keys = self.model()
        model = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(disturbed(parameter, keys[name], disturb))
        if self.side.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    @property
    def _compile_mode(self) -> str | None:
        """torch.compile's mode."""
        return "reduce-overhead" if self.side.cuda_graphs else None

    def _replica(self, disturb: Disturb | None, train: str | None = None) -> nn.Module:
        """Returns a copy of the model with disturbed parameters, as the side runs it on all of its devices.

        Args:
            train: the parameters to train, see `updates.freeze`.
        """
        replica = self.devices.replica(self._disturbed_model(disturb, train))
        if self.side.compile and self.devices.count > 1:
            # compile the replica, not the model in it: its graph is then cut where devices exchange gradients
            replica.compile(mode=self._compile_mode)
        return replica


def compile_units(model: nn.Module, mode: str | None) -> None:
    """Has each unit and the root block of this project's model compiled by itself, at its first call; units that are
    alike share their code.

    Args:
        mode: torch.compile's.
    """
    torch._dynamo.config.recompile_limit = len(list(model.modules()))  # PyTorch's default is 8 kinds of unit
    for module in model.modules():
        if isinstance(module, (resnetv2.RootBlock, resnetv2.Unit)):
            # if sizes were left open, units of several sizes would share slower code
            module.compile(mode=mode, dynamic=False)


def disturbed(tensor: Tensor, name: str, disturb: Disturb | None) -> Tensor:
    """Returns the tensor times the seed's disturbance. The layouts of the two sides differ, so a value's factor does
    too; only the size of the factors matters."""
    if disturb is None:
        return tensor
    factor = torch.from_numpy(inputs.disturbance(name, tuple(tensor.shape), *disturb))
    return tensor * factor.to(tensor.device, tensor.dtype)


def named_arrays(
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
