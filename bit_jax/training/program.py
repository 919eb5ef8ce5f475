"""The compiled training and evaluation steps of a run: shapes and shardings in, executables out, no array made."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from bit_jax.config import NO_ADDITIONS, Additions
from bit_jax.formats import weights
from bit_jax.formats.weights import Params
from bit_jax.model.architecture import Architecture, HeadAlone
from bit_jax.scale import sharding
from bit_jax.training import steps
from bit_jax.training.flagperf import Rank0Share
from bit_jax.training.hyperrule import Recipe
from bit_jax.training.optimizer import sgd
from bit_jax.training.target import Target
from bit_jax.training.watched import make_watch_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions of a run.

    Attributes:
        train_step: (state, batch) -> (next state, the metrics of `steps.make_train_step`); it uses up its state.
        for_evaluation: parameters of `steps.evaluated` -> the standardized parameters that `eval_step` takes.
        eval_step: (standardized parameters, batch) -> sums.
        state_shape: shapes, dtypes, shardings and layouts of the state.
        optimizer: the optimizer of the training step.
        watch_step: (state, batch) -> the numbers of `watched.make_watch_step`; None where nobody watches.
    """

    train_step: Callable[[steps.TrainState, Any], tuple[steps.TrainState, dict]]
    for_evaluation: Callable[[Any], Any]
    eval_step: Callable[[Any, Any], dict]
    state_shape: steps.TrainState
    optimizer: optax.GradientTransformationExtraArgs
    watch_step: Callable[[steps.TrainState, Any], dict] | None = None

    def initial_state(self, params: Params) -> steps.TrainState:
        """Makes the state of step 0 with these parameters; it lies as `state_shape` says."""
        return initial_state(params, self.optimizer, self.state_shape)


def initial_state(
    params: Params, optimizer: optax.GradientTransformationExtraArgs, like: steps.TrainState
) -> steps.TrainState:
    """Makes the state of step 0 with these parameters, every array lying as `like` says."""
    init = functools.partial(steps.init_state, optimizer=optimizer, scales_loss=like.loss_scale is not None)
    return jax.jit(init, out_shardings=sharding.formats(like))(params)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The training step and the evaluation step before they are compiled, and the arrays that they take.

    Attributes:
        target: the devices that they are compiled for.
        train_step, eval_step: functions of arrays that lie as `state` and `batch` say, in any layout.
        update_step: the part of the training step that takes images and targets as the model is given them.
        watch_step: function of the same arrays whose numbers `--watch-every` shows.
        optimizer: the optimizer of the training step.
        state, batch, stopped: shapes, dtypes and shardings; the training step's batch has "stopped" too.
    """

    target: Target
    train_step: Callable[[steps.TrainState, Any], tuple[steps.TrainState, dict]]
    update_step: Callable[..., tuple[steps.TrainState, dict]]
    watch_step: Callable[[steps.TrainState, Any], dict]
    eval_step: Callable[[Any, Any], dict]
    optimizer: optax.GradientTransformationExtraArgs
    state: steps.TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    stopped: jax.ShapeDtypeStruct

    @property
    def training_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.batch | {"stopped": self.stopped}

    def lower_train_step(self) -> jax.stages.Lowered:
        return lower_step(self.train_step, self.state, self.training_batch)

    def lower_eval_step(self) -> jax.stages.Lowered:
        jitted = jax.jit(self.eval_step, in_shardings=(sharding.any_layout(self.state.params), None))
        return jitted.lower(self.state.params, self.batch)


def lower_step(step: Callable[..., tuple[Any, Any]], state: steps.TrainState, *batch: Any) -> jax.stages.Lowered:
    """Lowers a training step that uses up the given state, which may lie in whatever layout the compiler prefers.

    Args:
        step: (state, *batch) -> (next state, metrics).
        state, batch: arrays, or their shapes, dtypes and shardings.
    """
    free = sharding.any_layout(state)
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(free, *(None for _ in batch)),
        out_shardings=(free, None),
    )
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    return jitted.lower(like, *batch)


def make_steps(
    target: Target,
    architecture: Architecture,
    recipe: Recipe,
    *,
    momentum: float,
    seed: int,
    global_batch: int,
    share: Rank0Share | None = None,
    additions: Additions = NO_ADDITIONS,
) -> Steps:
    """Makes the steps of a run for the target's devices, which need not be here; no array is made."""
    model = target.model(architecture)
    optimizer, mesh = sgd(recipe.schedule, momentum, additions), target.mesh
    settings: dict[str, Any] = {"microbatches": target.microbatches, "additions": additions}
    mixed: dict[str, Any] = {"mixup": recipe.mixup, "seed": seed}
    return Steps(
        target=target,
        train_step=steps.make_train_step(model, optimizer, **mixed, **settings),
        update_step=steps.make_update_step(model, optimizer, **settings),
        watch_step=make_watch_step(model, optimizer, **mixed, **settings),
        eval_step=steps.make_eval_step(model, share),
        optimizer=optimizer,
        state=abstract_state(
            architecture, target.param_dtype, optimizer, mesh, scales_loss=target.precision.scales_loss
        ),
        batch=abstract_batch(global_batch, recipe.crop, mesh, architecture),
        stopped=jax.ShapeDtypeStruct((), jnp.bool_, sharding=sharding.replicated(mesh)),
    )


def compile_program(made: Steps, *, watched: bool = False) -> Program:
    """Compiles both steps ahead of time, so that no training step pays for it; the state then lies as the training
    step wants it, and parameters are standardized into what the evaluation step wants.

    Args:
        watched: whether to compile the program of `Steps.watch_step`, too, which is given the state as it lies.
    """
    options = made.target.compiler_options
    train_step = made.lower_train_step().compile(compiler_options=options)
    eval_step = made.lower_eval_step().compile(compiler_options=options)
    state = sharding.laid_out(made.state, train_step.input_formats[0][0])
    standard = sharding.laid_out(made.state.params, eval_step.input_formats[0][0])
    for_evaluation = jax.jit(steps.standardized, out_shardings=sharding.formats(standard))
    watch_step = jax.jit(made.watch_step, out_shardings=sharding.replicated(made.target.mesh))
    return Program(
        train_step=train_step,
        for_evaluation=for_evaluation.lower(steps.evaluated(state)).compile(compiler_options=options),
        eval_step=eval_step,
        state_shape=state,
        optimizer=made.optimizer,
        watch_step=watch_step.lower(state, made.batch).compile(compiler_options=options) if watched else None,
    )


def keep_programs(directory: Path) -> None:
    """Keeps every program that is compiled from here on in the directory, where the next process that would compile
    the same program finds it. On several hosts JAX keeps what host 0 compiled and nothing of the others.

    A program that is compiled anew need not round as before: where two of its cost estimates are nearly equal, XLA may
    fuse other operations in another process (https://github.com/openxla/xla/issues/49047).
    """
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        # not XLA's measured choices of algorithms beside the programs: their path would become part of a program's key,
        # and the programs would not be found again in a directory that was moved
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX goes on with the directory that it first used


def abstract_state(
    architecture: Architecture,
    dtype: jnp.dtype,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    *,
    scales_loss: bool = False,
) -> steps.TrainState:
    """Returns the shapes, dtypes and shardings of the training state."""
    flat = {key: jax.ShapeDtypeStruct(shape, dtype) for key, shape in architecture.layout.items()}
    init = functools.partial(steps.init_state, optimizer=optimizer, scales_loss=scales_loss)
    shapes = jax.eval_shape(init, weights.unflatten(flat))

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.param_sharding(mesh, leaf.shape))

    return jax.tree.map(placed, shapes)


def abstract_batch(
    global_batch: int, crop: int, mesh: Mesh, architecture: Architecture | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings of a batch on the mesh: of images, or of features for a head alone."""
    split = sharding.batch_sharding(mesh)
    if isinstance(architecture, HeadAlone):
        shown: dict[str, Any] = {"features": ((global_batch, architecture.channels), jnp.float32)}
    else:
        shown = {"image": ((global_batch, crop, crop, 3), jnp.uint8)}
    fields = shown | {
        "label": ((global_batch,), jnp.int32),
        "mask": ((global_batch,), jnp.bool_),
        "index": ((global_batch,), jnp.int32),
        "signal": ((global_batch,), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in fields.items()}
