"""What a throughput comparison measured, as tables, as a page, and against an earlier one."""

import datetime
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from input_pipeline.errors import RequestError
from input_pipeline.files import read_json
from input_pipeline.terminal import printable
from parity.report import page
from parity.sides.side import parse_side

TITLES = {"jax": "JAX", "torch": "PyTorch"}
COLOURS = {"jax": "#1565c0", "torch": "#c2185b"}
WORK = {"train": "training step", "forward": "forward pass", "loop": "whole loop"}
Report = dict[str, Any]  # as `throughput.measure` returns it, or as its JSON says


NEEDED = ("options", "arms", "gate", "ratios", "when")


def load(path: Path) -> Report:
    """An earlier measurement's JSON.

    Raises:
        RequestError: it cannot be read, or is something else.
    """
    found = read_json(path, dict, "give a file that `parity throughput --json` wrote")
    if missing := [name for name in NEEDED if name not in found]:
        raise RequestError(f"{path} has no {missing[0]!r}; give a file that `parity throughput --json` wrote")
    return found


def show(report: Report, console: Console) -> None:
    console.print(_table(report))
    for table in _more(report):
        console.print(table)
    for sentence in sentences(report):
        console.print(printable(sentence))
    for sentence in refused(report):
        console.print(printable(sentence), style="bold red")


def slower(report: Report, old: Report, console: Console) -> list[str]:
    """Arms that are slower than in an earlier report, by more than both spreads; all are printed."""
    found = []
    for arm, now in report["arms"].items():
        if arm not in old["arms"]:
            continue
        before = old["arms"][arm]
        worse = max(now["images_per_s_of_processes"]) < min(before["images_per_s_of_processes"])
        ratio = now["images_per_s"] / before["images_per_s"]
        console.print(f"{arm}: {ratio:.2f} times {old['when']}{', slower' if worse else ''}")
        found += [arm] if worse else []
    return found


def write_page(report: Report, path: Path) -> None:
    """The tables and plots as one self-contained HTML page."""
    drawn = [
        page.plot("Images a second", "Bars: medians of processes; points: the processes.", _rates, report),
        page.plot("Every call", "Seconds of each timed call, by process, in the order they ran.", _calls, report),
        page.plot("Compilation", "What the first call takes longer than the median.", _compilation, report),
    ]
    page.render(
        "throughput.html.j2",
        path,
        report=report,
        title=title(report),
        when=datetime.datetime.fromisoformat(report["when"]).strftime("%Y-%m-%d %H:%M"),
        sentences=sentences(report),
        refused=refused(report),
        tables=[_cells(table) for table in (_table(report), *_more(report))],
        plots=drawn,
    )


def title(report: Report) -> str:
    options = report["options"]
    work = WORK[options["work"]]
    return f"{options['weights']}, {work}, {options['rows']} x {options['size']}x{options['size']}, " + (
        f"{options['precision']}; {report['machine']['processor']}, {report['machine']['cores']} cores"
    )


def sentences(report: Report) -> list[str]:
    """The ratios and what the figures mean."""
    said = []
    for what, ratio in report["ratios"].items():
        spread = f"{min(ratio['of_processes']):.2f} to {max(ratio['of_processes']):.2f}"
        said.append(f"{what}: {ratio['jax']} is {ratio['median']:.2f} times {ratio['torch']} ({spread})")
    ceilings = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s ({_title(side)})" for side, rate in report["matrix_product_flops"].items()
    )
    said.append(
        f"MFU: {report['flops_per_image'] / 1e9:.2f} GFLOP an image x images/s, over the better of the measured matrix "
        f"products: {ceilings}"
    )
    return said


def refused(report: Report) -> list[str]:
    def so(arm: str) -> str:
        return "was timed, but not rightly" if arm in report["arms"] else "was not timed"

    return [f"{arm} failed: {why}" for arm, why in report["failed"].items()] + [
        f"{arm} {so(arm)}: its loss is wrong: {line['note']}"
        for arm, line in report["gate"].items()
        if line["verdict"] == "bug"
    ]


def _fastest_first(report: Report) -> list[tuple[str, dict[str, Any]]]:
    return sorted(report["arms"].items(), key=lambda item: -item[1]["images_per_s"])


def _table(report: Report) -> Table:
    table = Table(title=Text(printable(title(report))))
    for column in ("arm", "images/s", "of processes", "MFU", "compile cold s", "cached s", "GiB", "products"):
        table.add_column(column, justify="left" if column in ("arm", "products") else "right")
    for arm, found in _fastest_first(report):
        rates = found["images_per_s_of_processes"]
        table.add_row(
            printable(arm),
            f"{found['images_per_s']:.2f}",
            f"{min(rates):.2f} to {max(rates):.2f}",
            f"{found['mfu']:.0%}",
            f"{found['compile_cold']:.1f}",
            "" if found["compile_cached"] is None else f"{found['compile_cached']:.1f}",
            f"{found['memory_gib']:.2f}",
            found["products"]["convolution"],
        )
    return table


def _more(report: Report) -> list[Table]:
    """FlagPerf's rows, of one host. A step alone has p_core, images/s of finished steps; a loop has the rest; what is
    of whole runs (e2e_time, acc1), and several hosts, train.py reports."""
    options = report["options"]
    if options["work"] == "forward":
        return []
    table = Table(title=Text("FlagPerf's rows"))
    for column in ("case", "arm", "precision", "batch a device", "p_whole", "p_train", "p_core", "GiB"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    loop = options["work"] == "loop"
    for column in ("waits for input", "evaluation images/s") if loop else ():
        table.add_column(column, justify="right")
    for arm, found in _fastest_first(report):

        def shown(name: str, form: str = ".2f", found: dict[str, Any] = found) -> str:
            return format(statistics.median(found[name]), form) if name in found else ""

        devices = parse_side(arm).devices
        core = shown("p_core") if loop else f"{found['images_per_s']:.2f}"
        row = [f"1x{devices}", arm, options["precision"], f"{options['rows'] / devices:g}"]
        row += [shown("p_whole"), shown("p_train"), core, f"{found['memory_gib']:.2f}"]
        table.add_row(*row, *([shown("input_share", ".1%"), shown("evaluation")] if loop else []))
    return [table]


def _cells(table: Table) -> dict[str, Any]:
    """A table of rich as {title, columns: [(name, is a number)], rows}."""
    cells = [list(column.cells) for column in table.columns]
    return {
        "title": str(table.title),
        "columns": [(column.header, column.justify == "right") for column in table.columns],
        "rows": list(zip(*cells, strict=True)),
    }


def _rates(figure: Figure, report: Report) -> None:
    axes = figure.subplots()
    arms = _fastest_first(report)[::-1]
    for place, (arm, found) in enumerate(arms):
        axes.barh(place, found["images_per_s"], color=_colour(arm), alpha=0.6)
        rates = found["images_per_s_of_processes"]
        axes.plot(rates, [place] * len(rates), "o", markersize=4, color="black")
    axes.set_yticks(range(len(arms)), [arm for arm, _ in arms])
    axes.set(xlabel="images/s")


def _calls(figure: Figure, report: Report) -> None:
    arms = _fastest_first(report)
    row = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for axes, (arm, found) in zip(row, arms, strict=True):
        start = 0
        for calls in found["calls"]:
            axes.plot(range(start, start + len(calls)), calls, ".", markersize=3, color=_colour(arm))
            start += len(calls)
            axes.axvline(start - 0.5, color="grey", linewidth=0.5)
        axes.set_title(arm.replace(",", ",\n").replace(":", ":\n"), fontsize=7)
        axes.set_xticks([])
    row[0].set(ylabel="seconds", ylim=(0, None))


def _compilation(figure: Figure, report: Report) -> None:
    axes = figure.subplots()
    arms = _fastest_first(report)[::-1]
    for place, (arm, found) in enumerate(arms):
        axes.barh(place + 0.2, found["compile_cold"], height=0.38, color=_colour(arm), alpha=0.6)
        axes.barh(place - 0.2, found["compile_cached"] or 0, height=0.38, color=_colour(arm), alpha=0.25)
    axes.set_yticks(range(len(arms)), [arm for arm, _ in arms])
    axes.set(xlabel="seconds: above, the first process; below, from its cache")


def _title(side: str) -> str:
    """PyTorch, or PyTorch, devices=8."""
    framework, _, rest = side.partition(":")
    return TITLES[framework] + (f", {rest}" if rest else "")


def _colour(arm: str) -> str:
    return COLOURS[arm.partition(":")[0]]
