"""Compares two saved runs and decides whether anything became worse."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from input_pipeline.terminal import printable
from parity.report.saved import Report
from parity.report.terminal import COLOURS, number

GREW = 2.0  # factor by which an error has to change to be shown


def difference(before: Report, after: Report, console: Console) -> bool:
    """Prints what changed from one saved run to another; returns whether nothing became worse."""
    changes = Table(title="what changed", title_justify="left")
    for column in ("what", "before", "after"):
        changes.add_column(column)
    for name, (old, new) in _attested_changes(before, after).items():
        changes.add_row(Text(printable(name)), Text(printable(old)), Text(printable(new)))
    worse = False
    lines = [
        {(rung["name"], line["name"], line["precision"]): line for rung in run["rungs"] for line in rung["lines"]}
        for run in (before, after)
    ]
    for key in dict.fromkeys([*lines[0], *lines[1]]):
        old, new = (run.get(key) for run in lines)
        name = " ".join(key)
        if old is None or new is None:
            if any(line is not None and line["verdict"] == "bug" for line in (old, new)):
                changes.add_row(Text(printable(name)), _described(old), _described(new))
                worse = worse or new is not None
        elif old["verdict"] != new["verdict"] or _grown(old, new):
            changes.add_row(Text(printable(name)), _described(old), _described(new))
            worse = worse or (new["verdict"] == "bug" and old["verdict"] != "bug")
    ran = [[rung["name"] for rung in run["rungs"]] for run in (before, after)]
    if ran[0] != ran[1]:
        changes.add_row("rungs", ", ".join(ran[0]), ", ".join(ran[1]))
    console.print(changes if changes.row_count else "nothing changed")
    return not worse


def _grown(old: dict, new: dict) -> bool:
    """Whether the candidate's error changed by more than GREW, in either direction."""
    values = [line["candidate_error"] for line in (old, new)]
    if None in values or not all(values):
        return False
    return max(values[0] / values[1], values[1] / values[0]) > GREW


def _described(line: dict | None) -> Text:
    if line is None:
        return Text("not compared")
    error = line["difference"] if line["candidate_error"] is None else line["candidate_error"]
    return Text.assemble((line["verdict"], COLOURS[line["verdict"]]), f" {number(error)}")


def _attested_changes(before: Report, after: Report) -> dict[str, tuple[Any, Any]]:
    """Returns {name of what the sides compute with: (before, after)} where the two differ."""
    changes = {}
    for field in ("sides", "architecture", "precision"):
        if before[field] != after[field]:
            changes[field] = before[field], after[field]
    for precision, pair in after["attestation"]["sides"].items():
        for role, entries in pair.items():
            old = before["attestation"]["sides"].get(precision, {}).get(role, {})
            for entry, value in entries.items():
                if entry in old and old[entry] != value:
                    changes[f"{role}: {entry} ({precision})"] = old[entry], value
    return changes
