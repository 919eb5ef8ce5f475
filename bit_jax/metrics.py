"""What a run reports: FlagPerf's figures, metrics.jsonl, TensorBoard events, the progress line, the result row."""

import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bit_jax.timeline import Timeline, rates
from input_pipeline.files import replacing

GIB = 2**30


def figures(timeline: Timeline, *, trained: int) -> dict[str, Any]:
    """FlagPerf's figures from the activities `whole`, `evaluation`, `input` and `compilation`.

    Compilation is in none of `timeline.rates`; e2e_time includes everything.

    Args:
        timeline: of this process alone.
        trained: examples that this process trained on.
    """
    training = timeline["whole"] - timeline["evaluation"]
    memory, memory_of = peak_memory()
    return {
        "e2e_time": seconds_since_process_start(),
        **rates(timeline, trained),
        "compile_time": timeline["compilation"],
        "train_seconds": training,
        "evaluation_seconds": timeline["evaluation"],
        "input_wait_seconds": timeline["input"],
        "trained_examples": trained,
        "mem_gib": memory,
        "mem_of": memory_of,
    }


def seconds_since_process_start() -> float:
    """By the operating system's record of when this process began, imports included."""
    return time.time() - psutil.Process().create_time()


def peak_memory() -> tuple[float, str]:
    """(GiB, what it is): the fullest local device's peak, or this process's where devices keep no record (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if None not in peaks:
        return max(peak for peak in peaks if peak is not None) / GIB, "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, "process"


def versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


class Log:
    """metrics.jsonl, TensorBoard events and the progress bar of one run.

    A continued run drops the lines of steps that will be trained again. Quiet, it writes and prints nothing.
    """

    def __init__(self, workdir: Path, *, start: int, stop: int, global_batch: int, quiet: bool = False):
        path = workdir / "metrics.jsonl"
        self._last: list[dict[str, Any]] = []  # what a continued run finds said of its first step
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= start]
            self._last = [entry for entry in map(json.loads, kept) if entry["step"] == start]
            if not quiet:
                with replacing(path) as file:
                    file.write("".join(kept).encode())
        self._file = open(os.devnull if quiet else path, "a", buffering=1)  # noqa: SIM115 (closed on exit)
        board = None if quiet else str(workdir / "tensorboard")
        self._tensorboard = _tensorboard().SummaryWriter(board, purge_step=start + 1, write_to_disk=not quiet)
        self._console = Console(stderr=True, quiet=quiet)
        self._start, self._stop, self._global_batch = start, stop, global_batch
        self._began = time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task("training", total=stop, completed=start, rate="")

    def __enter__(self) -> "Log":
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._console.is_terminal:
            self._progress.stop()
        self._tensorboard.close()
        self._file.close()

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation of the step from which the run continues is in metrics.jsonl."""
        return any(entry["step"] == step and "val_acc1" in entry for entry in self._last)

    def advance(self, step: int) -> None:
        """After `step` steps in all."""
        self._progress.update(self._task, completed=step, rate=f"{self._rate(step):,.0f} images/s")

    def write(self, step: int, **scalars: float) -> None:
        """A line of metrics.jsonl, and the same scalars for TensorBoard and the console."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        self._progress.console.print(self._line(step, scalars), highlight=False, soft_wrap=True)

    def note(self, sentence: str) -> None:
        self._progress.console.print(sentence, highlight=False, soft_wrap=True)

    def _rate(self, step: int) -> float:
        return (step - self._start) * self._global_batch / (time.perf_counter() - self._began)

    def _line(self, step: int, scalars: dict[str, float]) -> str:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        done = max(step - self._start, 1)
        left = (time.perf_counter() - self._began) / done * (self._stop - step)
        return f"step {step:>{len(str(self._stop))}}/{self._stop}  {shown}  {math.ceil(left)} s left"


def _tensorboard() -> Any:
    """tensorboardX without PyTorch, which it would load where that is installed: a second, and memory that would count
    as this run's."""
    torch = sys.modules.get("torch")
    sys.modules["torch"] = None  # type: ignore[assignment]  (what makes an import fail)
    try:
        import tensorboardX
    finally:
        del sys.modules["torch"]
        if torch is not None:
            sys.modules["torch"] = torch
    return tensorboardX


def flagperf_row(result: dict[str, Any]) -> Table:
    """One row of FlagPerf's table, with compilation time apart."""

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    columns = {
        "case": f"{result['hosts']}x{result['devices'] // result['hosts']}",
        "precision": result["precision"],
        "batch a device": f"{result['batch_per_device']:g}",
        "e2e s": shown(result["e2e_time"], ".1f"),
        "compile s": shown(result["compile_time"], ".1f"),
        "p_whole": shown(result["p_whole"], ",.1f"),
        "p_train": shown(result["p_train"], ",.1f"),
        "p_core": shown(result["p_core"], ",.1f"),
        "acc1": shown(result["final_acc1"], ".5f"),
        "GiB": shown(result["mem_gib"], ".2f"),
    }
    table = Table(title=f"{result['model']} on {result['dataset']}")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*columns.values())
    return table
