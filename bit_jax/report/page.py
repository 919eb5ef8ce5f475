"""Runs side by side on one self-contained HTML page: curves, results, where the time went, and what differs."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bit_jax.pages import page
from bit_jax.pages.plot import plot
from bit_jax.report import overview
from bit_jax.report.record import Record
from input_pipeline.files import is_number

TEXTS = {
    "loss": "Loss of each logged step's batch.",
    "images_per_s": "Images a second since the start that logged them began to train, over steps and input.",
    "input_wait": "Share of the training time in which the devices waited for input, since that start.",
    "val_acc1": "Top-1 accuracy on the evaluation split.",
    "val_acc5": "Top-5 accuracy on the evaluation split.",
    "val_loss": "Loss on the evaluation split.",
    "loss_scale": "Factor of the loss in fp16.",
}
MARKED = 100  # a curve of fewer points shows each of them


def write(records: Sequence[Record], path: Path) -> None:
    """Writes the page, atomically."""
    title, rows = overview.runs(records)
    tables = [
        {"title": "Results", "rows": rows},
        {"title": "Where the time went", "rows": overview.times(records)},
        {"title": "Watched", "rows": overview.watched(records)},
        {"title": "Starts", "rows": starts(records)},
        {"title": "What differs", "rows": differences(records)},
    ]
    page.render(
        "bit_jax.report",
        "runs.html.j2",
        path,
        title=title or f"{len(records)} runs",
        tables=[table for table in tables if table["rows"]],
        same=same(records),
        plots=plots(records),
    )


def plots(records: Sequence[Record]) -> list[dict[str, str]]:
    """Returns a plot, see `plot`, of each scalar that any run has logged, with a curve for each run that has."""
    names = dict.fromkeys(name for record in records for entry in record.metrics for name in entry if name != "step")
    first = [name for name in TEXTS if name in names]
    return [
        plot(name, TEXTS.get(name, ""), _curves, name, records)
        for name in (*first, *(name for name in names if name not in TEXTS))
    ]


def _curves(figure: Figure, name: str, records: Sequence[Record]) -> None:
    axes = figure.subplots()
    for number, record in enumerate(records):
        points = [(e["step"], e[name]) for e in record.metrics if is_number(e.get(name))]
        if points:
            marker = "." if len(points) < MARKED else None
            axes.plot(*zip(*points, strict=True), label=str(record.workdir), color=f"C{number}", marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    axes.legend()


def starts(records: Sequence[Record]) -> overview.Rows:
    """Returns a row for each start of each run."""
    return [
        {
            "run": str(record.workdir),
            "began, UTC": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line.began)),
            "hosts x devices": f"{line.hosts} x {line.devices // max(line.hosts, 1)}",
            "from step": "" if line.start is None else str(line.start),
            "to step": str(line.step),
            "s": f"{line.elapsed:,.0f}",
            "ended": line.ended or "no word of it",
            "why": line.why,
        }
        for record in records
        if record.account is not None
        for line in record.account.starts
    ]


def differences(records: Sequence[Record]) -> overview.Rows:
    """Returns a row for each flag, part of the recipe, or fact of the machine in which the runs differ."""
    known = [_flat(record) for record in records]
    return [
        {"": name} | {str(record.workdir): cells[name] for record, cells in zip(records, known, strict=True)}
        for name in _names(known)
        if len({cells[name] for cells in known}) > 1
    ]


def same(records: Sequence[Record]) -> dict[str, str]:
    """Returns {name: value} of what all runs have in common, of the same things."""
    known = [_flat(record) for record in records]
    return {name: known[0][name] for name in _names(known) if len({cells[name] for cells in known}) == 1}


class _Cells(dict[str, str]):
    """Texts by name; what a run does not say is empty."""

    def __missing__(self, name: str) -> str:
        return ""


def _names(known: Sequence[_Cells]) -> list[str]:
    return list(dict.fromkeys(name for cells in known for name in cells))


def _flat(record: Record) -> _Cells:
    """Returns what config.json says of the run, and result.json of its machine and versions, as text by dotted name."""
    machine = ("device_kind", "hosts", "devices", "mesh", "remat", "microbatches", "versions")
    result = {name: value for name, value in (record.result or {}).items() if name in machine}
    cells = _Cells()

    def enter(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                enter(inner, f"{name}.{key}" if name else key)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            cells[name] = text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"

    enter(record.flags, "")
    enter({name: value for name, value in record.config.items() if name != "config"}, "")
    enter(result, "")
    return cells
