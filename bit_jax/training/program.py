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

from bit_jax.config import Config
from bit_jax.model import weights
from bit_jax.model.architecture import Architecture
from bit_jax.model.precision import choose
from bit_jax.model.resnetv2 import ResNetV2, param_dtype
from bit_jax.model.weights import Params
from bit_jax.scale import sharding
from bit_jax.training import steps
from bit_jax.training.hyperrule import Recipe
from bit_jax.training.optimizer import sgd


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs on the devices.

    Attributes:
        train_step: (state, batch) -> (state, what `steps.make_train_step` says); the given state is used up.
        for_evaluation: parameters -> what `eval_step` wants in their place.
        eval_step: (those, batch) -> sums.
        state_shape: shapes, dtypes, shardings and layouts of the state.
        optimizer: makes the state of a fresh run.
    """

    train_step: Callable[[steps.TrainState, Any], tuple[steps.TrainState, dict]]
    for_evaluation: Callable[[Any], Any]
    eval_step: Callable[[Any, Any], dict]
    state_shape: steps.TrainState
    optimizer: optax.GradientTransformationExtraArgs

    def initial_state(self, params: Params) -> steps.TrainState:
        """Step 0 with these parameters, which lie as `state_shape` says."""
        scales_loss = self.state_shape.loss_scale is not None
        init = functools.partial(steps.init_state, optimizer=self.optimizer, scales_loss=scales_loss)
        return jax.jit(init, out_shardings=sharding.formats(self.state_shape))(params)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Both steps before they are compiled.

    Attributes:
        train_step, eval_step: functions of arrays that lie as `state` and `batch` say, in any layout.
        optimizer: of the training step.
        state, batch, stopped: shapes, dtypes and shardings; the training step's batch has "stopped" too.
    """

    train_step: Callable[[steps.TrainState, Any], tuple[steps.TrainState, dict]]
    eval_step: Callable[[Any, Any], dict]
    optimizer: optax.GradientTransformationExtraArgs
    state: steps.TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    stopped: jax.ShapeDtypeStruct

    @property
    def training_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self.batch | {"stopped": self.stopped}

    def lower_train_step(self) -> jax.stages.Lowered:
        free = sharding.any_layout(self.state)
        jitted = jax.jit(self.train_step, donate_argnums=0, in_shardings=(free, None), out_shardings=(free, None))
        return jitted.lower(self.state, self.training_batch)

    def lower_eval_step(self) -> jax.stages.Lowered:
        jitted = jax.jit(self.eval_step, in_shardings=(sharding.any_layout(self.state.params), None))
        return jitted.lower(self.state.params, self.batch)


def make_steps(cfg: Config, recipe: Recipe, architecture: Architecture, *, global_batch: int, mesh: Mesh) -> Steps:
    """The steps of a run on the mesh's devices, which need not be here; no array is made."""
    precision, scale = choose(cfg.model.precision), cfg.scale
    model = architecture.model(precision.dtype, precision.product)
    model = tuned(model.clone(remat=scale.remat, gather=sharding.gather(mesh)), mesh)
    optimizer = sgd(recipe.schedule, cfg.optimizer.momentum)
    train_step = steps.make_train_step(
        model, optimizer, mixup=recipe.mixup, seed=cfg.run.seed, microbatches=scale.microbatches
    )
    dtype = param_dtype(precision.dtype)
    return Steps(
        train_step=train_step,
        eval_step=steps.make_eval_step(model),
        optimizer=optimizer,
        state=abstract_state(architecture, dtype, optimizer, mesh, scales_loss=precision.scales_loss),
        batch=abstract_batch(global_batch, recipe.crop, mesh),
        stopped=jax.ShapeDtypeStruct((), jnp.bool_, sharding=sharding.replicated(mesh)),
    )


def compile_program(
    cfg: Config, recipe: Recipe, architecture: Architecture, *, global_batch: int, mesh: Mesh
) -> Program:
    """Compiles both steps ahead of time, so that no training step pays for it; the state then lies as the training
    step wants it, and parameters are standardized into what the evaluation step wants."""
    made = make_steps(cfg, recipe, architecture, global_batch=global_batch, mesh=mesh)
    options = compiler_options(mesh, deterministic=cfg.run.deterministic)
    train_step = made.lower_train_step().compile(compiler_options=options)
    eval_step = made.lower_eval_step().compile(compiler_options=options)
    state = sharding.laid_out(made.state, train_step.input_formats[0][0])
    standard = sharding.laid_out(made.state.params, eval_step.input_formats[0][0])
    for_evaluation = jax.jit(steps.standardized, out_shardings=sharding.formats(standard))
    return Program(
        train_step=train_step,
        for_evaluation=for_evaluation.lower(state.params).compile(compiler_options=options),
        eval_step=eval_step,
        state_shape=state,
        optimizer=made.optimizer,
    )


def keep_programs(directory: Path) -> None:
    """Every program compiled from here on is kept in the directory, and the next process that would compile the same
    program takes it from there. On several hosts JAX keeps what host 0 compiled and nothing of the others.

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


def tuned(model: ResNetV2, mesh: Mesh) -> ResNetV2:
    """The same function of its parameters and images, written as it runs best on the mesh's devices.

    1x1 convolutions and those of few places are matrix products on CPUs: a third of a training step of R50x1. On
    GPUs cuDNN's convolutions need no change of layout between them, which products do: 272 instead of 215 GB of memory
    traffic in a step of R152x2.
    """
    return model.clone(paced=_hides_collectives(mesh), products=on_cpu(mesh))


def on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _hides_collectives(mesh: Mesh) -> bool:
    """Whether collectives are to run behind computation: where there are several GPUs."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "gpu"


YNNPACK = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
TOGETHER = 32 * 2**20  # bytes, over all devices, that one collective moves: enough for full bandwidth on NVLink


def compiler_options(mesh: Mesh, *, deterministic: bool = False) -> dict[str, str | bool]:
    """XLA's, beside its defaults.

    On GPUs values that the program rounds to bfloat16 stay rounded. By default XLA keeps float32 beside them where it
    computed that anyway, and writes both to memory: 8 % more traffic in a bfloat16 step of R152x2.

    On several GPUs, collectives run behind computation. By default XLA runs almost all gradient collectives of this
    program synchronously, and gathers or reduces as many arrays at once as it can, which would put much of a split
    model whole into memory.

    On CPUs matrix products and sums are YNNPACK's, as by default, but convolutions are not: XLA's own, of Eigen, take
    half to all of its time. Vectors are as wide as the processor has them.

    `deterministic` changes nothing on CPUs. On GPUs it excludes algorithms that add in a different order each time, and
    XLA takes the first algorithm that compiles instead of the one that it just measured as the fastest. The first
    option does both, but parts of XLA look at the second one alone. The third leaves matrix products to cuBLAS: XLA of
    JAX 0.11 uses no Triton kernels in deterministic programs, and yet makes fusions that only Triton can compile.
    """
    if on_cpu(mesh):
        return {"xla_cpu_experimental_ynn_fusion_type": YNNPACK, "xla_cpu_prefer_vector_width": "512"}
    options: dict[str, str | bool] = {"xla_allow_excess_precision": False}
    if deterministic:
        options |= {
            "xla_gpu_deterministic_ops": True,
            "xla_gpu_exclude_nondeterministic_ops": True,
            "xla_gpu_enable_triton_gemm": False,
        }
    if not _hides_collectives(mesh):
        return options
    return options | {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_all_gather_combine_threshold_bytes": str(TOGETHER),
        "xla_gpu_all_reduce_combine_threshold_bytes": str(TOGETHER),
        "xla_gpu_reduce_scatter_combine_threshold_bytes": str(TOGETHER // mesh.shape[sharding.FSDP]),  # of what remains
    }


def abstract_state(
    architecture: Architecture,
    dtype: jnp.dtype,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    *,
    scales_loss: bool = False,
) -> steps.TrainState:
    """Shapes, dtypes and shardings of the training state."""
    flat = {key: jax.ShapeDtypeStruct(shape, dtype) for key, shape in architecture.layout.items()}
    init = functools.partial(steps.init_state, optimizer=optimizer, scales_loss=scales_loss)
    shapes = jax.eval_shape(init, weights.unflatten(flat))

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.param_sharding(mesh, leaf.shape))

    return jax.tree.map(placed, shapes)


def abstract_batch(global_batch: int, crop: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch on the mesh."""
    split = sharding.batch_sharding(mesh)
    fields = {
        "image": ((global_batch, crop, crop, 3), jnp.uint8),
        "label": ((global_batch,), jnp.int32),
        "mask": ((global_batch,), jnp.bool_),
        "index": ((global_batch,), jnp.int32),
        "signal": ((global_batch,), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in fields.items()}
