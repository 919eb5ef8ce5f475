"""The two tables of docs/scaling.md: plan's figures for three models, three precisions and four sizes of machine; and
its model of more hosts.

    python benchmarks/plans.py [--json-file benchmarks/results/plans.json]

Compiles 36 programs, about half an hour on two cores; what the JSON file already holds is not compiled again.
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
from input_pipeline.files import write_json

MODELS, PRECISIONS, SIZES = ("R50x1", "R152x2", "R152x4"), ("fp32", "tf32", "bf16"), ((1, 1), (1, 8), (2, 8), (4, 8))

MODELLED = ("R50x1 bf16", "R152x2 fp32", "R152x2 tf32", "R152x2 bf16", "R152x4 tf32", "R152x4 bf16")


def request(model: str, precision: str, hosts: int, devices: int) -> Request:
    split = "" if model != "R152x4" or hosts * devices == 1 else f"data={hosts},fsdp={devices}"
    return Request(f"BiT-M-{model}", hosts=hosts, devices=devices, precision=precision, mesh=split, remat="norm")


def main(json_file: Path = Path("benchmarks/results/plans.json")) -> None:
    jax.config.update("jax_platforms", "cpu")
    found = earlier(json_file)
    print(
        "| model | precision | hosts x GPUs | split | peak GiB | with workspace, of 35.5 | traffic GB | TFLOP "
        "| collectives MB (overlapped) | roofline ms | images/s at most |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for model, precision, (hosts, devices) in itertools.product(MODELS, PRECISIONS, SIZES):
        case = f"{model} {precision} {hosts}x{devices}"
        if case not in found:
            found[case] = demands(request(model, precision, hosts, devices))
            write_json(json_file, found)
        print(row(found[case]), flush=True)
    print("\n| case |" + "".join(f" {count} hosts |" for count in HOSTS) + "\n" + "|---" * (1 + len(HOSTS)) + "|")
    for case in MODELLED:
        print(model_row(case, found[f"{case} 2x8"]))


def earlier(json_file: Path) -> dict:
    """What an earlier run, which may have been ended, has compiled."""
    try:
        return json.loads(json_file.read_text()) if json_file.exists() else {}
    except ValueError:
        raise RequestError(f"--json-file {json_file} is no JSON; delete it, or name another") from None


def model_row(case: str, result: dict) -> str:
    """Milliseconds a step, and the share of linear scaling from one host."""
    seconds = [one["step"] for one in result["model_of_hosts"]]
    return f"| {case} | " + " | ".join(f"{1e3 * step:.0f}, {seconds[0] / step:.0%}" for step in seconds) + " |"


def row(result: dict) -> str:
    asked, memory, about = result["request"], result["memory"], result["estimate"]
    moved = sum(sum(one["bytes"].values()) for one in result["collectives"])
    behind = sum(one["overlapped_bytes"] for one in result["collectives"])
    used = memory["peak"] + memory["workspace"]
    cells = (
        asked["model"].removeprefix("BiT-M-"),
        asked["precision"],
        f"{asked['hosts']}x{asked['devices']}",
        asked["mesh"] or "data",
        f"{memory['peak'] / GIB:.1f}",
        f"{used / GIB:.1f}" + ("" if memory["fits"] else ", does not fit"),
        f"{sum(result['traffic'].values()) / 1e9:.0f}",
        f"{result['flops'] / 1e12:.1f}",
        f"{moved / 1e6:,.0f} ({behind / max(moved, 1):.0%})" if moved else "",
        f"{about['step'] * 1e3:.0f}",
        f"{about['images_per_s']:,.0f}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, description=__doc__)))
