"""The content of result.json: what was run, how fast, and how accurate it became."""

from __future__ import annotations

from typing import Any

import jax

from bit_jax.accounts import goodput
from bit_jax.accounts.starts import Start
from bit_jax.model.precision import products
from bit_jax.training import figures, flagperf
from bit_jax.training.evaluation import Accuracy
from bit_jax.training.loop import BEFORE, Loop
from bit_jax.training.run import Run
from bit_jax.training.steps import TrainState


def over_all_starts(account: Start) -> dict[str, Any]:
    """Returns what result.json says of the time since the run first started; empty if starts.jsonl cannot be read."""
    if account.earlier is None:
        return {}
    whole = goodput.of([*account.earlier, [account.line()]])
    return {"over_all_starts": whole.described()}


def of(run: Run, loop: Loop, state: TrainState, accuracy: Accuracy, start: int) -> dict[str, Any]:
    """Returns the content of result.json for a run that was started or continued from step `start`."""
    cfg, mesh, stop = run.config, run.mesh, int(state.step)
    described = {
        "model": cfg.model.model,
        "architecture": str(run.architecture),
        "init": cfg.model.init,
        "precision": cfg.model.precision,
        "products": dict(zip(("matrix", "convolution"), products(run.target.precision), strict=True)),
        "mesh": dict(mesh.shape),
        "remat": run.target.remat,
        "microbatches": run.target.microbatches,
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "hosts": jax.process_count(),
        "batch_per_device": run.global_batch / mesh.size,
        "global_batch": run.global_batch,
        "seed": cfg.run.seed,
        "versions": figures.versions(),
        "dataset": run.train.name,
        "eval_dataset": run.validation.name,
        "steps": stop,
        "resumed_from_step": start,
        "replaced_examples": loop.replaced,
    }
    examples = (stop - start) * run.global_batch
    measured = figures.figures(loop.timeline, trained=examples, evaluation_before=loop.timeline[BEFORE])
    outcome: dict[str, Any] = {
        "final_acc1": accuracy.acc1,
        "final_acc5": accuracy.acc5,
        "final_loss": accuracy.loss,
        "eval_examples": accuracy.examples,
        "converged": None if cfg.run.target_acc1 is None else accuracy.acc1 >= cfg.run.target_acc1,
    }
    if state.loss_scale is not None:
        outcome["skipped_steps"] = int(state.loss_scale.skipped)
    if cfg.additions.ema is not None:
        outcome["weights"] = f"moving average with decay {cfg.additions.ema}, in final.npz and in the accuracies"
    return described | measured | outcome | _compat(run, loop, accuracy, examples)


def _compat(run: Run, loop: Loop, accuracy: Accuracy, examples: int) -> dict[str, Any]:
    """Returns what result.json says of `--flagperf-compat`: its switches, and the figures that they add."""
    switches = run.config.run.flagperf_compat
    added: dict[str, Any] = {"flagperf_compat": sorted(set(switches))}
    if "accuracy" in switches:
        added |= {"rank0_acc1": accuracy.rank0_acc1, "rank0_examples": accuracy.rank0_examples}
    if "schedule" in switches:
        added |= {"schedule_restarts_every": run.recipe.schedule.restart_every}
    if "p_core" in switches:
        added |= {"p_core_unsynchronized": flagperf.p_core_unsynchronized(loop.timeline, examples)}
    return added
