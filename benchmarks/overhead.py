"""Measures what something that a run may do besides training costs: `python benchmarks/overhead.py --of local`.

Short runs without it and with it take turns, each in a process of its own, so that whatever else the machine does falls
on both alike. Shown are the medians of p_train, of the ratios of neighbouring runs, and of the processors' time.
"""

import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.table import Table

from input_pipeline import terminal
from input_pipeline.errors import RunFailed
from input_pipeline.exits import exit_code
from input_pipeline.files import read_json, write_json

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "overhead.json"
MEMORY = Path("/dev/shm")
WITHOUT, WITH = "without", "with"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured, and with which runs."""

    of: Literal["local"] = "local"
    """What is measured. local: --local-checkpoints in /dev/shm, every --every steps."""
    every: int = 5
    """Steps from one time to the next."""
    rounds: int = 5
    """Number of runs without it, and as many with it."""
    model: str = "R26x1"
    """Architecture, with random parameters."""
    size: int = 64
    """Side of the images, in pixels."""
    batch: int = 16
    """Rows of a batch."""
    steps: int = 60
    """Steps of a run."""
    output: Path = RESULTS
    """JSON file that receives the figures; what it holds of other measurements is kept."""

    def flags(self, folder: Path) -> list[str]:
        """Returns the flags that turn on what is measured. The folder lies in memory, and is empty."""
        return {"local": ["--local-checkpoints", str(folder), "--local-every", str(self.every)]}[self.of]


def measured(options: Options, more: list[str]) -> dict[str, float]:
    """Trains once, and returns p_train in images/s and the processors' seconds, those of the start included.

    Raises:
        RunFailed: the run did not end as it should.
    """
    with tempfile.TemporaryDirectory() as workdir:
        flags = (
            f"train.py digits --dataset synthetic --eval-split test[:{options.batch}] --model {options.model} "
            f"--init random --global-batch {options.batch} --resize-to {options.size} --crop {options.size} "
            f"--steps {options.steps} --warmup-steps 1 --decay-steps {options.steps} --eval-every {options.steps} "
            f"--log-every {options.steps} --checkpoint-every {options.steps} --workdir {workdir}"
        )
        before = _processors()
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *flags.split(), *more], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RunFailed(f"a run ended with exit code {done.returncode}: {done.stderr[-1000:]}")
        result = json.loads((Path(workdir) / "result.json").read_text())
        return {"p_train": result["p_train"], "processors": _processors() - before}


def _processors() -> float:
    """Returns the processors' seconds of all processes so far that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    runs: dict[str, list[dict[str, float]]] = {WITHOUT: [], WITH: []}
    measured(options, [])  # compiles what the others take from the cache
    for number in range(options.rounds):
        order = (WITHOUT, WITH) if number % 2 == 0 else (WITH, WITHOUT)
        for kind in order:
            folder = Path(tempfile.mkdtemp(dir=MEMORY))
            try:
                runs[kind].append(measured(options, options.flags(folder) if kind == WITH else []))
            finally:
                shutil.rmtree(folder)
            print(f"{number + 1} of {options.rounds}, {kind}: {runs[kind][-1]}", file=sys.stderr, flush=True)
    record = summary(options, runs)
    kept = read_json(options.output, dict, "write another by --output") if options.output.exists() else {}
    write_json(options.output, kept | {options.of: record})
    show(options, record)


def summary(options: Options, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Returns the record of a measurement: its options, its runs and their medians."""
    pairs = list(zip(runs[WITHOUT], runs[WITH], strict=True))
    described = {name: value for name, value in dataclasses.asdict(options).items() if name != "output"}
    medians = {
        f"{name} {kind}": statistics.median(run[name] for run in of_kind)
        for kind, of_kind in runs.items()
        for name in of_kind[0]
    }
    ratios = {
        f"{name} with / without": statistics.median(added[name] / plain[name] for plain, added in pairs)
        for name in runs[WITHOUT][0]
    }
    return {"options": described, "cores": os.cpu_count(), "medians": medians, "ratios": ratios, "runs": runs}


def show(options: Options, record: dict[str, Any]) -> None:
    table = Table("", WITHOUT, WITH, "ratio", title=f"{options.of}, medians of {options.rounds} runs each")
    for name, unit in (("p_train", "images/s"), ("processors", "s")):
        cells = [f"{record['medians'][f'{name} {kind}']:.4g}" for kind in (WITHOUT, WITH)]
        table.add_row(f"{name}, {unit}", *cells, f"{record['ratios'][f'{name} with / without']:.3f}")
    terminal.console().print(table)


if __name__ == "__main__":
    sys.exit(exit_code(main))
