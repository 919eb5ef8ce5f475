"""`make demo`: the embedded BiT fine-tuned on scanned digits, in full and with a few examples a class, against scratch.

Every run is the train.py command that is printed before it; its files stay under the work directory.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parent.parent
FEW_SHOT = ["--global-batch", "32", "--warmup-steps", "10", "--decay-steps", "30", "40", "--steps", "50"]


def main(
    workdir: Path = Path("runs/demo"),
    examples_per_class: int = 5,
    seeds: tuple[int, ...] = (0, 1, 2),
    base_lr: float = 0.01,
) -> None:
    """Runs all of it; two to three minutes on two cores.

    Args:
        workdir: emptied first, then receives a folder for each run.
        examples_per_class: of the few-shot runs.
        seeds: of the few-shot runs; each chooses other examples.
        base_lr: of the few-shot runs, both kinds.
    """
    start = time.perf_counter()
    shutil.rmtree(workdir, ignore_errors=True)
    console = Console(width=120)

    console.rule("All 1,438 training digits")
    train(workdir, workdir / "full", quiet=False)

    console.rule(f"{examples_per_class} example(s) of each digit: transfer against training from scratch")
    accuracies: dict[str, list[float]] = {"checkpoint": [], "random": []}
    for seed in seeds:
        for init, values in accuracies.items():
            budget = ["--examples-per-class", str(examples_per_class), "--base-lr", str(base_lr), *FEW_SHOT]
            flags = ["--init", init, "--seed", str(seed), *budget]
            result = train(workdir, workdir / f"{init}-seed{seed}", *flags, quiet=True)
            values.append(result["final_acc1"])
            console.print(f"  acc1 {result['final_acc1']:.3f}")

    table = Table("start from", *(f"seed {seed}" for seed in seeds), "median acc1")
    for init, name in (("checkpoint", "Fashion-MNIST weights"), ("random", "scratch")):
        values = accuracies[init]
        table.add_row(name, *(f"{value:.3f}" for value in values), f"{statistics.median(values):.3f}")
    console.print(table)
    console.print(f"{time.perf_counter() - start:.0f} s. Try the fine-tuned weights on an image of a digit:")
    console.print(f"  .venv/bin/python -m bit_jax.predict --weights {workdir / 'full' / 'final.npz'} IMAGE", soft_wrap=True)


def train(shared: Path, workdir: Path, *flags: str, quiet: bool) -> dict:
    """Runs train.py and returns its result.json."""
    command = ["train.py", "digits", "--workdir", str(workdir), *flags]
    print(f"$ python {shlex.join(command)}", flush=True)
    # every few-shot run compiles the same program; the first one leaves it for the others
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str((shared / "xla").absolute())}
    done = subprocess.run(
        [sys.executable, REPOSITORY / command[0], *command[1:]], env=environment, capture_output=quiet, text=True
    )
    if done.returncode:
        sys.exit(done.stderr or done.returncode)
    return json.loads((workdir / "result.json").read_text())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
