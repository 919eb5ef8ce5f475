"""The tasks that time JAX; the counterpart of `torch_timing.py`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import input_pipeline
from bit_jax import mesh as meshes
from bit_jax import metrics, optimizer
from bit_jax import steps as bit_steps
from bit_jax.evaluate import evaluate as evaluated
from bit_jax.hyperrule import Schedule
from bit_jax.precision import products
from bit_jax.timeline import Timeline
from input_pipeline.examples import Subset
from parity import timing
from parity.jax_side import JaxSide, Result


class TimedJax(JaxSide):
    def forward_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Of the forward pass on `count` batches in turn: see `timing.timed`."""
        model, params = self.model()
        batches = [self._mixed(mixed, number, None)[0] for number in range(count)]
        if self.side.tuned:  # as train.py's evaluation
            model, params = model.clone(standardized=True), self._jit(bit_steps.standardized)(params)
        apply = self._jit(lambda params, images: bit_steps.apply_model(model, params, images))
        times = timing.timed(lambda call: jax.block_until_ready(apply(params, batches[call % count])), seconds)
        return times | self._used(), None

    def train_time(self, mixed: str, count: int, seconds: float) -> Result:
        """Of a step of training on `count` batches in turn: see `timing.timed`."""
        model, params = self.model()
        batches = [self._mixed(mixed, number, None) for number in range(count)]
        sgd = optimizer.sgd(Schedule(**timing.SCHEDULE), timing.MOMENTUM)
        train_step = self._jit(lambda *given: self._step(model, sgd, *given), donate_argnums=0)
        state = jax.jit(lambda params: bit_steps.init_state(params, sgd))(params)

        def step(call: int) -> None:
            nonlocal state
            state, loss = train_step(state, *batches[call % count])
            jax.block_until_ready((state, loss))

        return timing.timed(step, seconds) | self._used(), None

    def loop_time(self, folder: str, resize: int, crop: int, rows: int, steps: int) -> Result:
        """Of training on a folder of images and evaluating on its first, with train.py's loader and steps: see
        `timing.whole_loop`."""
        model, params = self.model()
        sgd = optimizer.sgd(Schedule(**timing.SCHEDULE), timing.MOMENTUM)
        train_step = self._jit(
            bit_steps.make_train_step(model, sgd, mixup=timing.MIXUP, seed=0, microbatches=self.side.microbatches),
            donate_argnums=0,
        )
        eval_step = self._jit(bit_steps.make_eval_step(model))
        for_evaluation = self._jit(bit_steps.standardized)
        state = jax.jit(lambda params: bit_steps.init_state(params, sgd))(params)
        source = input_pipeline.open_source(folder, "train")

        def batches(source: input_pipeline.Source, views: input_pipeline.Views) -> input_pipeline.Loader:
            return input_pipeline.Loader(source, views, rows, place=lambda batch: meshes.shard_batch(batch, self.mesh))

        def step(batch: Any) -> None:
            nonlocal state
            state, _ = jax.block_until_ready(train_step(state, batch[1]))

        def evaluate(examples: int) -> int:
            chosen = Subset(source, np.arange(examples), source.name)
            loader = batches(chosen, input_pipeline.Views(crop, crop, flip=False))
            shown = (batch for _, batch in loader.evaluation())
            return evaluated(eval_step, for_evaluation(state.params), shown, examples).examples

        training = batches(source, input_pipeline.Views(resize, crop, flip=True)).train(0, timing.STARTS + steps)
        times = timing.whole_loop(Timeline(), training, step, evaluate, rows=rows, steps=steps)
        return times | self._used(), None

    def ceiling(self) -> Result:
        """Products a second of large matrices, two floating-point operations each: see `timing.CEILING`."""
        left, right = (jnp.ones((timing.CEILING, timing.CEILING), self.precision.dtype) for _ in range(2))
        multiply = jax.jit(lambda a, b: jnp.dot(a, b, precision=self.precision.product))
        times = timing.timed(lambda _: jax.block_until_ready(multiply(left, right)), timing.CEILING_SECONDS)
        return timing.rate(times), None

    def _used(self) -> dict[str, Any]:
        memory, of = metrics.peak_memory()
        return {"memory": memory, "memory of": of, "products": products(self.precision)}
