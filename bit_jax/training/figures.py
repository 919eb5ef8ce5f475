"""The figures that a run reports at its end: FlagPerf's figures, memory, versions and the result row."""

import importlib.metadata
import platform
import resource
import subprocess
from collections.abc import Sequence
from typing import Any

import jax
from rich.table import Table

from bit_jax.accounts.timeline import Timeline, rates
from bit_jax.process.age import age

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
        "e2e_time": age(),
        "init_time": None if began is None else age() - (timeline.elapsed - began),
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
        "mem_limit_gib": memory_limit(),
        "mem_total_gib": card_memory(),
    }


def peak_memory() -> tuple[float, str]:
    """Returns (GiB, "device") with the fullest local device's peak, or (GiB, "process") with this process's peak if
    devices keep no record, as CPUs."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if None not in peaks:
        return max(peak for peak in peaks if peak is not None) / GIB, "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, "process"


def memory_limit() -> float | None:
    """Returns the GiB that JAX may use of the local device that has least, or None if devices set no limit, as CPUs."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return min(limit for limit in limits if limit is not None) / GIB if None not in limits else None


def card_memory() -> float | None:
    """Returns the GiB of memory of this machine's smallest NVIDIA GPU, as `nvidia-smi` says, which is also where
    FlagPerf reads it. None on other devices, or if `nvidia-smi` cannot be asked."""
    if jax.default_backend() != "gpu":
        return None
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        return min(float(line) for line in said.split()) / 1024  # MiB
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain", "pillow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def table(rows: Sequence[dict[str, str]], title: str) -> Table:
    """Returns a table of the rows, {column: cell}, which all have the same columns."""
    made = Table(title=title)
    for name in rows[0]:
        made.add_column(name, justify="right", overflow="fold")
    for row in rows:
        made.add_row(*row.values())
    return made


def flagperf_row(result: dict[str, Any]) -> dict[str, str]:
    """Returns {column: cell} of FlagPerf's row for a result.json, and compilation time in a column of its own. What the
    result does not say stays empty."""

    def shown(name: str, form: str) -> str:
        return "" if result.get(name) is None else format(result[name], form)

    return {
        "case": case(result),
        "precision": shown("precision", ""),
        "batch a device": shown("batch_per_device", "g"),
        "e2e s": shown("e2e_time", ".1f"),
        "compile s": shown("compile_time", ".1f"),
        "p_whole": shown("p_whole", ",.1f"),
        "p_train": shown("p_train", ",.1f"),
        "p_core": shown("p_core", ",.1f"),
        "acc1": shown("final_acc1", ".5f"),
        "GiB": shown("mem_gib", ".2f"),
    }


def case(result: dict[str, Any]) -> str:
    """Returns FlagPerf's name of the machine's size: hosts x devices of each, such as 2x8; empty if it is not known."""
    if not result.get("hosts") or not result.get("devices"):
        return ""
    return f"{result['hosts']}x{result['devices'] // result['hosts']}"
