"""Shows a throughput comparison in tables and on a page, and compares it with an earlier one."""

import datetime
import re
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
Report = dict[str, Any]  # what `measure.measure` returns, or its JSON
NEEDED = ("options", "arms", "loss_check", "ratios", "when")


def load(path: Path) -> Report:
    """Reads an earlier comparison's JSON.

    Raises:
        RequestError: the file cannot be read, or is not a throughput comparison.
    """
    report = read_json(path, dict, "give a file that `parity throughput --json` wrote")
    if missing := [name for name in NEEDED if name not in report]:
        raise RequestError(f"{path} has no {missing[0]!r}; give a file that `parity throughput --json` wrote")
    return report


def show(report: Report, console: Console) -> None:
    """Prints the tables, the ratios, and the arms that failed or compute wrong losses."""
    console.print(_table(report))
    for table in _more(report):
        console.print(table)
    for sentence in sentences(report):
        console.print(printable(sentence))
    for sentence in refused(report):
        console.print(printable(sentence), style="bold red")


def slower(report: Report, old: Report, console: Console) -> list[str]:
    """Prints each arm's rate relative to an earlier report, and returns the arms that became slower.

    An arm is slower if its fastest process is slower than the slowest process of the earlier report.
    """
    slower_arms = []
    for arm, now in report["arms"].items():
        if arm not in old["arms"]:
            continue
        before = old["arms"][arm]
        worse = max(now["images_per_s_of_processes"]) < min(before["images_per_s_of_processes"])
        ratio = now["images_per_s"] / before["images_per_s"]
        label = _label(report, arm)
        console.print(f"{label}: {ratio:.2f} times {old['when']}{', slower' if worse else ''}", markup=False)
        slower_arms += [arm] if worse else []
    return slower_arms


def write_page(report: Report, path: Path) -> None:
    """Writes the tables and plots as one self-contained HTML page."""
    plots = [
        page.plot("Images a second", "Bars: medians of processes; points: the processes.", _rates, report),
        page.plot("Every call", "Seconds of each timed call, by process, in the order they ran.", _calls, report),
        page.plot("Compilation", "Seconds that the first call takes longer than the median.", _compilation, report),
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
        plots=plots,
    )


def title(report: Report) -> str:
    """Returns the work and the machine in words."""
    options = report["options"]
    work = WORK[options["work"]]
    return f"{options['weights']}, {work}, {options['rows']} x {options['size']}x{options['size']}, " + (
        f"{options['precision']}; {report['machine']['processor']}, {report['machine']['cores']} cores"
    )


def sentences(report: Report) -> list[str]:
    """Returns sentences with the ratios and with what the MFU is relative to."""
    lines = []
    for name, ratio in report["ratios"].items():
        spread = f"{min(ratio['of_processes']):.2f} to {max(ratio['of_processes']):.2f}"
        lines.append(f"{name}: {ratio['jax']} is {ratio['median']:.2f} times {ratio['torch']} ({spread})")
    ceilings = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s ({_title(side)})" for side, rate in report["matrix_product_flops"].items()
    )
    lines.append(
        f"MFU: {report['flops_per_image'] / 1e9:.2f} GFLOP an image x images/s, over the better of the measured matrix "
        f"products: {ceilings}"
    )
    if kept := report.get("kept"):
        lines.append(f"{' and '.join(kept)} was set: 'compile cold' may be of programs that were compiled before")
    return lines


def refused(report: Report) -> list[str]:
    """Returns a sentence for each arm that failed or computes wrong losses."""

    def timed(arm: str) -> str:
        return "was timed, but not rightly" if arm in report["arms"] else "was not timed"

    return [f"{arm} failed: {error}" for arm, error in report["failed"].items()] + [
        f"{arm} {timed(arm)}: its loss is wrong: {line['note']}"
        for arm, line in report["loss_check"].items()
        if line["verdict"] == "bug"
    ]


def _label(report: Report, arm: str) -> str:
    """Returns the arm's name, which says so if it computes wrong losses."""
    line = report["loss_check"].get(arm)
    return f"{arm} (WRONG)" if line and line["verdict"] == "bug" else arm


def _fastest_first(report: Report) -> list[tuple[str, dict[str, Any]]]:
    return sorted(report["arms"].items(), key=lambda item: -item[1]["images_per_s"])


def _table(report: Report) -> Table:
    """Returns the table of all arms, the fastest first."""
    table = Table(title=Text(printable(title(report))))
    for column in ("arm", "images/s", "of processes", "MFU", "compile cold s", "cached s", "GiB", "products"):
        table.add_column(column, justify="left" if column in ("arm", "products") else "right")
    for arm, figures in _fastest_first(report):
        rates = figures["images_per_s_of_processes"]
        table.add_row(
            printable(_label(report, arm)),
            f"{figures['images_per_s']:.2f}",
            f"{min(rates):.2f} to {max(rates):.2f}",
            f"{figures['mfu']:.0%}",
            f"{figures['compile_cold']:.1f}",
            "" if figures["compile_cached"] is None else f"{figures['compile_cached']:.1f}",
            f"{figures['memory_gib']:.2f}",
            figures["products"]["convolution"],
        )
    return table


def _more(report: Report) -> list[Table]:
    """Returns the table with FlagPerf's rows for one host; none for the forward pass.

    A training step alone has p_core, the images/s of finished steps; a loop has the other rates too. What belongs to
    whole runs (e2e_time, acc1) and to several hosts is reported by train.py.
    """
    options = report["options"]
    if options["work"] == "forward":
        return []
    table = Table(title=Text("FlagPerf's rows"))
    for column in ("case", "arm", "precision", "batch a device", "p_whole", "p_train", "p_core", "GiB"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    loop = options["work"] == "loop"
    for column in ("waits for input", "evaluation images/s") if loop else ():
        table.add_column(column, justify="right")
    for arm, figures in _fastest_first(report):

        def shown(name: str, form: str = ".2f", figures: dict[str, Any] = figures) -> str:
            return format(statistics.median(figures[name]), form) if name in figures else ""

        devices = parse_side(arm).devices
        core = shown("p_core") if loop else f"{figures['images_per_s']:.2f}"
        row = [f"1x{devices}", _label(report, arm), options["precision"], f"{options['rows'] / devices:g}"]
        row += [shown("p_whole"), shown("p_train"), core, f"{figures['memory_gib']:.2f}"]
        table.add_row(*row, *([shown("input_share", ".1%"), shown("evaluation")] if loop else []))
    return [table]


def _cells(table: Table) -> dict[str, Any]:
    """Returns rich's table as {title, columns: [(name, whether it holds numbers)], rows}."""
    cells = [list(column.cells) for column in table.columns]
    return {
        "title": str(table.title),
        "columns": [(column.header, column.justify == "right") for column in table.columns],
        "rows": list(zip(*cells, strict=True)),
    }


def _rates(figure: Figure, report: Report) -> None:
    axes = figure.subplots()
    arms = _fastest_first(report)[::-1]
    for place, (arm, figures) in enumerate(arms):
        axes.barh(place, figures["images_per_s"], color=_colour(arm), alpha=0.6)
        rates = figures["images_per_s_of_processes"]
        axes.plot(rates, [place] * len(rates), "o", markersize=4, color="black")
    axes.set_yticks(range(len(arms)), [_label(report, arm) for arm, _ in arms])
    axes.set(xlabel="images/s")


def _calls(figure: Figure, report: Report) -> None:
    arms = _fastest_first(report)
    row = figure.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for axes, (arm, figures) in zip(row, arms, strict=True):
        start = 0
        for calls in figures["calls"]:
            axes.plot(range(start, start + len(calls)), calls, ".", markersize=3, color=_colour(arm))
            start += len(calls)
            axes.axvline(start - 0.5, color="grey", linewidth=0.5)
        axes.set_title(re.sub(r"([,:]| (?=\())", r"\1\n", _label(report, arm)), fontsize=7)
        axes.set_xticks([])
    row[0].set(ylabel="seconds", ylim=(0, None))


def _compilation(figure: Figure, report: Report) -> None:
    axes = figure.subplots()
    arms = _fastest_first(report)[::-1]
    for place, (arm, figures) in enumerate(arms):
        axes.barh(place + 0.2, figures["compile_cold"], height=0.38, color=_colour(arm), alpha=0.6)
        axes.barh(place - 0.2, figures["compile_cached"] or 0, height=0.38, color=_colour(arm), alpha=0.25)
    axes.set_yticks(range(len(arms)), [_label(report, arm) for arm, _ in arms])
    axes.set(xlabel="seconds: above, the first process; below, from its cache")


def _title(side: str) -> str:
    """Returns a side's name for readers, such as "PyTorch" or "PyTorch, devices=8"."""
    framework, _, rest = side.partition(":")
    return TITLES[framework] + (f", {rest}" if rest else "")


def _colour(arm: str) -> str:
    return COLOURS[arm.partition(":")[0]]
