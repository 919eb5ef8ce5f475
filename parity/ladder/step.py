"""Does a real run's step compute what it should, and did it while the run ran? `python -m parity step`.

Two questions are answered apart. Does the code at hand compute the step right: on the run's own state and batch, both
frameworks and float64, by the ladder's rungs? And does what the run recorded follow from its checkpoint: see `replay`?
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

import input_pipeline
from input_pipeline.errors import RequestError
from input_pipeline.flags import Switch, UserPath, require_positive, typed
from parity.ladder import finite, rungs
from parity.ladder.attestation import attest
from parity.ladder.ladder import Ladder, RungResult, timed, working_folder
from parity.ladder.question import Question
from parity.ladder.replay import RUNG, Judged, Replay, Window, window
from parity.ladder.run_ladder import RunLadder
from parity.ladder.verdict import Line
from parity.options import Options
from parity.sides.inputs import Batches
from parity.sides.recorded import RecordedRun, State, on_cpu
from parity.sides.side import parse_side

LOOKS_AHEAD = 20  # steps after a checkpoint that are repeated unless --steps says otherwise


@dataclasses.dataclass(frozen=True)
class Step:
    """The run, and which of its steps to judge."""

    workdir: UserPath
    """Work directory of a run of train.py. It is only read; the run may still be going on."""
    step: int | None = None
    """Number of the step to judge, counted as in metrics.jsonl: step 121 leads from checkpoint 120 to the next.
    If its loss was not finite, the batch in the failed_step file is taken. None: --first searches for a step."""
    first: Switch = False
    """Search for the first checkpoint whose next steps leave what rounding explains, and judge the step after it."""
    steps: int = LOOKS_AHEAD
    """The most steps to repeat after a checkpoint, to hold what the run recorded of them against float64.
    A next checkpoint within them is held against float64 too, every parameter and its momentum."""
    rows: int | None = None
    """Rows of the step's batch on which the code at hand is judged; the number must be even. None: the whole batch.
    Steps that are repeated always take the whole batch."""
    reference: str = "torch"
    """Reference side, written like --reference of a comparison. In float64 it also repeats the run's steps."""
    candidate: str = "jax:tuned"
    """Candidate side, written like --candidate of a comparison; jax:tuned is compiled as train.py compiles."""
    disturbances: int = 3
    """Float64 runs with disturbances as large as rounding errors, which show what error to expect."""
    dataset: str | None = None
    """Dataset of the run, if it is no longer where it was. None: as config.json says."""
    data_dir: UserPath | None = None
    """Directory with the prepared tfds datasets. None: tfds's default directory."""
    run: UserPath | None = None
    """Folder that keeps the report. None: a folder below runs/parity/, named by the time."""
    json: UserPath | None = None
    """File to write the report to as JSON, too. None: only the run's folder has it."""
    html: UserPath | None = None
    """File to write the report to as a web page, too. None: only the run's folder has it."""
    junit: UserPath | None = None
    """File to write JUnit XML to, with one test case per array. None: no JUnit XML is written."""

    # name of a fault that the tests inject into one side, see `faults.py`
    fault: Annotated[str | None, tyro.conf.Suppress] = None

    def __post_init__(self):
        if (self.step is None) != self.first:
            raise RequestError("give either --step N, the number of a step, or --first")
        require_positive(typed(self, "step", "steps", "rows", "disturbances"))
        if self.rows is not None and self.rows % 2:
            raise RequestError(f"--rows {self.rows} must be even: mixup pairs neighbours")


Flags = Annotated[Step, tyro.conf.OmitArgPrefixes]
NOTHING_ATTESTED: dict[str, Any] = {"sides": {}, "mismatches": [], "classes": {}}


@dataclasses.dataclass
class Examination:
    """What was found.

    Attributes:
        ladder: comparison that judged the code at hand or, if that was not judged, one that repeated steps; its
            processes have ended.
        attestation: see `attest`.
        results: results of the rungs.
        answers: sentences that answer the two questions.
        conclusion: one sentence on both.
    """

    ladder: Ladder
    attestation: dict[str, Any]
    results: list[RungResult]
    answers: list[str]
    conclusion: str

    @property
    def holds(self) -> bool:
        return all(result.verdict != "bug" for result in self.results)


def examine(request: Step, console: Console) -> Examination:
    """Answers the two questions for a step or, with --first, searches for the checkpoint first.

    Raises:
        RequestError: a side cannot go on from a run's state, the folder holds no run, the step is out of its range, the
            dataset cannot be opened, or nothing is recorded that a question could be answered from.
        RunFailed: a side's process died.
    """
    for side in (request.reference, request.candidate):
        parse_side(side)  # an exported file and a probe, which a comparison takes, are refused
    on_cpu()
    run = RecordedRun.of(request.workdir, dataset=request.dataset, data_dir=request.data_dir)
    if run.global_batch % 2:
        raise RequestError(f"{run.workdir} has batches of {run.global_batch} rows, and parity's must be even")
    examiner = Examiner(request, run, console)
    return examiner.search() if request.first else examiner.at(request.step or 0)


@dataclasses.dataclass
class Examiner:
    """Examines one run.

    Attributes:
        request, run, console: what is asked, of which run, and where progress is shown.
        record: verdicts on what the run recorded.
        answers: sentences so far.
        batch_differs: whether the batch that the run left of a failed step is not the dataset's.
        left: step of the checkpoint that the record does not follow from, if there is one.
    """

    request: Step
    run: RecordedRun
    console: Console
    record: RungResult = dataclasses.field(default_factory=lambda: RungResult(RUNG, []))
    answers: list[str] = dataclasses.field(default_factory=list)
    batch_differs: bool = False
    left: int = 0

    def search(self) -> Examination:
        """Judges the steps after each checkpoint, the oldest first, up to the first that do not follow from it."""
        run = self.run
        windows = [window(run, start, self.request.steps) for start in self.starts()]
        telling = [each for each in windows if each.says_anything]
        if not telling:
            raise RequestError(self._nothing_recorded(windows))
        source = run.source()
        with self.ladder(run.state(telling[0].start), source) as ladder:
            judged = self.follow(ladder, source, telling)
        newest = self.starts()[-1]
        if newest and (not judged or judged[-1].follows) and run.state(newest).not_finite:
            return self.at(newest + 1)
        if not judged:
            raise RequestError(f"{run.workdir}: {self.answers[-1]}, so nothing of its record can be judged")
        if judged[-1].follows:
            conclusion = (
                f"HOLDS: what the run recorded follows from its checkpoints, in {len(judged)} stretches of steps "
                f"between step {judged[0].window.start + 1} and step {judged[-1].window.stop}"
            )
            return Examination(ladder, NOTHING_ATTESTED, [self.record], self.answers, conclusion)
        return self.judge_code(run.state(judged[-1].window.start), source)

    def at(self, step: int) -> Examination:
        """Judges a step by its number."""
        run, checkpoint = self.run, self._state_before(step)
        state, failed = run.state(checkpoint), run.failed_batch(step)
        if broken := state.not_finite:
            self.say(
                f"the state after step {checkpoint} holds NaN or infinity in {len(broken)} of its {len(state.named)} "
                f"arrays, the first {broken[0]}; so step {checkpoint}, which made it, is judged in place of step {step}"
            )
            return self.at(checkpoint)
        source = self._source(needed=failed is None or checkpoint < step - 1)
        if failed is not None and source is not None:
            self._compare_batches(source, step, failed)
        ahead = window(run, checkpoint, max(self.request.steps, step - checkpoint))
        if source is not None and (ahead.says_anything or checkpoint < step - 1):
            with self.ladder(state, source) as ladder:
                if ahead.says_anything:
                    self.follow(ladder, source, [ahead])
                if checkpoint < step - 1:
                    state = self._advanced(ladder, source, state, step - 1)
        if not self.record.lines:
            self.say(f"the run has recorded nothing that depends on a step after checkpoint {checkpoint}")
        return self.judge_code(state, source, failed)

    def starts(self) -> list[int]:
        """Returns the steps after which the run's state is here, the oldest first; 0 stands for its weight file."""
        return ([0] if self.run.initial_weights() is not None else []) + self.run.checkpoints()

    @contextlib.contextmanager
    def ladder(self, state: State, source: Any, batch: Batches | None = None) -> Iterator[RunLadder]:
        """Makes a comparison on the run's batches from a state on."""
        options, run = self.request, self.run
        with working_folder() as folder:
            weight_file = state.save_weights(folder / f"parameters {state.step}.npz", run.standardize_eps)
            flags = _options(options, run, str(weight_file))
            ladder = RunLadder(flags, folder, self.console, run=run, source=source, step=state.step, batch=batch)
            with ladder:
                yield ladder

    def say(self, sentence: str) -> None:
        """Shows a sentence now and keeps it as a part of the answers."""
        self.console.print(sentence, markup=False, highlight=False)
        self.answers.append(sentence)

    # Does what the run recorded follow from its checkpoints?

    def follow(self, ladder: Ladder, source: input_pipeline.Source, windows: list[Window]) -> list[Judged]:
        """Judges windows up to the first that does not follow; adds the verdicts to the record."""
        run, judged, began = self.run, [], time.perf_counter()
        for each in windows:
            state = run.state(each.start)
            ended = run.state(each.stop) if each.ends else None
            if ended is not None and ended.not_finite:
                ended = None  # not a number is no error that could be measured; `at` finds the step that made it
            if run.precision == "fp16" and (ended is None or ended.skipped != state.skipped):
                self.say(
                    f"steps {each.start + 1} to {each.stop} are not judged: float16 skips steps whose gradients "
                    "overflow, and the record does not say which"
                )
                continue
            with ladder.forgetting():
                replay = Replay(ladder, run, source, each, state)
                judged.append(replay.judge(ended))
                self.say(judged[-1].sentence)
                if not judged[-1].follows:
                    self.say(replay.repeated_by("candidate"))
            self.record.lines += judged[-1].lines
            if not judged[-1].follows:
                self.left = each.start
                break
        self.record.seconds += time.perf_counter() - began
        self.record.details["losses recorded"] = [each.losses for each in judged]
        return judged

    def _advanced(self, ladder: Ladder, source: input_pipeline.Source, state: State, step: int) -> State:
        """Returns the state after that many steps, which float64 computes from an earlier one."""
        self.say(
            f"there is no checkpoint of step {step}: float64 repeats the steps from checkpoint {state.step} to it, and "
            "the code is judged on what that gives, rounded as the run keeps it"
        )
        whole = Window(state.step, step, {}, ends=False)
        with ladder.forgetting():
            state = Replay(ladder, self.run, source, whole, state).end()
        finite.require(state, f"float64's state after step {step}")
        return state

    # Does the code at hand compute the step right?

    def judge_code(
        self, state: State, source: input_pipeline.Source | None, failed: Batches | None = None
    ) -> Examination:
        """Judges the step after a state by the ladder's rungs, in both frameworks and float64."""
        step, results = state.step + 1, [self.record] if self.record.lines else []
        with self.ladder(state, source, failed) as ladder:
            start = state.save(ladder.folder / "state.npz")
            attestation = attest(ladder, rungs=())
            update = _update(ladder, self.run, step, str(start))
            rung: dict[str, Callable[[Ladder], RungResult]] = {
                "finite": lambda ladder: finite.finite(ladder, update),
                **{name: rungs.RUNGS[name] for name in ("forward", "loss", "gradients")},
                "optimizer": lambda ladder: _optimizer(ladder, update),
            }
            code: list[RungResult] = []
            for name, climb in rung.items():
                code.append(result := timed(climb, ladder))
                self.console.print(f"{name}: {result.verdict}, {result.seconds:.1f} s")
                if result.verdict == "bug" or finite.ends(result):
                    break
            for sentence in code[0].findings:
                self.say(sentence)
        right = all(result.verdict != "bug" for result in code)
        sides = " and ".join(str(side) for side in ladder.sides.values())
        judged = f"{', '.join(result.name for result in code)}; {sides}, {ladder.options.precision}"
        self.say(f"the code at hand computes step {step} {'right' if right else 'WRONG'} ({judged})")
        broken = ", ".join(code[0].details.get("not finite", []))
        conclusion = self._conclusion(step, right, f"; in {broken} it is not finite on either side" if broken else "")
        return Examination(ladder, attestation, results + code, self.answers, conclusion)

    def _conclusion(self, step: int, right: bool, finite: str) -> str:
        follows = self.record.verdict != "bug"
        if right and follows:
            told = ", and what the run recorded follows from its checkpoint" if self.record.lines else ""
            return f"HOLDS: the code at hand computes step {step} right{told}{finite}"
        if right and self.batch_differs:
            return (
                f"FAILS: the code at hand computes step {step} right, but the run had another batch than the dataset's"
            )
        if right:
            return (
                f"FAILS: what the run recorded does not follow from checkpoint {self.left}, and the code at hand "
                f"computes step {step} right: look for what was different when the run ran, such as the device, the "
                "driver, the versions, or the code"
            )
        told = "" if follows else ", and what the run recorded does not follow from its checkpoint either"
        return f"FAILS: the code at hand computes step {step} wrong{told}"

    def _state_before(self, step: int) -> int:
        run = self.run
        if step > run.recipe.schedule.steps:
            raise RequestError(f"--step {step} is beyond the run's last step, {run.recipe.schedule.steps}")
        earlier = [start for start in self.starts() if start < step]
        if not earlier:
            there = ", ".join(map(str, run.checkpoints())) or "none"
            raise RequestError(
                f"{run.workdir} holds no state before step {step}; its checkpoints are of steps: {there}. Choose a "
                "later step; --keep-checkpoints of train.py keeps more of them"
            )
        return earlier[-1]

    def _source(self, *, needed: bool) -> input_pipeline.Source | None:
        """Opens the dataset; None if it cannot be opened and is not needed."""
        try:
            return self.run.source()
        except RequestError as error:
            if needed:
                raise
            self.say(f"the dataset cannot be opened, so only the batch that the run left is judged ({error})")
            return None

    def _compare_batches(self, source: input_pipeline.Source, step: int, failed: Batches) -> None:
        """Says whether the batch that the run left is the one that the dataset gives."""
        again = self.run.batches(source, step - 1, 1)
        rows = [
            row
            for row in range(self.run.global_batch)
            if not np.array_equal(again.image[0, row], failed.image[0, row])
            or again.label[0, row] != failed.label[0, row]
        ]
        self.say(
            f"the batch that the run left of step {step} differs from the dataset's in {len(rows)} rows, the first "
            f"{rows[0]}: the input was damaged, or the dataset has changed"
            if rows
            else f"the batch that the run left of step {step} is the dataset's, bit for bit"
        )
        self.batch_differs = bool(rows)
        if rows:
            note = f"{len(rows)} of {self.run.global_batch} rows are not the dataset's"
            self.record.lines.append(Line(RUNG, f"batch of step {step}", "uint8", "bug", np.inf, 0.0, note=note))

    def _nothing_recorded(self, windows: list[Window]) -> str:
        """Returns the refusal of a run of whose steps too little is recorded."""
        run, most = self.run, self.request.steps
        if not windows:
            return f"{run.workdir} holds no checkpoint yet; --checkpoint-every of train.py writes them more often"
        longer = [window(run, each.start, run.recipe.schedule.steps) for each in windows]
        needed = [
            min([step for step in each.losses if step > each.start + 1] + ([each.stop] if each.ends else []))
            - each.start
            for each in longer
            if each.says_anything
        ]
        if not needed:
            return f"{run.workdir} has recorded nothing after its checkpoints that depends on a step"
        return (
            f"{run.workdir} has recorded nothing within {most} steps after a checkpoint; give --steps "
            f"{min(needed)}, or train with --log-every 1"
        )


def _update(ladder: Ladder, run: RecordedRun, step: int, start: str) -> dict[str, Any]:
    """Returns the task `optimizer`'s arguments for the step's update, with the reference's gradients.

    Args:
        start: file of the state before the step.
    """
    added = ladder.options.added
    gradients = ladder.ask("reference", "fp64", "gradients", mixed=ladder.mixed_pictures(), count=1, **added)
    return {
        "gradients": gradients.arrays.path,
        "schedule": run.schedule,
        "momentum": run.momentum,
        "step": step - 1,
        "start": start,
    } | added


def _optimizer(ladder: Ladder, update: dict[str, Any]) -> RungResult:
    """Compares parameters and momentum after the step, from the run's momentum and at its learning rate."""
    result = Question(ladder, "optimizer", "optimizer", lambda look: update, disturb=False).judge()
    rungs.count_differing(result)
    return result


def _options(request: Step, run: RecordedRun, weight_file: str) -> Options:
    """Returns the options of a comparison on the run's batches."""
    schedule = run.recipe.schedule
    return Options(
        weights=weight_file,
        precision=run.precision,
        reference=request.reference,
        candidate=request.candidate,
        size=str(run.recipe.crop),
        rows=request.rows or run.global_batch,
        batches=1,
        disturbances=request.disturbances,
        seed=run.flags["run.seed"],
        dataset=run.dataset,
        data_dir=run.data_dir,
        train_split=run.flags["data.train_split"],
        steps=request.steps,
        base_lr=schedule.base_lr,
        momentum=run.momentum,
        warmup_steps=schedule.warmup_steps,
        decay_steps=schedule.decay_steps,
        additions=run.additions,
        fault=request.fault,
    )
