"""The tasks that time JAX; the counterpart of `in_torch/timing.py`."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import input_pipeline
from bit_jax.model import ops
from bit_jax.model.precision import products
from bit_jax.scale import sharding
from bit_jax.training import figures
from bit_jax.training import steps as bit_steps
from bit_jax.training.evaluation import evaluate as evaluated
from bit_jax.training.timeline import Timeline
from input_pipeline.examples import Subset
from parity.in_jax.tasks import JaxSide
from parity.sides import clock, flops
from parity.sides.tasks import Result


class TimedJax(JaxSide):
    _call: Callable[[int], None]  # what `again` repeats

    def forward_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times the forward pass on `count` batches in turn: see `clock.timed`; says the loss of the first too."""
        model, params = self.model()
        batches = [self._mixed(mixed, number, None) for number in range(count)]
        losses: list[float] = []
        if self.side.tuned:  # as train.py's evaluation
            model, params = model.clone(standardized=True), self._jit(bit_steps.standardized)(params)
        apply = self._jit(lambda params, images: bit_steps.apply_model(model, params, images))

        def call(number: int) -> None:
            images, targets = batches[number % count]
            logits = jax.block_until_ready(apply(params, images))
            if not losses:
                losses.append(float(bit_steps.cross_entropy(logits, targets).mean()))

        self._call = call
        return clock.timed(call, seconds) | {"losses": losses} | self._used(), None

    def train_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Times a step of training on `count` batches in turn: see `clock.timed`; says the losses of the first too."""
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
        """Times what was timed last, for so many seconds more."""
        return {"calls": clock.again(self._call, seconds)} | self._used(), None

    def convolution_time(
        self, convolution: list[Any], rows: int, which: clock.Pass, sets: int, repeat: int, seconds: float
    ) -> Result:
        """Times one pass of a convolution, `repeat` times on each of `sets` inputs a call: see `clock.timed`."""
        one = flops.Convolution(*convolution)
        x, kernel, gradient = clock.convolution_arrays(one, rows, sets)

        def convolve(x: Any, kernel: Any) -> Any:
            products = self.side.tuned and self.target.on_cpu
            return ops.convolve(x, kernel, one.stride, self.precision.product, products=products)

        def passed(x: Any, kernel: Any, gradient: Any) -> Any:
            if which == "forward":
                return convolve(x, kernel)
            if which == "by input":
                return jax.vjp(lambda x: convolve(x, kernel), x)[1](gradient)[0]
            return jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](gradient)[0]

        def all_sets(x: Any, kernel: Any, gradient: Any) -> Any:
            return [passed(*given) for given in zip(x, [kernel] * sets, gradient, strict=True)]

        options = self.target.compiler_options
        given = jax.tree.map(lambda array: jnp.asarray(array, self.precision.dtype), (list(x), kernel, list(gradient)))
        like = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), given)
        free = sharding.any_layout((like, jax.eval_shape(all_sets, *like)))
        jitted = jax.jit(all_sets, in_shardings=free[0], out_shardings=free[1], compiler_options=options)
        start = time.perf_counter()
        compiled = jitted.lower(*like).compile()
        seconds_of_compilation = time.perf_counter() - start
        placed = jax.device_put(given, compiled.input_formats[0])

        def call(_: int) -> None:
            for _ in range(repeat):
                last = compiled(*placed)
            jax.block_until_ready(last)

        self._call = call
        rms = float(jnp.sqrt(jnp.square(compiled(*placed)[0].astype(jnp.float32)).mean()))
        return clock.timed(call, seconds) | {"first": seconds_of_compilation, "rms": rms}, None

    def loop_time(self, folder: str, resize: int, crop: int, rows: int, steps: int) -> Result:
        """Times training on a folder of images and evaluating on its first ones, with train.py's loader and steps: see
        `clock.whole_loop`."""
        model, _ = self.model()
        training = self.training(clock.SCHEDULE, clock.MOMENTUM, mixup=clock.MIXUP)
        eval_step = self._jit(bit_steps.make_eval_step(model))
        for_evaluation = self._jit(bit_steps.standardized)
        source = input_pipeline.open_source(folder, "train")

        def batches(source: input_pipeline.Source, views: input_pipeline.Views) -> input_pipeline.Loader:
            return input_pipeline.Loader(
                source, views, rows, place=lambda batch: sharding.shard_batch(batch, self.mesh)
            )

        def evaluate(examples: int) -> int:
            chosen = Subset(source, np.arange(examples), source.name)
            loader = batches(chosen, input_pipeline.Views(crop, crop, flip=False))
            shown = (batch for _, batch in loader.evaluation())
            return evaluated(eval_step, for_evaluation(training.state.params), shown, examples).examples

        shown = batches(source, input_pipeline.Views(resize, crop, flip=True)).train(0, clock.STARTS + steps)
        times = clock.whole_loop(Timeline(), shown, lambda batch: training(batch[1]), evaluate, rows=rows, steps=steps)
        return times | self._used(), None

    def ceiling(self) -> Result:
        """Products a second of large matrices, two floating-point operations each: see `clock.CEILING`."""
        platform = self.mesh.devices.flat[0].platform
        left, right = jnp.asarray(clock.matrices(platform), self.precision.dtype)
        multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision=self.precision.product))
        times = clock.timed(lambda _: jax.block_until_ready(multiply(left, right)), clock.CEILING_SECONDS)
        together = self.side.devices if platform != "cpu" else 1  # virtual ones share a CPU
        return together * clock.rate(times, len(left)), None

    def _used(self) -> dict[str, Any]:
        memory, of = figures.peak_memory()
        return {"memory": memory, "memory of": of, "products": self._multiplied}

    @functools.cached_property
    def _multiplied(self) -> tuple[str, str]:
        return products(self.precision)
