"""Computes the figures of a throughput comparison from what its processes timed."""

import dataclasses
import datetime
import itertools
import os
import shlex
import statistics
import sys
from typing import Any

from bit_jax.model.architecture import Architecture
from parity.ladder.verdict import Line
from parity.sides import flops
from parity.sides.side import Side
from parity.throughput.machine import machine
from parity.throughput.request import Throughput

LOOP = ("p_core", "p_train", "p_whole", "input_share", "evaluation")  # figures of each process of a loop
KEPT = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")  # variables by which users keep what is compiled
Ceilings = dict[tuple[str, int], list[float]]  # {(framework, devices): FLOP/s of matrix products, each time measured}


def summarize(
    options: Throughput,
    architecture: Architecture,
    failed: dict[str, str],
    loss_check: dict[str, Line],
    measured: dict[str, list[dict[str, Any]]],
    ceilings: Ceilings,
) -> dict[str, Any]:
    """Returns the report, in JSON's types. Its `kept` names the variables that are set among KEPT.

    Args:
        failed: {arm: error} of the arms that are left out.
        loss_check: {arm: verdict on its losses}.
        measured: {arm: what each of its processes timed}.
        ceilings: FLOP/s that matrix products reach, by framework and number of devices.
    """
    count = flops.forward if options.work == "forward" else flops.training_step
    per_image = count(architecture, options.size, options.size)
    reached = {key: statistics.median(rates) for key, rates in ceilings.items()}
    arms = {}
    for arm, processes in measured.items():
        ceiling = max(products for (_, devices), products in reached.items() if devices == options.sides[arm].devices)
        arms[arm] = _arm(options, processes, per_image, ceiling)
    wrong = {arm for arm, line in loss_check.items() if line.verdict == "bug"}
    right = {arm: figures for arm, figures in arms.items() if arm not in wrong}
    return {
        "command": shlex.join(["python", "-m", "parity", *sys.argv[1:]]),
        "when": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(),
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name != "compare"},
        "failed": failed,
        "kept": [name for name in KEPT if name in os.environ],
        "loss_check": {arm: dataclasses.asdict(line) for arm, line in loss_check.items()},
        "flops_per_image": per_image,
        "matrix_product_flops": {str(Side(*key)): rate for key, rate in reached.items()},
        "arms": arms,
        "ratios": _ratios(options, options.sides, right),  # a rate at which something else is computed compares nothing
    }


def _arm(options: Throughput, processes: list[dict[str, Any]], per_image: float, ceiling: float) -> dict[str, Any]:
    """Returns the figures of one arm from what its processes timed; `ceiling` is the rate that is an MFU of 1."""
    rates = [rate(options, process) for process in processes]
    cached = [] if options.together else processes[1:]
    return {
        "images_per_s": statistics.median(rates),
        "images_per_s_of_processes": rates,
        "mfu": statistics.median(rates) * per_image / ceiling,
        "compile_cold": processes[0]["first"],
        "compile_cached": statistics.median([process["first"] for process in cached]) if cached else None,
        "memory_gib": max(process["memory"] for process in processes),
        "memory_of": processes[0]["memory of"],
        "products": dict(zip(("matrix", "convolution"), processes[0]["products"], strict=True)),
        "calls": [process["calls"] for process in processes],
    } | {name: [process[name] for process in processes] for name in LOOP if name in processes[0]}


def rate(options: Throughput, times: dict[str, Any]) -> float:
    """Returns a process's images/s: those of its median call, or of a loop's training with its input."""
    return times["p_train"] if options.work == "loop" else options.rows / statistics.median(times["calls"])


def _ratios(options: Throughput, sides: dict[str, Side], arms: dict[str, Any]) -> dict[str, Any]:
    """Returns {comparison: JAX's rate over PyTorch's on as many devices}, of processes that ran in the same turn."""

    def best(framework: str, devices: int, figure: str) -> str | None:
        candidates = [arm for arm in arms if (sides[arm].framework, sides[arm].devices) == (framework, devices)]
        return max(candidates, key=lambda arm: statistics.median(arms[arm][figure])) if candidates else None

    figures = {"": "images_per_s_of_processes"}
    if options.work == "loop":
        figures |= {"with evaluation, ": "p_whole", "evaluation alone, ": "evaluation"}
    counts = sorted({sides[arm].devices for arm in arms})
    ratios = {}
    for devices, (prefix, figure) in itertools.product(counts, figures.items()):
        prefix = prefix if devices == 1 else f"{devices} devices, {prefix}"
        pairs = {
            f"{prefix}best against best": (best("jax", devices, figure), best("torch", devices, figure)),
            f"{prefix}default against default": (str(Side("jax", devices)), str(Side("torch", devices))),
        }
        for name, (jax, torch) in pairs.items():
            if jax in arms and torch in arms:
                rates = zip(arms[jax][figure], arms[torch][figure], strict=True)
                by_turn = [jax_rate / torch_rate for jax_rate, torch_rate in rates]
                ratios[name] = {
                    "jax": jax,
                    "torch": torch,
                    "median": statistics.median(by_turn),
                    "of_processes": by_turn,
                }
    return ratios
