"""Prints a plan as tables: memory and work, more hosts, and the largest batches."""

from typing import Any

from rich.console import Console
from rich.table import Table

from bit_jax.compiled.gpus import GIB
from bit_jax.plan.compilation import POOL


def show(plan: dict[str, Any], console: Console) -> None:
    """Prints the table of a plan, and that of more hosts where the plan models them."""
    request = plan["request"]
    title = (
        f"{request['model']} {request['precision']}, {request['batch_per_device']} a device, "
        f"{request['hosts']}x{request['devices']} {plan['device']}, --remat {request['remat']}"
    )
    table = Table(title=title, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("note")
    _add_memory(table, plan["memory"], plan["with_xla_rematerialization"])
    table.add_section()
    _add_work(table, plan)
    table.add_section()
    _add_roofline(table, plan["estimate"])
    console.print(table)
    if plan["model_of_hosts"]:
        console.print(f"communication MODEL: the same work a device, {request['network_gbps']:g} Gbit/s a host")
        console.print(_table_of_hosts(plan["model_of_hosts"]))


def _add_memory(table: Table, memory: dict[str, Any], with_xla: dict[str, Any]) -> None:
    table.add_row("parameters", _gib(memory["parameters"]), "GiB a device")
    table.add_row("momentum", _gib(memory["optimizer"]), "GiB a device")
    table.add_row("peak", _gib(memory["peak"]), "GiB, parameters and momentum included")
    table.add_row("cuDNN workspace", _gib(memory["workspace"]), "GiB allowed; the compiler does not see it")
    table.add_row("XLA's share", _gib(memory["pool"]), f"GiB, {POOL:.0%} of the device's: it {_fits(memory)}")
    table.add_row("left outside", _gib(memory["outside_pool"]), "GiB for the CUDA context and NCCL")
    table.add_row(
        "with XLA's own remat",
        _gib(with_xla["peak"]),
        f"GiB; {with_xla['repeated_instructions']} instructions repeated, {with_xla['convolutions']} convolutions; "
        f"{_fits(with_xla)}",
    )


def _fits(memory: dict[str, Any]) -> str:
    return "fits" if memory["fits"] else "does NOT fit"


def _add_work(table: Table, plan: dict[str, Any]) -> None:
    table.add_row("convolutions", f"{plan['convolutions']}", f"{plan['flops'] / 1e12:.2f} TFLOP with all products")
    for kind, moved in plan["traffic"].items():
        table.add_row(f"traffic: {kind}", f"{moved / 1e9:.1f}", "GB read and written")
    table.add_row("traffic", f"{sum(plan['traffic'].values()) / 1e9:.1f}", "GB", end_section=True)
    for total in plan["collectives"]:
        kinds = ", ".join(f"{moved / 1e6:,.1f} MB {dtype}" for dtype, moved in total["bytes"].items())
        overlapped = total["overlapped_bytes"] / max(sum(total["bytes"].values()), 1)
        note = f"over {total['group']} devices: {kinds}; {overlapped:.0%} overlapped"
        table.add_row(total["kind"], f"{total['count']}", note)


def _add_roofline(table: Table, estimate: dict[str, float]) -> None:
    collectives = estimate["overlapped"] + estimate["exposed"]
    table.add_row("roofline: computation", f"{estimate['compute'] * 1e3:.1f}", "ms, an ESTIMATE at published peaks")
    table.add_row("roofline: collectives", f"{collectives * 1e3:.1f}", "ms")
    images = f"{estimate['images_per_s']:,.0f} images/s"
    table.add_row("roofline: step", f"{estimate['step'] * 1e3:.1f}", f"ms: at most {images}")


def _table_of_hosts(rows: list[dict[str, Any]]) -> Table:
    table = Table("hosts", "ms a step", "images/s", "of linear")
    per_host = rows[0]["images_per_s"] / rows[0]["hosts"]
    for row in rows:
        linear = row["images_per_s"] / row["hosts"] / per_host
        table.add_row(f"{row['hosts']}", f"{row['step'] * 1e3:.1f}", f"{row['images_per_s']:,.0f}", f"{linear:.0%}")
    return table


def show_search(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the largest batch of each `--remat`."""
    table = Table("--remat", "largest batch a device", "GiB with workspace", title="what fits, by compiling")
    for row in rows:
        memory = row["memory"]
        used = _gib(memory["peak"] + memory["workspace"])
        table.add_row(row["remat"], f"{row['largest_batch'] or 'none'}", f"{used} of {_gib(memory['pool'])}")
    console.print(table)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
