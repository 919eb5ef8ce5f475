"""Fine-tuning: carries a run out, from what its work directory holds to final.npz and result.json."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax

from bit_jax.accounts.starts import LOST_HOST, Start
from bit_jax.accounts.timeline import Observer, Timeline, nobody
from bit_jax.checkpoints.saving import Saving
from bit_jax.formats import weights
from bit_jax.formats.weights import Params
from bit_jax.model.architecture import STANDARDIZE_EPS
from bit_jax.process.reporter import Reporter
from bit_jax.scale import alike, hosts, sharding
from bit_jax.scale.same_work import SameWork
from bit_jax.scale.watch import Sign
from bit_jax.training import resources, result
from bit_jax.training.log import Log
from bit_jax.training.loop import BEFORE, Loop
from bit_jax.training.program import compile_program, keep_programs
from bit_jax.training.run import Run
from bit_jax.training.stall import Watchdog
from bit_jax.training.steps import TrainState, evaluated
from bit_jax.training.watched import spikes_of
from bit_jax.training.workdir import Workdir
from bit_jax.watching import replicas
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.exits import deferring_signals
from input_pipeline.files import write_json

LAST_WORDS = 5.0  # seconds in which a store is told why the process ends; it may be the network that is cut
OBSERVED = (BEFORE, "whole")  # activities of the timeline: the evaluation before training, and training


def finetune(
    run: Run, observer: Observer = nobody, timeline: Timeline | None = None, watchdog: Watchdog | None = None
) -> dict[str, Any]:
    """Trains to the recipe's end, continuing what the work directory holds; writes final.npz and result.json. A run
    that is finished there is left alone.

    Args:
        observer: function that is told when the activities in `OBSERVED` begin and end, as by a `Timeline`. It is
            called in a thread, and neither an exception in it nor its waiting stops the run.
        timeline: this process's time since it began. None: it is counted from now on.
        watchdog: ends this process if nothing goes on in that timeline; it is given the account to say so. None: nobody
            does.

    Returns:
        The content of result.json.

    Raises:
        Stopped: a signal ended the run; the last finished step is saved.
        RunFailed: the loss is not finite.
        RequestError: a checkpoint or the work directory cannot be used, the hosts do not see the same one, the machine
            lacks something, or the run is finished without a figure that `--flagperf-compat` asks for.
    """
    finished = run.workdir.finished()
    # a host that takes another way than the others would wait for them forever
    alike.require("work directory", {f"the result in {run.workdir.path.name}": "there" if finished else alike.MISSING})
    if finished:
        known = finished.get("flagperf_compat") or ()
        if missing := [switch for switch in run.config.run.flagperf_compat if switch not in known]:
            raise RequestError(
                f"{run.workdir.name} holds this run, finished without --flagperf-compat {' '.join(missing)}, whose "
                "figures cannot be had afterwards; choose another --workdir, or leave that out"
            )
        if hosts.is_first():
            print(f"{run.workdir.name} holds this run, finished; its result:", file=sys.stderr)
        return finished
    resources.require(run.needs())
    timeline = timeline or Timeline()
    with run.workdir.owned():
        path = run.workdir.starts if hosts.is_first() else None
        machines = {"hosts": jax.process_count(), "devices": run.mesh.size}
        send = functools.partial(run.workdir.push_soon, LAST_WORDS)
        with Start(path, timeline, **machines, global_batch=run.global_batch, after=send) as start:
            if watchdog is not None:
                watchdog.account = start
            work = SameWork()
            hosts.observe(
                lambda: Sign(start.step, timeline.own()[1], timeline["input"], work.seconds, timeline.turns),
                lambda sentence: start.end(LOST_HOST, sentence),
            )
            return _trained(run, observer, timeline, start, work)


def told_by(reporter: Reporter, observer: Observer) -> Observer:
    """Returns an observer that has the reporter's thread tell `observer` of the activities in `OBSERVED`."""

    def tell(activity: str, seconds: float | None) -> None:
        if activity in OBSERVED:
            reporter(functools.partial(observer, activity, seconds))

    return tell


def _trained(run: Run, observer: Observer, timeline: Timeline, account: Start, work: SameWork) -> dict[str, Any]:
    """Does what `finetune` says, in a work directory that this process owns."""
    reporter = Reporter("observer")
    workdir, total = run.workdir, run.recipe.schedule.steps
    timeline.observer = told_by(reporter, observer)
    with contextlib.closing(reporter), deferring_signals():
        steps = run.steps()
        flags = run.config.run
        open_shared = functools.partial(workdir.open_checkpoints, flags.keep_checkpoints)
        saving = Saving.of(flags, open_shared, workdir.run, workdir.forget_run, timeline.goes_on)
        start = saving.start(steps.state)
        batches = run.loader(run.train).train(start, total)  # the first are read while the program compiles
        if run.target.deterministic and not run.target.on_cpu:
            keep_programs(workdir.programs)
        with timeline("compilation"):
            program = compile_program(steps, watched=run.config.run.watch_every is not None)
        if start:
            with timeline("restore"):
                state = jax.block_until_ready(saving.restore(start, program.state_shape))
        else:
            with timeline("initial parameters"):
                params = run.initial_params(program.state_shape.params)
                state = jax.block_until_ready(program.initial_state(params))
        account.continues_from(start)
        work.measure()

        def before_saving(state: TrainState) -> None:
            account.mark()
            work.measure()
            if run.config.run.check_replicas:
                with timeline("watching"):
                    replicas.check(state, run.mesh, int(state.step))

        saving.check = before_saving
        quiet = not hosts.is_first()
        with Log(workdir.path, start=start, stop=total, global_batch=run.global_batch, quiet=quiet) as log:
            if start:
                log.note(f"continuing {workdir.name} from step {start}{saving.origin}")
            for sentence in run.notes:
                log.note(sentence)
            loop = Loop(run, program, run.loader(run.validation), saving, timeline, log, account)
            try:
                with spikes_of(run, log.note) as loop.spikes:
                    state, accuracy = loop.train(state, start, batches)
            finally:  # a run that a signal ends says it, too
                reporter.close()
                if reporter.failure:
                    log.note(f"what observes the run failed ({reporter.failure}); the run went on without it")
                if account.failure:
                    log.note(f"{workdir.starts} cannot be written ({account.failure}); the time after is not in it")
        with timeline("saving"):
            saving.finish(int(state.step), state)
            save_final(workdir, run.whole(evaluated(state)), run.architecture.standardize_eps, timeline.goes_on)
    outcome = result.of(run, loop, state, accuracy, start)
    if hosts.is_first():
        outcome |= result.over_all_starts(account)
        write_json(workdir.result, outcome)
    return outcome


def save_final(
    workdir: Workdir,
    params: Params,
    standardize_eps: float = STANDARDIZE_EPS,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Writes final.npz on the first host; the others help to bring split arrays there, one at a time.

    Args:
        progress: function that the first host calls after each array that it has written.

    Raises:
        RunFailed: a parameter is not finite.
    """

    def fetch(array: Any) -> Any:
        progress()  # the array before is written
        return sharding.fetch(array)

    if hosts.is_first():
        try:
            weights.save(workdir.final, params, standardize_eps=standardize_eps, fetch=fetch)
        except weights.WeightsError as error:
            raise RunFailed(f"training ended with parameters that cannot be used: {error}") from None
    else:
        for array in weights.flatten(params).values():
            sharding.fetch(array)
