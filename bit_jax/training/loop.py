"""The training loop: steps, evaluations, checkpoints, and an end in good order when a signal or a NaN asks for one."""

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import jax
import numpy as np

from bit_jax.accounts.starts import Start
from bit_jax.accounts.timeline import Timeline
from bit_jax.checkpoints.saving import Saving
from bit_jax.compiled import profile
from bit_jax.model.architecture import HeadAlone
from bit_jax.scale import hosts, sharding
from bit_jax.training.asked import NOTHING, Asked, Asking
from bit_jax.training.evaluation import Accuracy, evaluate
from bit_jax.training.log import Log
from bit_jax.training.program import Program
from bit_jax.training.steps import TrainState, evaluated
from bit_jax.watching import numbers
from bit_jax.watching.spikes import Spikes
from input_pipeline.errors import RunFailed, Stopped
from input_pipeline.files import replacing

if TYPE_CHECKING:
    from bit_jax.training.run import Run

# waiting for input is worth a sentence where it takes more than this share of the training time and so many seconds
INPUT_KEEPS_UP, HARDLY_WAITED = 0.01, 1.0
BEFORE = "evaluation before training"  # an activity of the timeline
TRAINING = ("steps", "dispatch", "reading", "input")  # the activities that are the training time of its rates


class Batches(Protocol):
    """The loader's part that the loop needs: it yields (number, batch) pairs whose rows lie on the mesh."""

    def evaluation(self) -> Iterator[tuple[int, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Begun:
    """A step that the devices work on, or have finished.

    Attributes:
        number: the step's number, starting at 1.
        batch: the batch that it takes.
        metrics: what the step returns beside the state, on the devices.
        end: the metrics on the host once the step has finished, and the time of that by `time.perf_counter`.
    """

    number: int
    batch: dict[str, jax.Array]
    metrics: dict[str, jax.Array]
    end: "Future[tuple[dict[str, np.ndarray], float]]"


def _finished(metrics: dict[str, jax.Array]) -> tuple[dict[str, np.ndarray], float]:
    on_host = jax.device_get(metrics)
    return on_host, time.perf_counter()


class _Signalled(Exception):
    """A signal, of that number, asked a host to end; all hosts see it after the same step."""

    def __init__(self, number: int):
        self.number = number


@dataclasses.dataclass(eq=False)
class Loop:
    """The steps of a run, its evaluations and its checkpoints.

    Attributes:
        run: the run that is trained.
        program: the run's compiled steps.
        validation: batches of the split that is evaluated.
        saving, timeline, log: the places where the state, the time and the metrics go.
        account: the account of this start, over whose steps the time is divided.
        replaced: number of rows so far that showed another example because their own is damaged.
        input_is_slow: whether the log said last that the devices wait for input.
        spikes: takes the loss of every step; None where nobody says them, as on all hosts but the first.
    """

    run: "Run"
    program: Program
    validation: Batches
    saving: Saving
    timeline: Timeline
    log: Log
    account: Start
    replaced: int = 0
    input_is_slow: bool = False
    spikes: Spikes | None = None

    def train(self, state: TrainState, start: int, batches: Iterator) -> tuple[TrainState, Accuracy]:
        """Trains from step `start` to the end, and returns the last state and its accuracy.

        Raises:
            Stopped: a signal ended the run; the state of the last finished step is saved.
            RunFailed: a loss is not finite; the state before that step is saved, and the step's batch. Or devices hold
                different copies of the state; then that is not saved.
        """
        accuracy = self.evaluate(state, start, BEFORE) if self.evaluates_before(start) else None
        if self.reached(accuracy):
            return state, accuracy
        with self.timeline("whole"):  # FlagPerf's clock starts after the evaluation before training
            state, accuracy = self.train_from(state, start, batches, accuracy)
            return state, accuracy or self.evaluate(state, int(state.step))

    def train_from(
        self, state: TrainState, start: int, batches: Iterator, accuracy: Accuracy | None
    ) -> tuple[TrainState, Accuracy | None]:
        """Takes all steps from `start`, and returns the last state and its accuracy, or None where that was not just
        measured."""
        flags, steps = self.run.config.run, self.run.recipe.schedule.steps
        recorder = profile.Recorder(
            self.run.workdir.profile,
            self.program.train_step,
            self.run.config.model.precision,
            remaining=range(start + 1, steps + 1),
            wanted=flags.profile if hosts.is_first() else 0,
        )
        begun: deque[Begun] = deque()
        waiting = ThreadPoolExecutor(1, thread_name_prefix="until a step has finished")
        try:
            for index, batch in self.arriving(batches, begun):
                step, wished = index + 1, False
                if flags.watch_every is not None and step % flags.watch_every == 0:
                    wished = self.watch(state, step, batch, begun, start)
                if sentence := recorder.before(step, self.training):
                    self.log.note(sentence)
                with self.timeline("steps"):
                    stopped = begun[-1].metrics["failed"] if begun else self.going_on
                    previous_state = [state]
                    with self.timeline("dispatch"):
                        batch = self.asking(batch, save=self.saving.wished) | {"stopped": stopped}
                        state, metrics = self.program.train_step(state, batch)
                    # the state before the step is let go while the devices work, and not by this thread, which has to
                    # begin the next one: it is hundreds of arrays, for each of which a thread stands in line with the
                    # input's for Python's lock
                    waiting.submit(previous_state.clear)
                    begun.append(Begun(step, batch, metrics, waiting.submit(_finished, metrics)))
                    shown = step == steps or self.evaluates_after(step) or self.saving.due(step, wished) == "shared"
                    wished |= self.finish(begun, state, start, leave=0 if shown or recorder.waits_for(step) else 1)
                if sentence := recorder.after(step, self.training):
                    self.log.note(sentence)
                accuracy = self.evaluate(state, step) if self.evaluates_after(step) else None
                if self.reached(accuracy):
                    self.log.note(f"acc1 reached {flags.target_acc1} after step {step}: training ends")
                    break
                if step < steps:
                    with self.timeline("saving"):
                        self.saving.save(step, state, wished)
        finally:
            waiting.shutdown(wait=False)
        return state, accuracy

    def arriving(self, batches: Iterator, begun: deque[Begun]) -> Iterator:
        """Yields the batches. The time in which one is awaited and no step is under way counts as `input`, because the
        devices have nothing to do then."""
        while True:
            asked = time.perf_counter()
            with self.timeline("reading"):
                batch = next(batches, None)
            if batch is None:
                return
            if not begun or begun[-1].end.done():
                idle_since = max(asked, begun[-1].end.result()[1]) if begun else asked
                self.timeline.part("input", time.perf_counter() - idle_since, of="reading")
            yield batch

    def finish(self, begun: deque[Begun], state: TrainState, start: int, *, leave: int) -> bool:
        """Waits for the begun steps but the last `leave`, and logs and checks their metrics.

        One step is left under way while the next batch is fetched and its step begun, so that the devices need not wait
        for that; none is left where the state after a step is looked at.

        Args:
            begun: the steps, in order; those that have finished are removed.
            state: the state after the last of them.
            start: the step that the run started from.
            leave: number of steps to leave under way.

        Returns:
            Whether a host wishes that the state is saved; then none is left under way.
        """
        asked = NOTHING
        while len(begun) > (leave if asked == NOTHING else 0):
            step = begun.popleft()
            metrics, _ = step.end.result()
            self.check(metrics, step, state)
            self.account.step = step.number
            self.replaced += int(metrics["replaced"])
            self.log.advance(step.number)
            if self.spikes is not None:
                self.spikes(step.number, float(metrics["loss"]))
            if step.number % self.run.config.run.log_every == 0:
                scale = {"loss_scale": float(metrics["scale"])} if "scale" in metrics else {}
                self.log.write(step.number, loss=float(metrics["loss"]), **scale, **self.speed(step.number - start))
                if not isinstance(self.run.architecture, HeadAlone):  # a head alone waits for its rows, as it should
                    self.say_who_waits()
            asked = max(asked, Asked.of(int(metrics["signal"])))
        if asked.signal:
            self.end(asked.signal, state)
        return asked.save

    def watch(self, state: TrainState, step: int, batch: dict[str, jax.Array], begun: deque[Begun], start: int) -> bool:
        """Logs the numbers of `numbers.of_step` of a step that is about to begin; the begun ones are finished first, so
        that the time is this program's alone. Returns what `finish` returns of those."""
        with self.timeline("steps"):
            wished = self.finish(begun, state, start, leave=0)
        with self.timeline("watching"):
            assert self.program.watch_step is not None
            measured = jax.device_get(self.program.watch_step(state, self.asking(batch)))
        self.log.write(step, numbers.WHOLE, **numbers.finite(measured))
        return wished

    def evaluate(self, state: TrainState, step: int, activity: str = "evaluation") -> Accuracy:
        """Returns the accuracy of the state after `step` steps, and logs it; its time counts as `activity`.

        Where a moving average of the parameters is kept, the accuracy is the average's."""

        def check(sums: dict) -> None:
            number = Asked.of(int(sums["signal"])).signal  # this waits until the batch is finished
            self.timeline.goes_on()
            if number:
                raise _Signalled(number)

        with self.timeline(activity):
            batches = (self.asking(batch) for _, batch in self.validation.evaluation())
            try:
                params = self.program.for_evaluation(evaluated(state))
                accuracy = evaluate(self.program.eval_step, params, batches, len(self.run.validation), check)
            except _Signalled as asked:
                self.end(asked.number, state)
        of_share = {} if accuracy.rank0_acc1 is None else {"val_rank0_acc1": accuracy.rank0_acc1}
        self.log.write(step, val_acc1=accuracy.acc1, val_acc5=accuracy.acc5, val_loss=accuracy.loss, **of_share)
        return accuracy

    @functools.cached_property
    def asking(self) -> Asking:
        return Asking(self.run.global_batch, self.run.mesh)

    @functools.cached_property
    def going_on(self) -> jax.Array:
        """False on all devices: no step before the first one has failed."""
        return jax.make_array_from_callback((), sharding.replicated(self.run.mesh), lambda _: np.asarray(False))

    def end(self, number: int, state: TrainState) -> None:
        """Saves the state, and raises Stopped by the signal of that number."""
        step = int(state.step)
        with self.timeline("saving"):
            self.saving.finish(step, state)
        sentence = f"ended by a signal after step {step}, which is saved; the same command continues"
        raise hosts.on_all_hosts(Stopped(number, sentence))

    def check(self, metrics: dict[str, np.ndarray], begun: Begun, state: TrainState) -> None:
        """Raises RunFailed if the step failed. Then neither it nor a step begun after it changed anything, so `state`
        is the state before it."""
        if not metrics["failed"]:
            return
        step, loss, cfg = begun.number, float(metrics["loss"]), self.run.config
        with self.timeline("saving"):
            self.saving.finish(step - 1, state)
        shown = self.run.workdir.path / f"failed_step{step}.host{jax.process_index()}.npz"
        arrays: dict[str, Any] = {name: sharding.own_rows(rows) for name, rows in begun.batch.items() if rows.ndim}
        with replacing(shown) as file:
            np.savez(file, **arrays)
        sentence = (
            f"the loss of step {step} is {loss}; {shown} holds its batch, the state before it is kept, and the same "
            f"command repeats the step. Lower --base-lr {cfg.optimizer.base_lr} in a new --workdir, or use a "
            f"wider precision than {cfg.model.precision}"
        )
        raise hosts.on_all_hosts(RunFailed(sentence))

    def evaluates_before(self, start: int) -> bool:
        """Whether an evaluation is due before the step after `start`. All hosts have to make this call."""
        # a run that ended within an evaluation, or between reaching its target and saying so
        due = (self.evaluates_after(start) and not self.log.evaluated(start)) or (
            start == 0 and self.run.config.run.eval_at_start
        )
        return bool(hosts.agree(int(due)))  # each host has read metrics.jsonl itself, perhaps not as new as host 0's

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation is due after that many steps; "epoch" means whenever one has just been completed."""
        every = self.run.config.run.eval_every
        if every is None or step == 0:
            return False
        if every == "epoch":
            epochs, epochs_before = (s * self.run.global_batch // len(self.run.train) for s in (step, step - 1))
            return epochs > epochs_before
        return step % every == 0

    def reached(self, accuracy: Accuracy | None) -> TypeGuard[Accuracy]:
        """Whether there is a target and the accuracy reaches it."""
        target = self.run.config.run.target_acc1
        return target is not None and accuracy is not None and accuracy.acc1 >= target

    def speed(self, steps_done: int) -> dict[str, float]:
        """Returns images/s since training began here, over steps and input, and the share of input in that time."""
        return {
            "images_per_s": steps_done * self.run.global_batch / self.training,
            "input_wait": self.input_wait(),
        }

    def input_wait(self) -> float:
        """Returns the share of the training time in which the devices waited for input."""
        return self.timeline["input"] / self.training

    @property
    def training(self) -> float:
        """Seconds that steps and reading for them took, with the step that is awaited just now."""
        own, _, _ = self.timeline.own()
        return sum(own.get(activity, 0.0) for activity in TRAINING)

    def say_who_waits(self) -> None:
        """Logs a sentence once the devices begin to wait for the input pipeline, and one once they no longer do."""
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
