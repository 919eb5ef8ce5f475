"""`make demo`: the embedded BiT fine-tuned on scanned digits, in full and with a few examples a class, against scratch;
then PyTorch and JAX compared on the fine-tuned model.

Every run is the train.py command that is printed before it; its files stay under runs/demo.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

import input_pipeline
from input_pipeline.preprocess import decode

WORKDIR = Path("runs/demo")  # emptied first
FEW_SHOT = ["--global-batch", "32", "--warmup-steps", "10", "--decay-steps", "30", "40", "--steps", "50"]


def main(examples_per_class: int = 5, seeds: tuple[int, ...] = (0, 1, 2), base_lr: float = 0.01) -> None:
    """Runs all of it, in the repository's root; three to four minutes on two cores.

    Args:
        examples_per_class: of the few-shot runs.
        seeds: of the few-shot runs; each chooses other examples.
        base_lr: of the few-shot runs, both kinds.
    """
    start = time.perf_counter()
    shutil.rmtree(WORKDIR, ignore_errors=True)
    console = Console(width=120)

    console.rule("All 1,438 training digits")
    train(WORKDIR / "full", quiet=False)

    console.rule(f"{examples_per_class} example(s) of each digit: transfer against training from scratch")
    accuracies: dict[str, list[float]] = {"checkpoint": [], "random": []}
    for seed in seeds:
        for init, values in accuracies.items():
            budget = ["--examples-per-class", str(examples_per_class), "--base-lr", str(base_lr), *FEW_SHOT]
            flags = ["--init", init, "--seed", str(seed), *budget]
            result = train(WORKDIR / f"{init}-seed{seed}", *flags, quiet=True)
            values.append(result["final_acc1"])
            console.print(f"  acc1 {result['final_acc1']:.3f}")

    table = Table("start from", *(f"seed {seed}" for seed in seeds), "median acc1")
    for init, name in (("checkpoint", "Fashion-MNIST weights"), ("random", "scratch")):
        values = accuracies[init]
        table.add_row(name, *(f"{value:.3f}" for value in values), f"{statistics.median(values):.3f}")
    console.print(table)

    console.rule("The fine-tuned model on a digit that it has not seen")
    digit = input_pipeline.open_source("digits", "test")[0]
    image = WORKDIR / f"digit-{digit['label']}.png"
    Image.fromarray(decode(digit["image"])).save(image)
    weights = WORKDIR / "full" / "final.npz"
    run(["-m", "bit_jax.predict", "--weights", str(weights), str(image)], os.environ, quiet=False)

    full = WORKDIR / "full"
    print(f"{time.perf_counter() - start:.0f} s so far; {full} holds final.npz, result.json, metrics.jsonl")

    console.rule("The fine-tuned model in JAX and in PyTorch, compared rung by rung: a minute more")
    parity = ["-m", "parity", "all", "--weights", str(weights), "--run", str(WORKDIR / "parity")]
    run(parity, os.environ, quiet=False)


def train(workdir: Path, *flags: str, quiet: bool) -> dict:
    """Runs train.py and returns its result.json."""
    # every few-shot run compiles the same program; the first one leaves it for the others
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str((WORKDIR / "xla").absolute())}
    run(["train.py", "digits", "--workdir", str(workdir), *flags], environment, quiet=quiet)
    return json.loads((workdir / "result.json").read_text())


def run(arguments: list[str], environment: Mapping[str, str], *, quiet: bool) -> None:
    """A command of this repository, printed first; ends the demo where it fails."""
    print(f"$ python {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=quiet, text=True)
    if done.returncode:
        sys.exit(done.stderr or done.returncode)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
