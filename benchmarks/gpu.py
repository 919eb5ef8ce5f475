"""Measures what is worth knowing of a GPU machine before it is trusted, the most important first.

    python benchmarks/gpu.py --out DIR --minutes 9 [--only STEP ...]

It asks how fast a training step is beside PyTorch's and where its time goes, whether logits and gradients are the
reference's in every precision, and whether the tests for GPUs pass. Each step leaves its JSON and its log in DIR at
once; one that fails or takes too long is named, and the next begins. Called again with the same DIR, the command goes
on with what is missing. On a machine without a GPU the steps run with a small model, to try the command itself.
"""

import contextlib
import dataclasses
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from input_pipeline import terminal
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.exits import exit_code
from input_pipeline.files import read_json, write_json
from input_pipeline.flags import UserPath, require_positive
from input_pipeline.terminal import printable

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "gpu.json"
LEAST = 20.0  # seconds; no step is begun with less time left
GRACE = 5.0  # seconds in which a late step may end by itself, once it was asked to
TOGETHER = max(3, len(os.sched_getaffinity(0)) // 4)  # steps that run at once, of those that measure no time
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of the work: large enough to fill a card with 80 GB, or so small that a laptop does it.

    Attributes:
        models: {architecture: (side of its images in pixels, images per batch)} of the trained and timed models.
        judged: architecture, side in pixels and images per batch of the model that the rungs judge beside the embedded
            one.
        seconds: seconds for which an arm is timed in each of its processes.
        compiled: {(architecture, precision): arms of PyTorch's compiler}; compiling one takes minutes.
    """

    models: dict[str, tuple[int, int]]
    judged: tuple[str, int, int]
    seconds: float
    compiled: dict[tuple[str, str], tuple[str, ...]]


# The compiler chooses channels-last by itself for a model in NCHW.
WHOLE, UNITS = "torch:compile,channels_last", "torch:compile_units,channels_last"
GRAPHS = "torch:compile,cuda_graphs,channels_last"
LARGE = Scale(
    {"R50x1": (224, 128), "R152x2": (480, 16)},
    ("R50x1", 224, 2),
    2.0,
    {
        ("R50x1", "bf16"): (WHOLE, GRAPHS, UNITS),
        ("R50x1", "tf32"): (WHOLE, GRAPHS),
        ("R152x2", "bf16"): (WHOLE, GRAPHS),
        ("R152x2", "tf32"): (WHOLE,),  # the GPU's memory holds no more beside JAX
    },
)
SMALL = Scale({"R14x0.5": (32, 4)}, ("R14x0.5", 32, 4), 0.2, {})
LAUNCHES = "xla_gpu_enable_command_buffer="  # launches every kernel by itself, not in CUDA graphs
EAGER = ("torch", "torch:channels_last", "jax:tuned")
COMPILED_IN = {"TORCHINDUCTOR_CACHE_DIR": "{out}/inductor"}


@dataclasses.dataclass(frozen=True)
class Step:
    """One command, which runs in a process of its own.

    Attributes:
        name: name of the step and of its log, DIR/NAME.log.
        command: arguments of Python; {json}, {dir} and {out} stand for DIR/NAME.json, DIR/NAME and DIR.
        seconds: seconds that the step may take at most.
        results: {field of the record: JSON file that the step leaves}.
        alone: whether the step measures time, so that nothing else may run beside it.
        environment: variables that the process gets besides this one's; {out} stands for DIR.
    """

    name: str
    command: str
    seconds: float
    results: dict[str, str] = dataclasses.field(default_factory=lambda: {"result": "{json}"})
    alone: bool = True
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def filled(self, text: str, out: Path) -> str:
        """Returns the text with this step's own paths in `out` in place of {json} and {dir}, and `out` for {out}."""
        return text.format(json=out / f"{self.name}.json", dir=out / self.name, out=out)


def steps(scale: Scale) -> list[Step]:
    """Returns all steps, the most important first."""
    first, *others = scale.models
    name, size, rows = scale.judged
    judged = f"--size {size} --rows {rows}"
    pairs = list(itertools.product(scale.models, ("bf16", "tf32")))  # (architecture, precision)
    return [
        Step("machine", "benchmarks/bandwidth.py --json {json}", 90),
        *training_beside_pytorch(scale, first, "bf16"),
        loop(scale, first, "bf16"),
        *(ladder("embedded", "all", precision) for precision in PRECISIONS),
        Step("tests", "-m pytest tests/test_gpu.py", 150, {}, alone=False),
        determinism(scale, "bf16"),
        *(step for model in others for step in training_beside_pytorch(scale, model, "bf16")),
        *(step for model in scale.models for step in training_beside_pytorch(scale, model, "tf32")),
        *(ladder(f"random:{name}", "all --until gradients", precision, judged) for precision in PRECISIONS),
        *(eager(scale, *pair, "forward") for pair in pairs),
        *(convolutions(scale, *pair) for pair in pairs),
        *(step for pair in pairs for step in compiling(scale, *pair, "train")),
        *(step for pair in pairs for step in compiled(scale, *pair, "train")),
        *(step for pair in pairs for step in compiling(scale, *pair, "forward")),
        *(step for pair in pairs for step in compiled(scale, *pair, "forward")),
    ]


def training_beside_pytorch(scale: Scale, model: str, precision: str) -> list[Step]:
    """Returns the steps that trace train.py and time its training step beside PyTorch's."""
    return [training(scale, model, precision), eager(scale, model, precision, "train")]


def eager(scale: Scale, model: str, precision: str, work: str) -> Step:
    """Returns the step that times JAX beside PyTorch without its compiler.

    A model larger than the first leaves no memory for JAX with its default settings.
    """
    defaults = ("jax",) if model == next(iter(scale.models)) else ()
    return throughput("eager", (*EAGER, *defaults), scale, model, precision, work)


def compiling(scale: Scale, model: str, precision: str, work: str) -> list[Step]:
    """Returns the steps that have PyTorch compile the work, one for each arm; DIR keeps what they compile."""
    arms = scale.compiled.get((model, precision), ())
    once = dataclasses.replace(scale, seconds=0.01)  # what counts is what is compiled, and not how fast it runs
    made = [throughput("compiling", (arm,), once, model, precision, work, processes=1) for arm in arms]
    return [
        dataclasses.replace(step, name=f"{step.name}-{number}", alone=False, environment=COMPILED_IN)
        for number, step in enumerate(made, 1)
    ]


def compiled(scale: Scale, model: str, precision: str, work: str) -> list[Step]:
    """Returns the step that times JAX beside what `compiling` has compiled, or nothing if that is nothing.

    JAX compiles alone: what runs beside it would disturb the timings by which it chooses its algorithms. A training
    step of a model larger than the first is also timed in JAX with `--remat norm`, because PyTorch's compiler computes
    activations again by itself.
    """
    arms = scale.compiled.get((model, precision), ())
    first = model == next(iter(scale.models))
    beside = ("torch",) if first else ()
    again = () if first or work == "forward" else ("jax:tuned,remat=norm",)
    step = throughput("compiled", (*beside, *arms, "jax:tuned", *again), scale, model, precision, work)
    return [dataclasses.replace(step, environment=COMPILED_IN)] if arms else []


def ladder(weights: str, rung: str, precision: str, more: str = "") -> Step:
    """Returns the step that compares JAX with PyTorch up to a rung; `more` are further flags of parity."""
    name = f"parity-{weights.removeprefix('random:')}-{precision}"
    command = f"-m parity {rung} --weights {weights} --precision {precision} --candidate jax:tuned {more}"
    threads = {"OMP_NUM_THREADS": str(max(len(os.sched_getaffinity(0)) // TOGETHER, 1))}
    return Step(name, f"{command} --run {{dir}} --json {{json}}", 480, alone=False, environment=threads)


def determinism(scale: Scale, precision: str) -> Step:
    """Returns the step that compares several processes bit for bit; `train.py --deterministic` promises equal bits."""
    name, size, rows = scale.judged
    work = f"--weights random:{name} --size {size} --rows {rows} --precision {precision} --steps 3"
    command = f"-m parity determinism --side jax:tuned,deterministic {work} --json {{json}}"
    return Step(f"determinism-{name}-{precision}", command, 240, alone=False)


def training(scale: Scale, model: str, precision: str) -> Step:
    """Returns the step that traces a run. It uses no CUDA graphs, in which a trace would show no instruction."""
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), f"--{LAUNCHES}")))
    results = {"result": "{dir}/result.json", "profile": "{dir}/profile/profile.json"}
    command = f"{synthetic(scale, model, precision)} --steps 60 --decay-steps 50 --log-every 10 --profile 5"
    return Step(f"train-{model}-{precision}", command, 300, results, environment={"XLA_FLAGS": flags})


def loop(scale: Scale, model: str, precision: str) -> Step:
    """Returns the step that runs train.py as users do, without a trace.

    Its p_core should be that of the training step alone.
    """
    command = f"{synthetic(scale, model, precision)} --steps 300 --decay-steps 250 --log-every 50"
    return Step(f"loop-{model}-{precision}", command, 300, {"result": "{dir}/result.json"})


def synthetic(scale: Scale, model: str, precision: str) -> str:
    """Returns the command of a run on images that need neither decoding nor resizing."""
    size, rows = scale.models[model]
    return (
        f"train.py hyperrule --model {model} --init random --dataset synthetic --resize-to 512 --crop {size} "
        f"--batch-per-device {rows} --precision {precision} --mixup 0.1 --warmup-steps 5 "
        "--eval-split train[:512] --workdir {dir}"
    )


def throughput(
    kind: str, arms: Sequence[str], scale: Scale, model: str, precision: str, work: str, processes: int = 5
) -> Step:
    """Returns the step that times the arms in turns; all of them stay on the GPU together."""
    size, rows = scale.models[model]
    command = (
        f"-m parity throughput --work {work} --weights random:{model} --size {size} --rows {rows} "
        f"--precision {precision} --together True --processes {processes} --seconds {scale.seconds} "
        f"--loss-check losses --json {{json}} --arms {' '.join(arms)}"
    )
    return Step(f"{kind}-{work}-{model}-{precision}", command, 420)


def convolutions(scale: Scale, model: str, precision: str) -> Step:
    """Returns the step that times every convolution of the model by itself."""
    size, rows = scale.models[model]
    flags = f"--weights random:{model} --size {size} --rows {rows} --precision {precision}"
    return Step(f"convolutions-{model}-{precision}", f"-m parity convolutions {flags} --json {{json}}", 240)


@dataclasses.dataclass
class Running:
    """A step that has been started.

    Attributes:
        began: time.monotonic() when its process was started.
        limit: seconds after which it is asked to end.
        asked: whether it has been asked to end.
    """

    step: Step
    process: subprocess.Popen
    began: float
    limit: float
    asked: bool = False

    @classmethod
    def start(cls, step: Step, out: Path, limit: float) -> "Running":
        """Starts the step's process, whose output goes to the step's log in `out`."""
        arguments = shlex.split(step.filled(step.command, out))
        with open(out / f"{step.name}.log", "wb") as log:
            paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            own = {name: step.filled(value, out) for name, value in step.environment.items()}
            environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": paths} | own
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return cls(step, process, time.monotonic(), limit)

    def outcome(self) -> str | None:
        """Returns "done", "failed" or "late", or None while the step runs.

        A late step is asked to end, and killed if it has not ended GRACE seconds later.
        """
        code = self.process.poll()
        if code is not None:
            return "late" if self.asked else "done" if code == 0 else "failed"
        late = time.monotonic() - self.began - self.limit
        if late > 0 and not self.asked:
            self._signal(signal.SIGTERM)
            self.asked = True
        if late < GRACE:
            return None
        self.kill()
        return "late"

    def kill(self) -> None:
        """Kills the step's process and all that it has started."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Record:
    """The file DIR/gpu.json, which says of each step how it ended and what its results are."""

    def __init__(self, out: Path):
        self.out, self.path = out, out / RESULTS
        out.mkdir(parents=True, exist_ok=True)
        fresh: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "steps": {}}
        self.content = read_json(self.path, dict, "name another --out") if self.path.exists() else fresh
        if not isinstance(self.content.get("steps"), dict):
            raise RequestError(f"{self.path} is not what this command writes; name another --out")

    def missing(self, wanted: Sequence[Step]) -> list[Step]:
        """Returns the steps that are not done yet."""
        return [step for step in wanted if self.content["steps"].get(step.name, {}).get("outcome") != "done"]

    def clear(self, step: Step) -> None:
        """Removes what an earlier attempt in this record has left, and nothing else: DIR may hold other files."""
        if step.name not in self.content["steps"]:
            return
        if "{dir}" in step.command:
            shutil.rmtree(self.out / step.name, ignore_errors=True)
        if "{json}" in step.command:
            (self.out / f"{step.name}.json").unlink(missing_ok=True)

    def add(self, running: Running, outcome: str) -> None:
        """Enters an ended step with its results and writes the file."""
        step = running.step
        results: dict[str, Any] = {}
        for name, file in step.results.items():
            path = Path(step.filled(file, self.out))
            if path.exists():
                with contextlib.suppress(RequestError):
                    results[name] = what_holds(step, read_json(path, dict, ""))
        self.content["steps"][step.name] = {
            "outcome": outcome,
            "seconds": time.monotonic() - running.began,
            "command": shlex.join(["python", *shlex.split(step.filled(step.command, Path("DIR")))]),
            **results,
        }
        write_json(self.path, self.content)


def run(wanted: list[Step], record: Record, until: float, console: Console) -> None:
    """Runs the steps in order: those that measure time by themselves, and up to TOGETHER of the others at once.

    Args:
        until: time.monotonic() at which everything must have ended; a step also has a limit of its own.
    """
    running: list[Running] = []
    try:
        while wanted or running:
            if wanted and _may_begin(wanted[0], running):
                left = until - time.monotonic()
                if left < LEAST:
                    names = ", ".join(step.name for step in wanted)
                    console.print(f"no time is left for {names}; the same command goes on there")
                    wanted = []
                    continue
                step, *wanted = wanted
                record.clear(step)
                running.append(Running.start(step, record.out, min(step.seconds, left - GRACE)))
                continue
            time.sleep(0.2)
            for started in list(running):
                if outcome := started.outcome():
                    running.remove(started)
                    record.add(started, outcome)
                    seconds = time.monotonic() - started.began
                    console.print(printable(f"{started.step.name}: {outcome} after {seconds:.0f} s"))
    finally:  # this command may have been asked to end
        for started in running:
            started.kill()


def _may_begin(step: Step, running: Sequence[Running]) -> bool:
    """Whether a step disturbs nothing that runs."""
    return not running or (
        not step.alone and not any(started.step.alone for started in running) and len(running) < TOGETHER
    )


def show(record: Record, console: Console) -> None:
    """Prints the steps of the record as a table."""
    table = Table(title="steps")
    for column in ("step", "outcome", "s", "result"):
        table.add_column(column, justify="right" if column == "s" else "left")
    for name, step in record.content["steps"].items():
        result = headline(step.get("result", {}))  # a comparison that does not hold has failed, and has a result
        table.add_row(printable(name), step["outcome"], f"{step['seconds']:.0f}", printable(result))
    console.print(table)


def what_holds(step: Step, result: dict[str, Any]) -> dict[str, Any]:
    """Returns a step's result without rates that were measured beside other steps, which mean nothing."""
    if step.alone or "arms" not in result:
        return result
    return {"compile_cold": {arm: figures["compile_cold"] for arm, figures in result["arms"].items()}}


def headline(result: dict[str, Any]) -> str:
    """Returns a step's result in a few words, or "" if it is of no known kind."""
    if "bytes_a_second" in result:
        return f"{result['device']}, copies {result['bytes_a_second'] / 1e12:.2f} TB/s"
    if "holds" in result:
        return "HOLDS" if result["holds"] else "does NOT hold"
    if "same" in result:
        return "the same bits" if result["same"] else "bits DIFFER"
    if "p_core" in result:
        return f"p_core {result['p_core']:.1f}, {result['mem_gib']:.2f} GiB"
    if "compile_cold" in result:
        return ", ".join(f"{arm} compiled in {seconds:.0f} s" for arm, seconds in result["compile_cold"].items())
    if "ratios" in result:
        ratios = [f"{ratio['median']:.2f} times {ratio['torch']}" for ratio in result["ratios"].values()]
        arms = ", ".join(f"{arm} {figures['images_per_s']:.0f}" for arm, figures in result["arms"].items())
        return f"{'; '.join(ratios[:1])} ({arms})"
    return ""


def main(
    out: UserPath,
    *,
    minutes: float = 9,
    only: tuple[str, ...] = (),
    scale: Literal["auto", "large", "small"] = "auto",
) -> None:
    """Measures what is worth knowing of a GPU machine, the most important first.

    Args:
        out: Folder of the results and logs. Name the same folder again to go on with the steps that are not done yet.
        minutes: Minutes that the command may take in all; the steps that find no time are left for the next call.
        only: Beginnings of step names; other steps are not run. Empty: all steps are run.
        scale: Size of the work: large fills a GPU with 80 GB, small tries the command without a GPU.
            auto: large where there is an NVIDIA GPU.
    """
    require_positive({"--minutes": minutes})
    large = os.path.exists("/dev/nvidia0") if scale == "auto" else scale == "large"
    wanted = steps(LARGE if large else SMALL)
    if only:
        wanted = [step for step in wanted if step.name.startswith(only)]
        if not wanted:
            known = ", ".join(step.name for step in steps(LARGE if large else SMALL))
            raise RequestError(f"--only {' '.join(only)} begins no step's name; there are {known}")
    record, console = Record(out.absolute()), terminal.console(width=160)
    run(record.missing(wanted), record, time.monotonic() + 60 * minutes, console)
    show(record, console)
    if failed := [step.name for step in record.missing(wanted)]:
        raise RunFailed(f"not done: {', '.join(failed)}; their logs are in {out}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main)))
