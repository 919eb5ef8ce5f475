"""Computes something for every example of a split, each exactly once, over all devices of all hosts."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bit_jax.formats import weights
from bit_jax.model.architecture import Architecture
from bit_jax.model.resnetv2 import ResNetV2
from bit_jax.scale import sharding
from bit_jax.training import steps
from bit_jax.training.evaluation import one_behind
from bit_jax.training.program import abstract_batch
from bit_jax.training.target import Target
from input_pipeline import Loader, Source, Views
from input_pipeline.examples import Subset

Rows = dict[str, Array]  # arrays whose first axis is the batch
Step = Callable[[Any, dict], Rows]  # (parameters after `steps.standardized`, batch) -> rows


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, examples, and the devices that they meet on.

    Attributes:
        weight_file: the file of the parameters.
        architecture: the model's architecture; where it has no classes, the file's head is left out.
        target: the devices and the precision.
        source: the examples.
        views: the view of each image that the model gets.
        global_batch: number of rows of a batch, over all hosts.
        threads: threads that read, decode and resize; None: the loader's choice.
    """

    weight_file: Path
    architecture: Architecture
    target: Target
    source: Source
    views: Views
    global_batch: int
    threads: int | None = None

    @property
    def model(self) -> ResNetV2:
        """The model as it is executed here, which takes standardized parameters."""
        return self.target.model(self.architecture).clone(standardized=True)


@dataclasses.dataclass(frozen=True)
class Computed:
    """What was computed of a split.

    Attributes:
        rows: {name: array [examples, ...] in the order of the source}, the same on every host.
        compile_seconds: seconds until the programs, those that resize among them, were compiled and the parameters
            placed.
        seconds: seconds from the first reading to the last row, with the devices finished.
    """

    rows: dict[str, np.ndarray]
    compile_seconds: float
    seconds: float


def compute(work: Work, step: Step, progress: Callable[[int], None] = lambda done: None) -> Computed:
    """Runs a step over all examples of the work's source.

    Args:
        step: function that is compiled; its model is `work.model`.
        progress: function that is called with the number of examples done.

    Raises:
        RuntimeError: the batches do not contain each example exactly once.
        RequestError, DatasetError: the weights or an example cannot be read.
    """
    start = time.perf_counter()
    params, compiled = _prepared(work, step)
    _resize_one(work)
    ready = time.perf_counter()
    batches: list[dict[str, np.ndarray]] = []
    done = 0
    for rows in one_behind(compiled(params, batch) for batch in _loader(work)):
        batches.append({name: np.asarray(array) for name, array in rows.items()})  # waits for the devices
        done += int(batches[-1]["mask"].sum())
        progress(done)
    seconds = time.perf_counter() - ready
    return Computed(_in_order(batches, len(work.source)), ready - start, seconds)


def _prepared(work: Work, step: Step) -> tuple[Any, Callable[[Any, dict], Rows]]:
    """Returns the standardized parameters, and the compiled step, which gives all rows to every host."""
    mesh, dtype = work.target.mesh, work.target.param_dtype
    shapes = {
        key: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.param_sharding(mesh, shape))
        for key, shape in work.architecture.layout.items()
    }

    def with_identity(params: Any, batch: dict) -> Rows:
        return step(params, batch) | {"index": batch["index"], "mask": batch["mask"]}

    like, batch = weights.unflatten(shapes), abstract_batch(work.global_batch, work.views.crop, mesh)
    batch = {name: batch[name] for name in ("image", "label", "mask", "index")}
    in_any_layout = (sharding.any_layout(like), None)
    jitted = jax.jit(with_identity, in_shardings=in_any_layout, out_shardings=sharding.replicated(mesh))
    compiled = jitted.lower(like, batch).compile(compiler_options=work.target.compiler_options)
    _, arrays = weights.read(work.weight_file, num_classes=None if work.architecture.num_classes else 0)
    params = weights.unflatten({key: sharding.place(array, shapes[key]) for key, array in arrays})
    standardized = functools.partial(steps.standardized, eps=work.model.standardize_eps)
    laid_out = sharding.formats(sharding.laid_out(like, compiled.input_formats[0][0]))
    return jax.block_until_ready(jax.jit(standardized, out_shardings=laid_out)(params)), compiled


def _resize_one(work: Work) -> None:
    """Reads and resizes the first example, for which Numba compiles on its first use on a machine."""
    first = Subset(work.source, np.arange(1), work.source.name)
    next(Loader(first, work.views, global_batch=1, threads=1).evaluation())


def _loader(work: Work) -> Iterator[Any]:
    loader = Loader(
        work.source,
        work.views,
        work.global_batch,
        place=functools.partial(sharding.shard_batch, mesh=work.target.mesh),
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=work.threads,
    )
    return (batch for _, batch in loader.evaluation())


def _in_order(batches: list[dict[str, np.ndarray]], examples: int) -> dict[str, np.ndarray]:
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    shown = rows.pop("mask")
    index = rows.pop("index")[shown]
    if not np.array_equal(np.sort(index), np.arange(examples)):
        raise RuntimeError(f"{len(index)} rows of a split of {examples} examples are not each of them once")
    order = np.argsort(index)
    return {name: array[shown][order] for name, array in rows.items()}


def classify(work: Work, competing: tuple[int, ...]) -> Step:
    """Makes a step that classifies images among some of the head's classes.

    Its rows are `label`; `predicted`, the class with the largest logit, the lower one where two are equal; `rank`, the
    number of classes ahead of the label (see `steps.label_rank`); `probability` of the predicted class and
    `label_probability`, by softmax over the competing classes; and `loss`, the cross-entropy in nats.

    Args:
        competing: numbers of the classes in the head, in the order of the labels.
    """
    model, dtype = work.model, work.target.param_dtype
    chosen = None if competing == tuple(range(model.num_classes)) else np.asarray(competing)

    def step(params: Any, batch: dict) -> Rows:
        logits = steps.apply_model(model, params, steps.normalize(batch["image"], dtype))
        logits = logits if chosen is None else logits[:, chosen]
        label = batch["label"]
        targets = steps.one_hot(label, logits.shape[1], logits.dtype)
        probabilities = jax.nn.softmax(logits)
        return {
            "label": label,
            "predicted": logits.argmax(axis=1).astype(jnp.int32),
            "rank": steps.label_rank(logits, label),
            "probability": probabilities.max(axis=1),
            "label_probability": jnp.take_along_axis(probabilities, label[:, None], axis=1)[:, 0],
            "loss": steps.cross_entropy(logits, targets),
        }

    return step


def pooled_features(work: Work) -> Step:
    """Makes a step whose rows are `features`, the model's pooled features [channels], float32 or wider."""
    model, dtype = work.model, work.target.param_dtype

    def step(params: Any, batch: dict) -> Rows:
        return {"features": pooled(model, params, steps.normalize(batch["image"], dtype))}

    return step


def pooled(
    model: ResNetV2, params: Any, images: Float[Array, "batch height width 3"]
) -> Float[Array, "batch channels"]:
    """Returns the pooled features of images in [-1, 1]; the parameters may lack the head."""
    features = model.apply({"params": params}, images, method="features")
    assert isinstance(features, dict)  # a tuple is for models with mutable variables
    return features["pooled"]
