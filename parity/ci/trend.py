"""A page over many saved runs: what each used of its limits, how long it took, and what it computed with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from parity.ci.baseline import PROGRAM, of_report
from parity.report import page, saved
from parity.report.saved import Report
from parity.report.terminal import conclusion

ATTESTED = ("device", "versions", PROGRAM)  # entries of the attestation that the page lists


def write(folders: Sequence[Path], path: Path) -> list[Report]:
    """Writes the page, atomically, and returns the runs' reports in the order of their dates.

    Raises:
        RequestError: a folder holds no saved run.
    """
    reports = sorted((saved.load(folder) for folder in folders), key=lambda report: report["created"])
    entries = [of_report(report) for report in reports]
    text = "The largest share of its limit that any array used, by rung and precision; above 1 it is a bug."
    plots = [page.plot("Share of the limits", text, _lines, entries, "shares", "share of the limit")]
    plots.append(page.plot("Time", "Seconds that each rung took.", _lines, entries, "seconds", "seconds"))
    page.render("trend.html.j2", path, runs=[_row(report) for report in reports], plots=plots)
    return reports


def _lines(figure: Figure, entries: list[dict[str, Any]], what: str, label: str) -> None:
    axes = figure.subplots()
    for name in dict.fromkeys(name for entry in entries for name in entry[what]):
        values = [entry[what].get(name, np.nan) for entry in entries]
        axes.plot(range(len(entries)), [value or np.nan for value in values], "o-", markersize=3, label=name)
    if what == "shares":
        axes.axhline(1, color="black", linestyle=":", linewidth=1)
    axes.set(yscale="log", ylabel=label)
    axes.set_xticks(
        range(len(entries)), [entry["created"][:16] for entry in entries], rotation=45, ha="right", fontsize=7
    )
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))


def _row(report: Report) -> dict[str, Any]:
    """Returns {created, sides, conclusion, holds, attested: {entry: value}} of a run."""
    entries = report["attestation"]["sides"][report["precision"]]["candidate"]
    attested = {entry: page.plain(entries[entry]) for entry in ATTESTED if entry in entries}
    return {
        "created": report["created"],
        "command": report["command"],
        "conclusion": conclusion(report),
        "holds": report["holds"],
        "attested": attested,
    }
