"""Fine-tuning: evaluate, train, save, report. The loop at the end reads like its own summary."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bit_jax import mesh as meshes
from bit_jax import metrics, steps, weights
from bit_jax.checkpoint import Checkpoints
from bit_jax.config import Config
from bit_jax.errors import RunFailed
from bit_jax.evaluate import Accuracy, evaluate
from bit_jax.hyperrule import Recipe
from bit_jax.optimizer import learning_rate, sgd
from bit_jax.precision import choose
from bit_jax.weights import Architecture, Params
from bit_jax.workdir import Workdir


class Batches(Protocol):
    """What `finetune` asks of a loader; `place` has put its batches on the mesh."""

    def train(self, start: int, stop: int) -> Iterator[tuple[int, Any]]: ...
    def evaluation(self) -> Iterator[tuple[int, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Split:
    """A loader with what is said about it in the result."""

    name: str
    examples: int
    batches: Batches


def finetune(
    cfg: Config,
    recipe: Recipe,
    architecture: Architecture,
    initial_params: Callable[[], Params],
    *,
    train: Split,
    validation: Split,
    global_batch: int,
    mesh: Mesh,
) -> dict[str, Any]:
    """Trains to the recipe's end, continuing what the work directory holds, and writes final.npz and result.json.

    Args:
        cfg, recipe: what to do.
        architecture: of the model, head included.
        initial_params: called only by a run that starts from the beginning.
        train, validation: their batches' rows lie on `mesh`.
        global_batch: rows of a batch.

    Returns:
        The content of result.json.

    Raises:
        RunFailed: the loss is not finite.
        RequestError: a checkpoint or the work directory cannot be used.
    """
    precision = choose(cfg.model.precision)
    workdir = Workdir(cfg.run.workdir)
    timeline = metrics.Timeline()
    model = architecture.model(precision.dtype, precision.product)
    optimizer = sgd(recipe.schedule, cfg.optimizer.momentum)
    state_shape = abstract_state(architecture, precision.dtype, optimizer, mesh)

    with timeline("compilation"):
        train_step = compile_train_step(
            steps.make_train_step(model, optimizer, mixup=recipe.mixup, seed=cfg.run.seed),
            state_shape,
            abstract_batch(global_batch, recipe.crop, mesh),
        )
        eval_step = compile_eval_step(
            steps.make_eval_step(model), state_shape.params, abstract_batch(global_batch, recipe.crop, mesh)
        )

    checkpoints = Checkpoints(workdir.checkpoints, keep=cfg.run.keep_checkpoints)
    start = checkpoints.latest or 0
    if start:
        state = checkpoints.restore(start, state_shape)
    else:
        state = place_state(initial_params(), optimizer, state_shape)

    def accuracy() -> Accuracy:
        batches = (batch for _, batch in validation.batches.evaluation())
        with timeline("evaluation"):
            measured = evaluate(eval_step, state.params, batches, validation.examples)
        log.write(step, val_acc1=measured.acc1, val_acc5=measured.acc5, val_loss=measured.loss)
        return measured

    def reached(measured: Accuracy | None) -> bool:
        target = cfg.run.target_acc1
        return target is not None and measured is not None and measured.acc1 >= target

    due = evaluation_due(cfg, train_examples=train.examples, global_batch=global_batch)
    rate = learning_rate(recipe.schedule)
    stop = recipe.schedule.steps
    step, measured = start, None
    with metrics.Log(cfg.run.workdir, start=start, stop=stop, global_batch=global_batch) as log:
        if start:
            log.note(f"continuing {cfg.run.workdir} from step {start}")
        began = time.perf_counter()
        if (cfg.run.eval_at_start and not start) or (cfg.run.target_acc1 is not None and due(start)):
            measured = accuracy()

        batches = iter(()) if reached(measured) else train.batches.train(start, stop)
        for step_index, batch in timeline.waiting("input", batches):
            state, sums = train_step(state, batch)
            loss = float(jax.block_until_ready((state, sums))[1]["loss"])
            step, measured = step_index + 1, None
            log.advance(step)
            if not math.isfinite(loss):
                raise RunFailed(
                    f"the loss of step {step} is {loss}; lower --base-lr {cfg.optimizer.base_lr} or use --precision fp32"
                )
            if step % cfg.run.log_every == 0:
                log.write(step, loss=loss, learning_rate=float(rate(step_index)), **_speed(timeline, began, step - start, global_batch))
            if due(step):
                measured = accuracy()
            if reached(measured):
                break
            if step % cfg.run.checkpoint_every == 0 and step < stop:
                checkpoints.save(state)

        measured = measured or accuracy()
        whole = time.perf_counter() - began
        trained = (step - start) * global_batch
        if step > start:
            checkpoints.save(state)
        checkpoints.close()
        weights.save(workdir.final, state.params)

    memory, memory_of = metrics.peak_memory()
    throughput = metrics.Throughput.of(
        trained, whole=whole, evaluation=timeline["evaluation"], input_wait=timeline["input"]
    )
    result = {
        "model": cfg.model.model,
        "architecture": str(architecture),
        "init": cfg.model.init,
        "dataset": train.name,
        "eval_dataset": validation.name,
        "precision": cfg.model.precision,
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "hosts": jax.process_count(),
        "batch_per_device": global_batch / mesh.size,
        "global_batch": global_batch,
        "steps": step,
        "resumed_from_step": start,
        "seed": cfg.run.seed,
        "e2e_time": metrics.seconds_since_process_start(),
        "compile_time": timeline["compilation"],
        **dataclasses.asdict(throughput),
        "train_examples_seen": trained,
        "train_seconds": whole - timeline["evaluation"],
        "evaluation_seconds": timeline["evaluation"],
        "input_wait_seconds": timeline["input"],
        "final_acc1": measured.acc1,
        "final_acc5": measured.acc5,
        "final_loss": measured.loss,
        "eval_examples": measured.examples,
        "mem_gib": memory,
        "mem_of": memory_of,
        "versions": metrics.versions(),
    }
    metrics.write_json(workdir.result, result)
    return result


def abstract_state(architecture: Architecture, dtype, optimizer, mesh: Mesh) -> steps.TrainState:
    """Shapes, dtypes and shardings of the training state, without an array."""
    kept = steps.param_dtype(dtype)
    flat = {key: jax.ShapeDtypeStruct(shape, kept) for key, shape in weights.layout(architecture).items()}
    shapes = jax.eval_shape(lambda params: steps.init_state(params, optimizer), weights.unflatten(flat))
    sharding = meshes.replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def abstract_batch(global_batch: int, crop: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a device batch."""
    sharding = meshes.batch_sharding(mesh)
    fields = {
        "image": ((global_batch, crop, crop, 3), jnp.uint8),
        "label": ((global_batch,), jnp.int32),
        "mask": ((global_batch,), jnp.bool_),
        "index": ((global_batch,), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in fields.items()}


def compile_train_step(train_step: Callable, state: steps.TrainState, batch: dict) -> Callable:
    """Ahead of time, the state donated: the step updates it in place."""
    return jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()


def compile_eval_step(eval_step: Callable, params: Any, batch: dict) -> Callable:
    return jax.jit(eval_step).lower(params, batch).compile()


def place_state(params: Params, optimizer, state_shape: steps.TrainState) -> steps.TrainState:
    """The state at step 0, laid out as `state_shape` says."""
    params = jax.tree.map(lambda leaf, like: jax.device_put(jnp.asarray(leaf, like.dtype), like.sharding), params, state_shape.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state_shape)
    return jax.jit(lambda params: steps.init_state(params, optimizer), out_shardings=shardings)(params)


def evaluation_due(cfg: Config, *, train_examples: int, global_batch: int) -> Callable[[int], bool]:
    """step -> whether to evaluate after that many steps: each so many, or whenever an epoch has just been completed."""
    every = cfg.run.eval_every
    if every is None:
        return lambda step: False
    if every == "epoch":
        return lambda step: step > 0 and step * global_batch // train_examples > (step - 1) * global_batch // train_examples
    return lambda step: step > 0 and step % every == 0


def _speed(timeline: metrics.Timeline, began: float, steps_done: int, global_batch: int) -> dict[str, float]:
    """Since the start of training; the share of the time without evaluations that was spent waiting for input."""
    training = time.perf_counter() - began - timeline["evaluation"]
    return {"images_per_s": steps_done * global_batch / training, "input_wait": timeline["input"] / training}
