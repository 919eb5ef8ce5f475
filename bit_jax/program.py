"""The compiled training and evaluation steps of a run: shapes and shardings in, executables out, no array made."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from bit_jax import mesh as meshes
from bit_jax import steps, weights
from bit_jax.config import Config
from bit_jax.hyperrule import Recipe
from bit_jax.optimizer import sgd
from bit_jax.precision import choose
from bit_jax.resnetv2 import param_dtype
from bit_jax.weights import Architecture, Params


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs on the devices.

    Attributes:
        train_step: (state, batch) -> (state, {"loss"}); the given state is used up.
        eval_step: (params, batch) -> sums.
        state_shape: shapes, dtypes and shardings of the state.
        optimizer: makes the state of a fresh run.
    """

    train_step: Callable[[steps.TrainState, Any], tuple[steps.TrainState, dict]]
    eval_step: Callable[[Any, Any], dict]
    state_shape: steps.TrainState
    optimizer: optax.GradientTransformation

    def initial_state(self, params: Params) -> steps.TrainState:
        """Step 0 with these parameters, laid out as `state_shape` says."""

        def place(leaf, like):
            return jax.device_put(jnp.asarray(leaf, like.dtype), like.sharding)

        placed = jax.tree.map(place, params, self.state_shape.params)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state_shape)
        return jax.jit(lambda params: steps.init_state(params, self.optimizer), out_shardings=shardings)(placed)


def compile_program(
    cfg: Config, recipe: Recipe, architecture: Architecture, *, global_batch: int, mesh: Mesh
) -> Program:
    """Compiles both steps ahead of time, so that no training step pays for it."""
    precision = choose(cfg.model.precision)
    model = architecture.model(precision.dtype, precision.product)
    optimizer = sgd(recipe.schedule, cfg.optimizer.momentum)
    state = abstract_state(architecture, param_dtype(precision.dtype), optimizer, mesh)
    batch = abstract_batch(global_batch, recipe.crop, mesh)
    train_step = steps.make_train_step(model, optimizer, mixup=recipe.mixup, seed=cfg.run.seed)
    return Program(
        train_step=jax.jit(train_step, donate_argnums=0).lower(state, batch).compile(),
        eval_step=jax.jit(steps.make_eval_step(model)).lower(state.params, batch).compile(),
        state_shape=state,
        optimizer=optimizer,
    )


def abstract_state(
    architecture: Architecture, dtype: jnp.dtype, optimizer: optax.GradientTransformation, mesh: Mesh
) -> steps.TrainState:
    """Shapes, dtypes and shardings of the training state."""
    flat = {key: jax.ShapeDtypeStruct(shape, dtype) for key, shape in weights.layout(architecture).items()}
    shapes = jax.eval_shape(lambda params: steps.init_state(params, optimizer), weights.unflatten(flat))

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=meshes.param_sharding(mesh, leaf.shape))

    return jax.tree.map(placed, shapes)


def abstract_batch(global_batch: int, crop: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch on the mesh."""
    sharding = meshes.batch_sharding(mesh)
    fields = {
        "image": ((global_batch, crop, crop, 3), jnp.uint8),
        "label": ((global_batch,), jnp.int32),
        "mask": ((global_batch,), jnp.bool_),
        "index": ((global_batch,), jnp.int32),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in fields.items()}
