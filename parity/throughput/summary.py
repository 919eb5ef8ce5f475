"""The figures of a throughput comparison, made of what its processes timed."""

import dataclasses
import datetime
import itertools
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
Ceilings = dict[tuple[str, int], list[float]]  # {(framework, devices): of products, each time they were timed}


def summarize(
    options: Throughput,
    architecture: Architecture,
    failed: dict[str, str],
    gate: dict[str, Line],
    measured: dict[str, list[dict[str, Any]]],
    ceilings: "Ceilings",
) -> dict[str, Any]:
    """`ceilings` are those of each framework, on so many devices."""
    count = flops.forward if options.work == "forward" else flops.training_step
    per_image = count(architecture, options.size, options.size)
    reached = {of: statistics.median(rates) for of, rates in ceilings.items()}
    arms = {}
    for arm, processes in measured.items():
        ceiling = max(products for (_, devices), products in reached.items() if devices == options.sides[arm].devices)
        arms[arm] = _arm(options, processes, per_image, ceiling)
    return {
        "command": shlex.join(["python", "-m", "parity", *sys.argv[1:]]),
        "when": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(),
        "options": {name: value for name, value in dataclasses.asdict(options).items() if name != "compare"},
        "failed": failed,
        "gate": {arm: dataclasses.asdict(line) for arm, line in gate.items()},
        "flops_per_image": per_image,
        "matrix_product_flops": {str(Side(*of)): rate for of, rate in reached.items()},
        "arms": arms,
        "ratios": _ratios(options, options.sides, arms),
    }


def _arm(options: Throughput, processes: list[dict[str, Any]], per_image: float, ceiling: float) -> dict[str, Any]:
    rates = [rate(options, process) for process in processes]
    again = [] if options.together else processes[1:]
    return {
        "images_per_s": statistics.median(rates),
        "images_per_s_of_processes": rates,
        "mfu": statistics.median(rates) * per_image / ceiling,
        "compile_cold": processes[0]["first"],
        "compile_cached": statistics.median([process["first"] for process in again]) if again else None,
        "memory_gib": max(process["memory"] for process in processes),
        "memory_of": processes[0]["memory of"],
        "products": dict(zip(("matrix", "convolution"), processes[0]["products"], strict=True)),
        "calls": [process["calls"] for process in processes],
    } | {name: [process[name] for process in processes] for name in LOOP if name in processes[0]}


def rate(options: Throughput, times: dict[str, Any]) -> float:
    """Images/s of one process: of the median call, or of the loop's training with its input."""
    return times["p_train"] if options.work == "loop" else options.rows / statistics.median(times["calls"])


def _ratios(options: Throughput, sides: dict[str, Side], arms: dict[str, Any]) -> dict[str, Any]:
    """JAX over PyTorch on as many devices, by process: those that ran in the same turn are compared."""

    def best(framework: str, devices: int, figure: str) -> str | None:
        own = [arm for arm in arms if (sides[arm].framework, sides[arm].devices) == (framework, devices)]
        return max(own, key=lambda arm: statistics.median(arms[arm][figure])) if own else None

    figures = {"": "images_per_s_of_processes"}
    if options.work == "loop":
        figures |= {"with evaluation, ": "p_whole", "evaluation alone, ": "evaluation"}
    counts = sorted({sides[arm].devices for arm in arms})
    ratios = {}
    for devices, (of, figure) in itertools.product(counts, figures.items()):
        of = of if devices == 1 else f"{devices} devices, {of}"
        pairs = {
            f"{of}best against best": (best("jax", devices, figure), best("torch", devices, figure)),
            f"{of}default against default": (str(Side("jax", devices)), str(Side("torch", devices))),
        }
        for what, (jax, torch) in pairs.items():
            if jax in arms and torch in arms:
                found = [one / other for one, other in zip(arms[jax][figure], arms[torch][figure], strict=True)]
                ratios[what] = {"jax": jax, "torch": torch, "median": statistics.median(found), "of_processes": found}
    return ratios
