"""Runs side by side on one self-contained HTML page: curves, results, where the time went, and what differs."""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bit_jax.pages import page
from bit_jax.report import curves, overview
from bit_jax.report.record import Record
from input_pipeline.terminal import printable

LONGEST = 200  # characters of a value that are shown


def write(records: Sequence[Record], path: Path) -> None:
    """Writes the page, atomically."""
    title, rows = overview.runs(records)
    figures = {"Results": rows} | overview.tables(records)
    texts = {"Starts": starts(records), "What differs": differences(records)}
    tables = [{"title": title, "rows": rows, "kind": "figures"} for title, rows in figures.items()]
    tables += [{"title": title, "rows": rows, "kind": "texts"} for title, rows in texts.items() if rows]
    page.render(
        "bit_jax.report",
        "runs.html.j2",
        path,
        title=title or f"{len(records)} runs",
        tables=tables,
        same=same(records),
        plots=curves.plots(records),
    )


def starts(records: Sequence[Record]) -> overview.Rows:
    """Returns a row for each start of each run."""
    return [
        {
            "run": printable(record.workdir),
            "began, UTC": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(line.began)),
            "hosts x devices": f"{line.hosts} x {line.devices // max(line.hosts, 1)}",
            "from step": "" if line.start is None else str(line.start),
            "to step": str(line.step),
            "s": f"{line.elapsed:,.0f}",
            "ended": line.ended or ("under way or killed" if line is record.account.starts[-1] else "killed"),
            "why": printable(line.why),
        }
        for record in records
        if record.account is not None
        for line in record.account.starts
    ]


def differences(records: Sequence[Record]) -> overview.Rows:
    """Returns a row for each flag, part of the recipe, or fact of the machine in which the runs differ."""
    known = [_flat(record) for record in records]
    rows = {name: [cells.get(name, "") for cells in known] for name in _names(known)}
    return [
        {"": printable(name)}
        | {printable(record.workdir): cell for record, cell in zip(records, _shown(cells), strict=True)}
        for name, cells in rows.items()
        if len(set(cells)) > 1
    ]


def same(records: Sequence[Record]) -> dict[str, str]:
    """Returns {name: value} of what all runs have in common, of the same things."""
    known = [_flat(record) for record in records]
    common = {name: {cells.get(name, "") for cells in known} for name in _names(known)}
    return {printable(name): _shown(list(cells))[0] for name, cells in common.items() if len(cells) == 1}


def _names(known: Sequence[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for cells in known for name in cells))


def _shown(texts: Sequence[str]) -> list[str]:
    """Returns what is shown of the values: of long ones, the part where they begin to differ."""
    if all(len(text) <= LONGEST for text in texts):
        return [printable(text) for text in texts]
    columns = enumerate(itertools.zip_longest(*texts))
    differ = next((place for place, characters in columns if len(set(characters)) > 1), 0)
    begin = max(differ - LONGEST // 4, 0)
    return [
        printable("..." * bool(begin) + text[begin : begin + LONGEST] + "..." * (len(text) > begin + LONGEST))
        + f" ({len(text):,} characters)"
        for text in texts
    ]


def _flat(record: Record) -> dict[str, str]:
    """Returns what config.json says of the run, and result.json of its machine and versions, as text by dotted name."""
    machine = ("device_kind", "hosts", "devices", "mesh", "remat", "microbatches", "versions")
    result = {name: value for name, value in (record.result or {}).items() if name in machine}
    cells: dict[str, str] = {}

    def enter(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                enter(inner, f"{name}.{key}" if name else key)
        else:
            cells[name] = value if isinstance(value, str) else json.dumps(value)

    enter(record.flags, "")
    enter({name: value for name, value in record.config.items() if name != "config"}, "")
    enter(result, "")
    return cells
