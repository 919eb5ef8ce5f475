"""The tasks that time PyTorch; the counterpart of `in_jax/timing.py`."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from bit_jax.accounts.timeline import Timeline
from input_pipeline.examples import Subset
from input_pipeline.sources import open_source
from parity.in_torch import loader, pipeline
from parity.in_torch.precision import products
from parity.in_torch.training_tasks import TrainingTorch, update
from parity.sides import clock, flops
from parity.sides.tasks import Result


class TimedTorch(TrainingTorch):
    """A `TrainingTorch` with the tasks that time. On GPUs it uses what PyTorch offers for speed: cuDNN tries its
    algorithms and keeps the fastest, and SGD is one kernel."""

    _call: Callable[[int], None]  # the timed function, which `again` repeats

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        torch.backends.cudnn.benchmark = not self.side.deterministic

    def forward_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times the forward pass on `count` batches in turn; returns the entries of `clock.timed` and `_used`, and
        "losses", the mean loss of the first batch."""
        model = self._replica(None)
        batches = [self._mixed(mixed, number, None) for number in range(count)]
        losses: list[float] = []

        def call(number: int) -> None:
            images, targets = batches[number % count]
            with torch.inference_mode(), self.precision.autocast(self.device):
                logits = model(images)
            self.devices.wait()
            if not losses:
                losses.append(float(self.devices.mean(F.cross_entropy(logits.to(targets.dtype), targets))))

        self._call = call
        return clock.timed(call, seconds, self.devices.agreed) | {"losses": losses} | self._used(), None

    def train_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times a training step on `count` batches in turn; returns the entries of `clock.timed` and `_used`, and
        "losses", those of the first steps, which are not timed."""
        model = self._replica(None)
        batches = [self._mixed(mixed, number, None) for number in range(count)]
        sgd, scaler, losses = self._sgd(model), self._scaler(), []

        def call(number: int) -> None:
            sgd.zero_grad()
            loss = self._loss(model, *batches[number % count])
            update(sgd, scaler, loss)
            self.devices.wait()
            if number < clock.STARTS:
                losses.append(float(self.devices.mean(loss)))

        self._call = call
        return clock.timed(call, seconds, self.devices.agreed) | {"losses": losses} | self._used(), None

    def again(self, seconds: float) -> Result:
        """Times once more what was timed last; returns "calls", the seconds of each call, and `_used`'s entries."""
        return {"calls": clock.again(self._call, seconds, self.devices.agreed)} | self._used(), None

    def convolution_time(
        self, convolution: list[Any], rows: int, which: clock.Pass, sets: int, repeat: int, seconds: float
    ) -> Result:
        """Times one pass of a convolution; returns the entries of `clock.timed` and "rms", a result's root mean square.

        Args:
            convolution: fields of a `flops.Convolution`.
            rows: number of images in an input.
            which: the pass.
            sets: number of inputs.
            repeat: number of times that a call does the pass on each input.
            seconds: seconds to time calls for.
        """
        layer = flops.Convolution(*convolution)
        layout = torch.channels_last if self.side.channels_last else torch.contiguous_format

        def placed(array: np.ndarray, *axes: int) -> Tensor:
            tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(axes)))
            return tensor.to(self.device, self.precision.dtype, memory_format=layout)

        images, kernel, gradients = clock.convolution_arrays(layer, rows, sets)
        operands = [
            (placed(x, 0, 3, 1, 2), placed(gradient, 0, 3, 1, 2)) for x, gradient in zip(images, gradients, strict=True)
        ]
        weight, stride, pad = placed(kernel, 3, 2, 0, 1), [layer.stride] * 2, [(layer.size - 1) // 2] * 2

        def compute(x: Tensor, gradient: Tensor) -> Tensor:
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
                    for x, gradient in operands:
                        compute(x, gradient)
            self.devices.wait()

        self._call = call
        rms = float(compute(*operands[0]).float().square().mean().sqrt())
        return clock.timed(call, seconds, self.devices.agreed) | {"rms": rms}, None

    def loop_time(self, folder: str, resize: int, crop: int, rows: int, steps: int) -> Result:
        """Times training on a folder of images and evaluation on its first ones; returns the entries of
        `clock.whole_loop` and `_used`.

        The loop is that of BiT's PyTorch code: DataLoader with a worker process for each core, Pillow, float32 images,
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
            images, targets = (pipeline.mixup(tensor, weight) for tensor in (images, targets))
            sgd.zero_grad()
            update(sgd, scaler, self._loss(model, self._placed(images), targets.to(self.device)))
            devices.wait()

        def evaluate(examples: int) -> int:
            indices = np.arange(devices.rank, examples, devices.count)
            subset, seen = Subset(source, indices, source.name), 0
            for images, label in loader.evaluation_batches(subset, share, crop=crop, workers=workers):
                with torch.inference_mode(), self.precision.autocast(self.device):
                    ranks = pipeline.label_rank(model(self._placed(images)), label.to(self.device))
                seen += int((ranks >= 0).sum())
            return int(devices.total(seen))

        batches = loader.batches(
            source, share, resize=resize, crop=crop, workers=workers, shard=(devices.rank, devices.count)
        )
        times = clock.whole_loop(Timeline(), batches, step, evaluate, rows=rows, steps=steps)
        return times | self._used(), None

    def ceiling(self, seconds: float) -> Result:
        """Returns the floating-point operations per second of products of large matrices, see `clock.ceiling`."""

        def product(*matrices: np.ndarray) -> Callable[[], None]:
            left, right = (torch.from_numpy(matrix).to(self.device, self.precision.dtype) for matrix in matrices)

            def multiply() -> None:
                torch.mm(left, right)
                self.devices.wait()

            return multiply

        rate = clock.ceiling(product, self.device.type, seconds, self.devices.agreed)
        return self.devices.count * rate, None

    def _sgd(self, model: nn.Module) -> torch.optim.Optimizer:
        fused = self.device.type == "cuda"
        return torch.optim.SGD(
            model.parameters(), lr=clock.SCHEDULE["base_lr"], momentum=clock.MOMENTUM, fused=fused or None
        )

    def _used(self) -> dict[str, Any]:
        """Returns the peak memory in GiB, whose memory it is, and the precisions of products. It also frees the GPU
        memory that PyTorch only caches, for other processes' turns."""
        on_gpu = self.device.type == "cuda"
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        used = torch.cuda.max_memory_allocated(self.device) if on_gpu else self.devices.total(clock.process_memory())
        of = "device" if on_gpu else "process" if self.devices.count == 1 else f"{self.devices.count} processes"
        return {"memory": used / 2**30, "memory of": of, "products": products(self.precision, self.device)}
