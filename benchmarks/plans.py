"""Prints the two tables of docs/scaling.md.

The first holds plan's figures for three models, three precisions and four sizes of machine; the second its model of
more hosts.

    python benchmarks/plans.py [--json-file benchmarks/results/plans.json]

It compiles 36 programs, which takes about half an hour on two cores; what the JSON file already holds is not compiled
again.
"""

import itertools
import json
import sys
from pathlib import Path

import jax
import tyro

from bit_jax.compiled.gpus import GIB
from bit_jax.plan.estimate import HOSTS, demands
from bit_jax.plan.request import Request
from input_pipeline.errors import RequestError
from input_pipeline.exits import exit_code
from input_pipeline.files import writable, write_json

MODELS, PRECISIONS, SIZES = ("R50x1", "R152x2", "R152x4"), ("fp32", "tf32", "bf16"), ((1, 1), (1, 8), (2, 8), (4, 8))

MODELLED = ("R50x1 bf16", "R152x2 fp32", "R152x2 tf32", "R152x2 bf16", "R152x4 tf32", "R152x4 bf16")


def request(model: str, precision: str, hosts: int, devices: int) -> Request:
    """Returns the request for a model on `hosts` hosts with `devices` GPUs each; only R152x4 is split over GPUs."""
    split = "" if model != "R152x4" or hosts * devices == 1 else f"data={hosts},fsdp={devices}"
    return Request(f"BiT-M-{model}", hosts=hosts, devices=devices, precision=precision, mesh=split, remat="norm")


def main(json_file: Path = Path("benchmarks/results/plans.json")) -> None:
    """Prints the tables.

    Args:
        json_file: JSON file that keeps the figures; delete it, or name another, to compile everything again.
    """
    writable(json_file)
    jax.config.update("jax_platforms", "cpu")
    results = earlier(json_file)
    print(
        "| model | precision | hosts x GPUs | split | peak GiB | with workspace, of 35.5 | traffic GB | TFLOP "
        "| collectives MB (overlapped) | roofline ms | images/s at most |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for model, precision, (hosts, devices) in itertools.product(MODELS, PRECISIONS, SIZES):
        case = f"{model} {precision} {hosts}x{devices}"
        if case not in results:
            results[case] = demands(request(model, precision, hosts, devices))
            write_json(json_file, results)
        print(row(results[case]), flush=True)
    print("\n| case |" + "".join(f" {count} hosts |" for count in HOSTS) + "\n" + "|---" * (1 + len(HOSTS)) + "|")
    for case in MODELLED:
        print(model_row(case, results[f"{case} 2x8"]))


def earlier(json_file: Path) -> dict:
    """Returns the figures that an earlier run, which may have been interrupted, has left.

    Raises:
        RequestError: the file holds no JSON.
    """
    try:
        return json.loads(json_file.read_text()) if json_file.exists() else {}
    except ValueError:
        raise RequestError(f"--json-file {json_file} is no JSON; delete it, or name another") from None


def model_row(case: str, result: dict) -> str:
    """Returns the row of milliseconds per step and shares of linear scaling, for each number of hosts."""
    seconds = [estimate["step"] for estimate in result["model_of_hosts"]]
    return f"| {case} | " + " | ".join(f"{1e3 * step:.0f}, {seconds[0] / step:.0%}" for step in seconds) + " |"


def row(result: dict) -> str:
    """Returns the row of a case's figures."""
    planned, memory, estimate = result["request"], result["memory"], result["estimate"]
    moved = sum(sum(collective["bytes"].values()) for collective in result["collectives"])
    overlapped = sum(collective["overlapped_bytes"] for collective in result["collectives"])
    used = memory["peak"] + memory["workspace"]
    cells = (
        planned["model"].removeprefix("BiT-M-"),
        planned["precision"],
        f"{planned['hosts']}x{planned['devices']}",
        planned["mesh"] or "data",
        f"{memory['peak'] / GIB:.1f}",
        f"{used / GIB:.1f}" + ("" if memory["fits"] else ", does not fit"),
        f"{sum(result['traffic'].values()) / 1e9:.0f}",
        f"{result['flops'] / 1e12:.1f}",
        f"{moved / 1e6:,.0f} ({overlapped / max(moved, 1):.0%})" if moved else "",
        f"{estimate['step'] * 1e3:.0f}",
        f"{estimate['images_per_s']:,.0f}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, description=__doc__)))
