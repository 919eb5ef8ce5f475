"""The tasks that time PyTorch; the counterpart of `in_jax/timing.py`."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bit_jax.training.timeline import Timeline
from input_pipeline.examples import Subset
from input_pipeline.sources import open_source
from parity.in_torch import loader, pipeline
from parity.in_torch.tasks import AUTOCAST, DTYPES, TorchSide, update
from parity.sides import clock, flops
from parity.sides.tasks import Result


class TimedTorch(TorchSide):
    """On GPUs with what PyTorch offers for speed: cuDNN's algorithms chosen by trying, and SGD in one kernel."""

    _call: Callable[[int], None]  # what `again` repeats

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        torch.backends.cudnn.benchmark = True

    def forward_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times the forward pass on `count` batches in turn: see `clock.timed`; says the loss of the first too."""
        model = self._replica(None)
        batches = [self._mixed(mixed, number, None) for number in range(count)]
        losses: list[float] = []

        def apply(call: int) -> None:
            images, targets = batches[call % count]
            with torch.inference_mode(), self._autocast():
                logits = model(images)
            self.devices.wait()
            if not losses:
                losses.append(float(self.devices.mean(F.cross_entropy(logits.to(targets.dtype), targets))))

        self._call = apply
        return clock.timed(apply, seconds, self.devices.first) | {"losses": losses} | self._used(), None

    def train_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times a step of training on `count` batches in turn: see `clock.timed`; says the losses of the first too."""
        model = self._replica(None)
        batches = [self._mixed(mixed, number, None) for number in range(count)]
        sgd, scaler, losses = self._sgd(model), self._scaler(), []

        def step(call: int) -> None:
            sgd.zero_grad()
            loss = self._loss(model, *batches[call % count])
            update(sgd, scaler, loss)
            self.devices.wait()
            if call < clock.STARTS:
                losses.append(float(self.devices.mean(loss)))

        self._call = step
        return clock.timed(step, seconds, self.devices.first) | {"losses": losses} | self._used(), None

    def again(self, seconds: float) -> Result:
        """Times what was timed last, for so many seconds more."""
        return {"calls": clock.again(self._call, seconds, self.devices.first)} | self._used(), None

    def convolution_time(
        self, convolution: list[Any], rows: int, which: clock.Pass, sets: int, repeat: int, seconds: float
    ) -> Result:
        """Times one pass of a convolution, `repeat` times on each of `sets` inputs a call: see `clock.timed`."""
        one = flops.Convolution(*convolution)
        layout = torch.channels_last if self.side.channels_last else torch.contiguous_format
        dtype = AUTOCAST.get(self.precision, DTYPES[self.precision])

        def placed(array: np.ndarray, *axes: int) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(axes)))
            return tensor.to(self.device, dtype, memory_format=layout)

        images, kernel, gradients = clock.convolution_arrays(one, rows, sets)
        given = [
            (placed(x, 0, 3, 1, 2), placed(gradient, 0, 3, 1, 2)) for x, gradient in zip(images, gradients, strict=True)
        ]
        weight, stride, pad = placed(kernel, 3, 2, 0, 1), [one.stride] * 2, [(one.size - 1) // 2] * 2

        def passed(x: Tensor, gradient: Tensor) -> Tensor:
            if which == "forward":
                return F.conv2d(x, weight, stride=stride, padding=pad)
            wanted = [which == "by input", which == "by kernel", False]
            results = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, stride, pad, [1, 1], False, [0, 0], 1, wanted
            )
            return results[wanted.index(True)]

        def call(_: int) -> None:
            with torch.no_grad():
                for _ in range(repeat):
                    for x, gradient in given:
                        passed(x, gradient)
            self.devices.wait()

        self._call = call
        rms = float(passed(*given[0]).float().square().mean().sqrt())
        return clock.timed(call, seconds, self.devices.first) | {"rms": rms}, None

    def loop_time(self, folder: str, resize: int, crop: int, rows: int, steps: int) -> Result:
        """Times training on a folder of images and evaluating on its first ones: see `clock.whole_loop`.

        The loop is the reference case's: DataLoader with a worker process a core, Pillow, float32 images, a
        DistributedSampler.
        """
        model, devices = self._replica(None), self.devices
        sgd, scaler = self._sgd(model), self._scaler()
        source, workers = open_source(folder, "train"), max(len(os.sched_getaffinity(0)) // devices.count, 1)
        classes, share = self._classes(), rows // devices.count

        def step(batch: tuple[Tensor, Tensor]) -> None:
            images, label = batch
            weight = float(torch.distributions.Beta(clock.MIXUP, clock.MIXUP).sample())
            targets = F.one_hot(label, classes).to(images.dtype)
            images, targets = (pipeline.mixup(each, weight) for each in (images, targets))
            sgd.zero_grad()
            update(sgd, scaler, self._loss(model, self._placed(images), targets.to(self.device)))
            devices.wait()

        def evaluate(examples: int) -> int:
            own = np.arange(devices.rank, examples, devices.count)
            chosen, seen = Subset(source, own, source.name), 0
            for images, label in loader.evaluation_batches(chosen, share, crop=crop, workers=workers):
                with torch.inference_mode(), self._autocast():
                    ranks = pipeline.label_rank(model(self._placed(images)), label.to(self.device))
                seen += int((ranks >= 0).sum())
            return int(devices.total(seen))

        batches = loader.batches(
            source, share, resize=resize, crop=crop, workers=workers, shard=(devices.rank, devices.count)
        )
        times = clock.whole_loop(Timeline(), batches, step, evaluate, rows=rows, steps=steps)
        return times | self._used(), None

    def ceiling(self) -> Result:
        """Products a second of large matrices, two floating-point operations each: see `clock.CEILING`."""
        dtype = AUTOCAST.get(self.precision, DTYPES[self.precision])
        left, right = torch.from_numpy(clock.matrices(self.device.type)).to(self.device, dtype)

        def multiply(_: int) -> None:
            torch.mm(left, right)
            self.devices.wait()

        timed = clock.timed(multiply, clock.CEILING_SECONDS, self.devices.first)
        return self.devices.count * clock.rate(timed, len(left)), None

    def _sgd(self, model: nn.Module) -> torch.optim.Optimizer:
        fused = self.device.type == "cuda"
        return torch.optim.SGD(
            model.parameters(), lr=clock.SCHEDULE["base_lr"], momentum=clock.MOMENTUM, fused=fused or None
        )

    def _used(self) -> dict[str, Any]:
        """How much memory was in use at most, and in which type products are. What is kept of a GPU's memory for later
        is given back, for other processes' turns."""
        on_gpu = self.device.type == "cuda"
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        used = torch.cuda.max_memory_allocated(self.device) if on_gpu else self.devices.total(clock.process_memory())
        of = "device" if on_gpu else "process" if self.devices.count == 1 else f"{self.devices.count} processes"
        return {"memory": used / 2**30, "memory of": of, "products": self._products()}
