"""The tasks that time JAX; the counterpart of `in_torch/timing.py`."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import input_pipeline
from bit_jax.accounts.timeline import Timeline
from bit_jax.model import ops
from bit_jax.model.precision import products
from bit_jax.scale import sharding
from bit_jax.training import figures
from bit_jax.training import steps as bit_steps
from bit_jax.training.evaluation import evaluate as evaluated
from input_pipeline.examples import Subset
from parity.in_jax.training_tasks import TrainingJax
from parity.sides import clock, flops
from parity.sides.tasks import Result


class TimedJax(TrainingJax):
    """A `TrainingJax` with the tasks that time."""

    _call: Callable[[int], None]  # the timed function, which `again` repeats

    def forward_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times the forward pass on `count` batches in turn; returns the entries of `clock.timed` and `_used`, and
        "losses", the mean loss of the first batch."""
        model, params = self.model()
        batches = [self._mixed(mixed, number, None) for number in range(count)]
        losses: list[float] = []
        if self.side.tuned:  # train.py's evaluation standardizes kernels once, too
            standardized = self._jit(lambda params: bit_steps.standardized(params, model.standardize_eps))
            model, params = model.clone(standardized=True), standardized(params)
        apply = self._jit(lambda params, images: bit_steps.apply_model(model, params, images))

        def call(number: int) -> None:
            images, targets = batches[number % count]
            logits = jax.block_until_ready(apply(params, images))
            if not losses:
                losses.append(float(bit_steps.cross_entropy(logits, targets).mean()))

        self._call = call
        return clock.timed(call, seconds) | {"losses": losses} | self._used(), None

    def train_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times a training step on `count` batches in turn; returns the entries of `clock.timed` and `_used`, and
        "losses", those of the first steps, which are not timed."""
        batches = [self._mixed(mixed, number, None) for number in range(count)]
        training = self.training(clock.SCHEDULE, clock.MOMENTUM)
        losses: list[float] = []

        def call(number: int) -> None:
            training(*batches[number % count])
            if number < clock.STARTS:
                losses.append(float(training.metrics["loss"]))

        self._call = call
        return clock.timed(call, seconds) | {"losses": losses} | self._used(), None

    def again(self, seconds: float) -> Result:
        """Times once more what was timed last; returns "calls", the seconds of each call, and `_used`'s entries."""
        return {"calls": clock.again(self._call, seconds)} | self._used(), None

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
        images, kernel, gradients = clock.convolution_arrays(layer, rows, sets)

        def convolve(x: Any, kernel: Any) -> Any:
            products = self.side.tuned and self.target.on_cpu
            return ops.convolve(x, kernel, layer.stride, self.precision.product, products=products)

        def compute(x: Any, kernel: Any, gradient: Any) -> Any:
            if which == "forward":
                return convolve(x, kernel)
            if which == "by input":
                return jax.vjp(lambda x: convolve(x, kernel), x)[1](gradient)[0]
            return jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](gradient)[0]

        def compute_all(images: Any, kernel: Any, gradients: Any) -> Any:
            return [compute(x, kernel, gradient) for x, gradient in zip(images, gradients, strict=True)]

        options = self.target.compiler_options
        operands = jax.tree.map(
            lambda array: jnp.asarray(array, self.precision.dtype), (list(images), kernel, list(gradients))
        )
        like = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), operands)
        operand_layouts, result_layouts = sharding.any_layout((like, jax.eval_shape(compute_all, *like)))
        jitted = jax.jit(
            compute_all, in_shardings=operand_layouts, out_shardings=result_layouts, compiler_options=options
        )
        start = time.perf_counter()
        compiled = jitted.lower(*like).compile()
        seconds_of_compilation = time.perf_counter() - start
        placed = jax.device_put(operands, compiled.input_formats[0])

        def call(_: int) -> None:
            for _ in range(repeat):
                last = compiled(*placed)
            jax.block_until_ready(last)

        self._call = call
        rms = float(jnp.sqrt(jnp.square(compiled(*placed)[0].astype(jnp.float32)).mean()))
        return clock.timed(call, seconds) | {"first": seconds_of_compilation, "rms": rms}, None

    def loop_time(self, folder: str, resize: int, crop: int, rows: int, steps: int) -> Result:
        """Times training on a folder of images and evaluation on its first ones, with train.py's loader and steps;
        returns the entries of `clock.whole_loop` and `_used`."""
        model, _ = self.model()
        training = self.training(clock.SCHEDULE, clock.MOMENTUM, mixup=clock.MIXUP)
        eval_step = self._jit(bit_steps.make_eval_step(model))
        standardized = self._jit(lambda params: bit_steps.standardized(params, model.standardize_eps))
        source = input_pipeline.open_source(folder, "train")

        def loader_of(source: input_pipeline.Source, views: input_pipeline.Views) -> input_pipeline.Loader:
            return input_pipeline.Loader(
                source, views, rows, place=lambda batch: sharding.shard_batch(batch, self.mesh)
            )

        def evaluate(examples: int) -> int:
            subset = Subset(source, np.arange(examples), source.name)
            loader = loader_of(subset, input_pipeline.Views(crop, crop, flip=False))
            batches = (batch for _, batch in loader.evaluation())
            return evaluated(eval_step, standardized(training.state.params), batches, examples).examples

        batches = loader_of(source, input_pipeline.Views(resize, crop, flip=True)).train(0, clock.STARTS + steps)
        times = clock.whole_loop(
            Timeline(), batches, lambda batch: training(batch[1]), evaluate, rows=rows, steps=steps
        )
        return times | self._used(), None

    def ceiling(self, seconds: float) -> Result:
        """Returns the floating-point operations per second of products of large matrices, see `clock.ceiling`."""
        platform = self.mesh.devices.flat[0].platform
        multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision=self.precision.product))

        def product(*matrices: np.ndarray) -> Callable[[], Any]:
            left, right = (jnp.asarray(matrix, self.precision.dtype) for matrix in matrices)
            return lambda: jax.block_until_ready(multiply(left, right))

        devices = self.side.devices if platform != "cpu" else 1  # the virtual devices share one CPU
        return devices * clock.ceiling(product, platform, seconds), None

    def _used(self) -> dict[str, Any]:
        """Returns the peak memory in GiB, whose memory it is, and the precisions of products."""
        memory, owner = figures.peak_memory()
        return {"memory": memory, "memory of": owner, "products": self._products}

    @functools.cached_property
    def _products(self) -> tuple[str, str]:
        return products(self.precision)
