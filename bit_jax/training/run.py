"""Fine-tuning: restore or start, train with evaluations and checkpoints, save, report."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from bit_jax.config import Config
from bit_jax.model import weights
from bit_jax.model.architecture import Architecture
from bit_jax.model.precision import choose, products
from bit_jax.model.weights import Params
from bit_jax.scale import hosts, sharding
from bit_jax.training import figures
from bit_jax.training.checkpoint import Checkpoints
from bit_jax.training.evaluation import Accuracy
from bit_jax.training.hyperrule import Recipe
from bit_jax.training.log import Log
from bit_jax.training.loop import BEFORE, Loop, Split
from bit_jax.training.program import compile_program, keep_programs, on_cpu
from bit_jax.training.steps import TrainState
from bit_jax.training.timeline import Timeline
from bit_jax.training.workdir import Workdir
from input_pipeline.errors import RunFailed
from input_pipeline.exits import deferring_signals
from input_pipeline.files import write_json


def finetune(
    cfg: Config,
    recipe: Recipe,
    architecture: Architecture,
    initial_params: Callable[[Params], Params],
    *,
    train: Split,
    validation: Split,
    global_batch: int,
    mesh: Mesh,
    workdir: Workdir,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains to the recipe's end, continuing what the work directory holds; writes final.npz and result.json.

    Args:
        cfg, recipe: what to do; every None of `cfg` is settled in `recipe`.
        architecture: of the model, head included.
        initial_params: (shapes, dtypes, shardings, layouts) -> parameters that lie so; called only where nothing is
            continued.
        train, validation: the data.
        global_batch: rows of their batches.
        mesh: where they lie.
        workdir: of the run, owned by this process.
        notes: sentences that the log begins with.

    Returns:
        The content of result.json.

    Raises:
        Stopped: by a signal; the last finished step is saved.
        RunFailed: the loss is not finite.
        RequestError: a checkpoint or the work directory cannot be used.
    """
    timeline = Timeline()
    with deferring_signals():
        checkpoints = Checkpoints(workdir.checkpoints, keep=cfg.run.keep_checkpoints)
        start = checkpoints.newest or 0
        batches = train.batches.train(start, recipe.schedule.steps)  # the first are read while the program compiles
        if cfg.run.deterministic and not on_cpu(mesh):
            keep_programs(workdir.programs)
        with timeline("compilation"):
            program = compile_program(cfg, recipe, architecture, global_batch=global_batch, mesh=mesh)
        if start:
            state = checkpoints.restore(start, program.state_shape)
        else:
            state = program.initial_state(initial_params(program.state_shape.params))

        total = recipe.schedule.steps
        with Log(workdir.path, start=start, stop=total, global_batch=global_batch, quiet=not hosts.is_first()) as log:
            if start:
                log.note(f"continuing {workdir.path} from step {start}")
            for sentence in notes:
                log.note(sentence)
            loop = Loop(
                cfg, recipe, program, mesh, train, validation, global_batch, workdir, checkpoints, timeline, log
            )
            state, accuracy = loop.run(state, start, batches)
        stop = int(state.step)
        if stop > start:
            checkpoints.save(state)
        checkpoints.close()
        save_final(workdir, state.params)

    result = (
        _description(cfg, architecture, mesh, global_batch)
        | {
            "dataset": train.name,
            "eval_dataset": validation.name,
            "steps": stop,
            "resumed_from_step": start,
            "replaced_examples": loop.replaced,
        }
        | figures.figures(timeline, trained=(stop - start) * global_batch, before=timeline[BEFORE])
        | _outcome(cfg, state, accuracy)
    )
    if hosts.is_first():
        write_json(workdir.result, result)
    return result


def save_final(workdir: Workdir, params: Params) -> None:
    """Writes final.npz on the first host; the others help to bring split arrays there, one at a time.

    Raises:
        RunFailed: a parameter is not finite.
    """
    if hosts.is_first():
        try:
            weights.save(workdir.final, params, fetch=sharding.fetch)
        except weights.WeightsError as error:
            raise RunFailed(f"training ended with parameters that cannot be used: {error}") from None
    else:
        for array in weights.flatten(params).values():
            sharding.fetch(array)


def _outcome(cfg: Config, state: TrainState, accuracy: Accuracy) -> dict[str, Any]:
    """What result.json says of what came out."""
    found: dict[str, Any] = {
        "final_acc1": accuracy.acc1,
        "final_acc5": accuracy.acc5,
        "final_loss": accuracy.loss,
        "eval_examples": accuracy.examples,
        "converged": None if cfg.run.target_acc1 is None else accuracy.acc1 >= cfg.run.target_acc1,
    }
    return found if state.loss_scale is None else found | {"skipped_steps": int(state.loss_scale.skipped)}


def _description(cfg: Config, architecture: Architecture, mesh: Mesh, global_batch: int) -> dict[str, Any]:
    """What result.json says of the run before it is run."""
    return {
        "model": cfg.model.model,
        "architecture": str(architecture),
        "init": cfg.model.init,
        "precision": cfg.model.precision,
        "products": dict(zip(("matrix", "convolution"), products(choose(cfg.model.precision)), strict=True)),
        "mesh": dict(mesh.shape),
        "remat": cfg.scale.remat,
        "microbatches": cfg.scale.microbatches,
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "hosts": jax.process_count(),
        "batch_per_device": global_batch / mesh.size,
        "global_batch": global_batch,
        "seed": cfg.run.seed,
        "versions": figures.versions(),
    }
