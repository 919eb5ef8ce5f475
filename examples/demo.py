"""Fine-tunes the embedded BiT on scanned digits, then compares PyTorch and JAX on the fine-tuned model.

`make demo` runs it. The model is fine-tuned on all digits, and on a few examples of each class beside training from
scratch. Every run is a train.py command that the demo prints, and its files stay under runs/demo. While one
command starts or compiles, which takes one core, another one computes: the few-shot runs go on beside the others.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import tyro
from PIL import Image
from rich.table import Table

import input_pipeline
from input_pipeline import terminal
from input_pipeline.errors import RequestError, RunFailed
from input_pipeline.exits import exit_code
from input_pipeline.preprocess import decode

WORKDIR = Path("runs/demo")  # it is emptied first
MARK = WORKDIR / ".demo"  # this file says that the folder is the demo's own
FULL = "--steps 100 --decay-steps 65 85".split()
FEW_SHOT = "--global-batch 32 --warmup-steps 10 --decay-steps 24 32 --steps 40".split()
PARITY = "--precision fp64 --size 32 --rows 4 --batches 1 --steps 3".split()
INITS = {"checkpoint": "Fashion-MNIST weights", "random": "scratch"}
# shares of the time that the commands beside the few-shot runs take, as seen on two cores
FULL_SHARE, PARITY_SHARE = 0.5, 0.5


class Progress:
    """Counts how much of the demo is done and estimates how long is left; two threads do its work side by side."""

    def __init__(self):
        self._start, self._lock = time.perf_counter(), threading.Lock()
        self._done: dict[str, tuple[float, float]] = {}  # {thread: (share of its work, seconds that it took)}

    def done(self, thread: str, share: float) -> str:
        """Counts a share of that thread's work as done and says how long the demo took so far and will still take."""
        with self._lock:
            spent = time.perf_counter() - self._start
            before, _ = self._done.get(thread, (0.0, 0.0))
            self._done[thread] = before + share, spent
            left = max(took / done - spent for done, took in self._done.values())
        return f"{spent:.0f} s so far, about {max(left, 0):.0f} s left"


def main(examples_per_class: int = 5, seeds: tuple[int, ...] = (0, 1, 2), base_lr: float = 0.01) -> None:
    """Runs the demo in the repository's root, which takes a minute and a half on two cores.

    Args:
        examples_per_class: Number of training examples of each digit in the few-shot runs.
        seeds: Seeds of the few-shot runs. Every seed chooses other examples, and the table shows the median over seeds.
        base_lr: Learning rate of the few-shot runs after warm-up, both from the checkpoint and from scratch.
    """
    empty_workdir()
    console, progress = terminal.console(width=120), Progress()
    budget = ["--examples-per-class", str(examples_per_class), "--base-lr", str(base_lr), *FEW_SHOT]

    def few_shot(init: str, seed: int) -> tuple[str, float]:
        """Returns the line that shows the run's command, and the run's accuracy."""
        workdir = WORKDIR / f"{init}-seed{seed}"
        command = ["train.py", "digits", "--workdir", str(workdir), "--init", init, "--seed", str(seed), *budget]
        accuracy = train(command, quiet=True)["final_acc1"]
        left = progress.done("few-shot", 1 / len(seeds) / len(INITS))
        console.print(f"few-shot, beside: {INITS[init]}, seed {seed}: acc1 {accuracy:.3f} ({left})", style="dim")
        return f"$ python {shlex.join(command)}", accuracy

    with ThreadPoolExecutor(1) as beside:
        runs = {(init, seed): beside.submit(few_shot, init, seed) for seed in seeds for init in INITS}
        try:
            full(console, progress)
            console.rule("JAX and PyTorch on the fine-tuned model, in float64, where any difference is a fault")
            weights = str(WORKDIR / "full" / "final.npz")
            command = ["-m", "parity", "all", "--weights", weights, *PARITY, "--run", str(WORKDIR / "parity")]
            run(command, quiet=False)
            show_few_shot(runs, seeds, examples_per_class, console)
            spent = progress.done("rest", PARITY_SHARE).split(" so")[0]
            console.print(f"everything is under {WORKDIR}; {spent} in all")
        finally:
            beside.shutdown(cancel_futures=True)


def full(console: terminal.Console, progress: Progress) -> None:
    """Fine-tunes on all training digits, evaluates, and classifies one digit that the model has not seen."""
    console.rule("All 1,438 training digits")
    console.print(
        "the demo takes a minute and a half on two cores, longer on slow ones; the few-shot runs go on beside this one"
    )
    workdir = WORKDIR / "full"
    train(["train.py", "digits", "--workdir", str(workdir), *FULL], quiet=False)
    console.print(progress.done("rest", FULL_SHARE))
    evaluate(workdir / "final.npz", console)
    console.rule("The fine-tuned model on a digit that it has not seen")
    digit = input_pipeline.open_source("digits", "test")[0]
    image = WORKDIR / f"digit-{digit['label']}.png"
    Image.fromarray(decode(digit["image"])).save(image)
    run(["-m", "bit_jax.predict", "--weights", str(workdir / "final.npz"), str(image)], quiet=False)


def evaluate(weights: Path, console: terminal.Console) -> None:
    """Evaluates the fine-tuned model, and prints the command and one line of what it says."""
    figures, page = WORKDIR / "evaluation.json", WORKDIR / "mistakes.html"
    command = ["-m", "bit_jax.evaluate", "--weights", str(weights), "--dataset", "digits"]
    command += ["--json", str(figures), "--html", str(page)]
    print(f"$ python {shlex.join(command)}", flush=True)
    run(command, quiet=True)
    acc1 = json.loads(figures.read_text())["acc1"]
    low, high = acc1["interval"]
    console.print(f"acc1 {acc1['value']:.3f} (95 % interval {low:.3f} to {high:.3f}); {page} shows the mistakes")


def show_few_shot(
    runs: dict[tuple[str, int], Future], seeds: tuple[int, ...], examples: int, console: terminal.Console
) -> None:
    """Prints the commands and accuracies of the few-shot runs, once all have ended."""
    console.rule(f"{examples} example(s) of each digit: transfer against training from scratch")
    for run in runs.values():
        console.print(run.result()[0])
    table = Table("start from", *(f"seed {seed}" for seed in seeds), "median acc1")
    for init, name in INITS.items():
        values = [runs[init, seed].result()[1] for seed in seeds]
        table.add_row(name, *(f"{value:.3f}" for value in values), f"{statistics.median(values):.3f}")
    console.print(table)


def train(command: list[str], *, quiet: bool) -> dict:
    """Runs train.py and returns its result.json."""
    run(command, quiet=quiet)
    return json.loads((Path(command[command.index("--workdir") + 1]) / "result.json").read_text())


def run(arguments: list[str], *, quiet: bool) -> None:
    """Runs a command of this repository, printed first unless `quiet`.

    Raises:
        RunFailed: the command failed; if it was quiet, the message holds its last line.
    """
    if not quiet:
        print(f"$ python {shlex.join(arguments)}", flush=True)
    # every few-shot run compiles the same program; the first one leaves it for the others
    environment = {"JAX_COMPILATION_CACHE_DIR": str((WORKDIR / "xla").absolute())}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"OMP_NUM_THREADS": "1"}  # PyTorch's threads wait for each other by spinning, and the cores are busy
    done = subprocess.run([sys.executable, *arguments], env=os.environ | environment, capture_output=quiet, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] if quiet else ["see above"]
        raise RunFailed(f"python {shlex.join(arguments)} ended with exit code {done.returncode}: {''.join(why)}")


def empty_workdir() -> None:
    """Removes what an earlier demo left.

    Raises:
        RequestError: the folder exists, and no demo made it.
    """
    if WORKDIR.exists() and not MARK.exists():
        raise RequestError(f"{WORKDIR} was not made by the demo, which would empty it; move it away")
    shutil.rmtree(WORKDIR, ignore_errors=True)
    WORKDIR.mkdir(parents=True)
    MARK.touch()


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, description=__doc__)))
