"""Fine-tuning: restore or start, train with evaluations and checkpoints, save, report."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from bit_jax import metrics, weights
from bit_jax.checkpoint import Checkpoints
from bit_jax.config import Config
from bit_jax.errors import RunFailed, deferring_interrupts, raise_if_interrupted
from bit_jax.evaluate import Accuracy, evaluate
from bit_jax.hyperrule import Recipe
from bit_jax.program import Program, compile_program
from bit_jax.steps import TrainState
from bit_jax.weights import Architecture, Params
from bit_jax.workdir import Workdir


class Batches(Protocol):
    """What is asked of a loader: (number, batch) pairs whose rows lie on the mesh."""

    def train(self, start: int, stop: int) -> Iterator[tuple[int, Any]]: ...
    def evaluation(self) -> Iterator[tuple[int, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Split:
    """A loader and what is said of it in the result."""

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
    """Trains to the recipe's end, continuing what the work directory holds; writes final.npz and result.json.

    Args:
        cfg, recipe: what to do; every None of `cfg` is settled in `recipe`.
        architecture: of the model, head included.
        initial_params: called only where nothing is continued.
        train, validation: the data.
        global_batch: rows of their batches.
        mesh: where they lie.

    Returns:
        The content of result.json.

    Raises:
        RunFailed: the loss is not finite.
        RequestError: a checkpoint or the work directory cannot be used.
    """
    workdir = Workdir(cfg.run.workdir)
    timeline = metrics.Timeline()
    checkpoints = Checkpoints(workdir.checkpoints, keep=cfg.run.keep_checkpoints)
    start = checkpoints.latest or 0
    batches = train.batches.train(start, recipe.schedule.steps)  # the first are read while the program compiles
    with timeline("compilation"):
        program = compile_program(cfg, recipe, architecture, global_batch=global_batch, mesh=mesh)

    if start:
        state = checkpoints.restore(start, program.state_shape)
    else:
        state = program.initial_state(initial_params())

    with metrics.Log(workdir.path, start=start, stop=recipe.schedule.steps, global_batch=global_batch) as log:
        if start:
            log.note(f"continuing {workdir.path} from step {start}")
        loop = _Loop(cfg, recipe, program, train, validation, global_batch, checkpoints, timeline, log)
        state, accuracy = loop.run(state, start, batches)
    stop = int(state.step)
    if stop > start:
        checkpoints.save(state)
    checkpoints.close()
    weights.save(workdir.final, state.params)

    measured = metrics.figures(timeline, trained=(stop - start) * global_batch)
    result = _description(cfg, architecture, mesh, global_batch) | {
        "dataset": train.name,
        "eval_dataset": validation.name,
        "steps": stop,
        "resumed_from_step": start,
        "replaced_examples": loop.replaced,
        **measured,
        "final_acc1": accuracy.acc1,
        "final_acc5": accuracy.acc5,
        "final_loss": accuracy.loss,
        "eval_examples": accuracy.examples,
    }
    metrics.write_json(workdir.result, result)
    return result


def _description(cfg: Config, architecture: Architecture, mesh: Mesh, global_batch: int) -> dict[str, Any]:
    """What result.json says of the run before it is run."""
    return {
        "model": cfg.model.model,
        "architecture": str(architecture),
        "init": cfg.model.init,
        "precision": cfg.model.precision,
        "device_kind": mesh.devices.flat[0].device_kind,
        "devices": mesh.size,
        "hosts": jax.process_count(),
        "batch_per_device": global_batch / mesh.size,
        "global_batch": global_batch,
        "seed": cfg.run.seed,
        "versions": metrics.versions(),
    }


# waiting for input is worth a sentence where it takes more than this share of the training time and so many seconds
INPUT_KEEPS_UP, HARDLY_WAITED = 0.01, 1.0


@dataclasses.dataclass
class _Loop:
    cfg: Config
    recipe: Recipe
    program: Program
    train: Split
    validation: Split
    global_batch: int
    checkpoints: Checkpoints
    timeline: metrics.Timeline
    log: metrics.Log
    replaced: int = 0  # rows so far that showed another example because their own is damaged
    input_is_slow: bool = False

    def run(self, state: TrainState, start: int, batches: Iterator) -> tuple[TrainState, Accuracy]:
        """From step `start` to the end: the last state and its accuracy."""
        with self.timeline("whole"), deferring_interrupts():
            accuracy = self.evaluate(state, start) if self.evaluates_before(start) else None
            if not self.reached(accuracy):
                state, accuracy = self.train_from(state, start, batches, accuracy)
            return state, accuracy or self.evaluate(state, int(state.step))

    def train_from(
        self, state: TrainState, start: int, batches: Iterator, accuracy: Accuracy | None
    ) -> tuple[TrainState, Accuracy | None]:
        """All steps from `start`; the accuracy is that of the last state, None where it was not just measured."""
        run, steps = self.cfg.run, self.recipe.schedule.steps
        for index, batch in self.timeline.waiting("input", batches):
            step = index + 1
            with self.timeline("steps"):
                state, sums = jax.block_until_ready(self.program.train_step(state, batch))
            self.check(loss := float(sums["loss"]), step)
            self.replaced += int(sums["replaced"])
            self.log.advance(step)
            raise_if_interrupted()
            if step % run.log_every == 0:
                self.log.write(step, loss=loss, **self.speed(step - start))
                self.say_who_waits()
            accuracy = self.evaluate(state, step) if self.evaluates_after(step) else None
            if self.reached(accuracy):
                self.log.note(f"acc1 reached {run.target_acc1} after step {step}: training ends")
                break
            if step % run.checkpoint_every == 0 and step < steps:
                self.checkpoints.save(state)
        return state, accuracy

    def evaluate(self, state: TrainState, step: int) -> Accuracy:
        with self.timeline("evaluation"):
            batches = self.interruptible(self.validation.batches.evaluation())
            accuracy = evaluate(self.program.eval_step, state.params, batches, self.validation.examples)
        self.log.write(step, val_acc1=accuracy.acc1, val_acc5=accuracy.acc5, val_loss=accuracy.loss)
        return accuracy

    def interruptible(self, batches: Iterator[tuple[int, Any]]) -> Iterator[Any]:
        for _, batch in batches:
            raise_if_interrupted()
            yield batch

    def evaluates_before(self, start: int) -> bool:
        # a run that was stopped between reaching its target and saying so must not train past it
        stopped_here = self.cfg.run.target_acc1 is not None and self.evaluates_after(start)
        return stopped_here or (start == 0 and self.cfg.run.eval_at_start)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due after that many steps; "epoch" means whenever one has just been completed."""
        every = self.cfg.run.eval_every
        if every is None or step == 0:
            return False
        if every == "epoch":
            epochs, before = (s * self.global_batch // self.train.examples for s in (step, step - 1))
            return epochs > before
        return step % every == 0

    def reached(self, accuracy: Accuracy | None) -> bool:
        target = self.cfg.run.target_acc1
        return target is not None and accuracy is not None and accuracy.acc1 >= target

    def check(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise RunFailed(
                f"the loss of step {step} is {loss}; lower --base-lr {self.cfg.optimizer.base_lr} "
                f"in a new --workdir, or use a wider precision than {self.cfg.model.precision}"
            )

    def speed(self, steps_done: int) -> dict[str, float]:
        """Since training began here: images/s over steps and input, and the share of that time that was input."""
        training = self.timeline["steps"] + self.timeline["input"]
        return {
            "images_per_s": steps_done * self.global_batch / training,
            "input_wait": self.input_wait(),
        }

    def input_wait(self) -> float:
        return self.timeline["input"] / (self.timeline["steps"] + self.timeline["input"])

    def say_who_waits(self) -> None:
        """Once when the devices begin to wait for the input pipeline, and once when they no longer do."""
        slow = self.input_wait() > INPUT_KEEPS_UP and self.timeline["input"] > HARDLY_WAITED
        if slow and not self.input_is_slow:
            self.log.note(
                f"the devices wait for input, {self.input_wait():.0%} of the time so far: reading, decoding and "
                "resizing are the slower side; python -m input_pipeline bench measures them, --input-threads helps "
                "where cores are idle"
            )
        if self.input_is_slow and not slow:
            self.log.note(f"input keeps up: the devices waited {self.input_wait():.1%} of the time so far")
        self.input_is_slow = slow
