"""The table of a site's operations, each fed the oracle's values, for the terminal and the page."""

from typing import Any

from parity.report.saved import Report

COLUMNS = ("value", "by input", "by parameters")  # what of an operation is judged; a column holds the worst of its kind


def tables(report: Report) -> list[dict[str, Any]]:
    """Returns a table of each rung that looked for an operation: {rung, precision, wrong, rows}, where a row is
    {operation, cells: {column: line}}; `wrong` names what errs by itself."""
    found = []
    for rung in report["rungs"]:
        if judged := rung["details"].get("operations"):
            rows = _rows(judged["lines"])
            found.append({"rung": rung["name"], "rows": rows} | {key: judged[key] for key in ("precision", "wrong")})
    return found


def error(line: dict[str, Any]) -> float:
    """Returns what a line was judged by: in float64 the sides' difference, else the larger of their errors."""
    if line["candidate_error"] is None:
        return float(line["difference"])
    return max(float(line["reference_error"]), float(line["candidate_error"]))


def _rows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        operation, _, what = line["name"].partition(", ")
        column = "by input" if what == "by shortcut" else what if what in COLUMNS else "by parameters"
        cells = rows.setdefault(operation, {"operation": operation, "cells": {}})["cells"]
        worse = (line["verdict"] == "bug", error(line))
        if column not in cells or worse > (cells[column]["verdict"] == "bug", error(cells[column])):
            cells[column] = line
    return [row for row in rows.values() if row["cells"]]
