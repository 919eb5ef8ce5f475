"""The figures that a run reports at its end: FlagPerf's figures, memory, versions and the result row."""

import importlib.metadata
import platform
import resource
import time
from typing import Any

import jax
import psutil
from rich.table import Table

from bit_jax.training.timeline import Timeline, rates

GIB = 2**30


def figures(timeline: Timeline, *, trained: int, evaluation_before: float) -> dict[str, Any]:
    """Returns FlagPerf's figures from the activities `whole`, `evaluation`, `input` and `compilation`.

    As in FlagPerf, the clock of `timeline.rates` and of raw_train_time starts after compilation and after the
    evaluation before training; e2e_time includes everything, and init_time is the time before the clock starts.

    Args:
        timeline: timeline of this process alone.
        trained: number of examples that this process trained on.
        evaluation_before: seconds of the evaluation before training.
    """
    training = timeline["whole"] - timeline["evaluation"]
    memory, memory_of = peak_memory()
    began = timeline.began.get("whole")
    return {
        "e2e_time": time.time() - process_start(),
        "init_time": None if began is None else began - process_start(),
        "raw_train_time": timeline["whole"],
        **rates(timeline, trained),
        "compile_time": timeline["compilation"],
        "train_seconds": training,
        "evaluation_seconds": timeline["evaluation"],
        "evaluation_before_seconds": evaluation_before,
        "input_wait_seconds": timeline["input"],
        "trained_examples": trained,
        "mem_gib": memory,
        "mem_of": memory_of,
    }


def process_start() -> float:
    """Returns the time when this process began, before its imports, in seconds since 1970."""
    return psutil.Process().create_time()


def peak_memory() -> tuple[float, str]:
    """Returns (GiB, "device") with the fullest local device's peak, or (GiB, "process") with this process's peak if
    devices keep no record, as CPUs."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if None not in peaks:
        return max(peak for peak in peaks if peak is not None) / GIB, "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, "process"


def versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def flagperf_row(result: dict[str, Any]) -> Table:
    """Returns a table with one row in FlagPerf's format, and compilation time in a column of its own."""

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
