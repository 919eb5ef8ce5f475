"""What runs before this one used of their limits, and how long they took: `--baseline FILE`."""

import statistics
from pathlib import Path
from typing import Any

from input_pipeline.errors import RequestError
from input_pipeline.files import read_json, write_json
from parity.report.saved import Report

FORMAT = "parity baseline"
KEPT = 50  # runs that the file keeps
CHANGED = 2.0  # a share of a limit is worse if it is so many times the largest before, better if the smallest over it
SLOWER = 1.5  # the same of seconds, which other work on the machine lengthens
ENOUGH = 5  # runs after which a limit is said to be wide
WIDE = 0.25  # share of a limit that no run exceeded, so that a tighter one would hold
PROGRAM = "forward program sha256"  # entry of the attestation
# what has to be equal for two runs to be compared
SAME = ("weights", "size", "rows", "batches", "seed", "dataset", "steps")


def opened(path: Path) -> list[dict[str, Any]]:
    """Returns the runs in a baseline's file; none if there is no such file.

    Raises:
        RequestError: the file is something else.
    """
    if not path.exists():
        return []
    content = read_json(path, dict, "give another --baseline, which is made if there is none")
    if content.get("format") != FORMAT:
        raise RequestError(f"{path} is no baseline; give another file, which is made if there is none")
    return content["runs"]


def compared(report: Report, runs: list[dict[str, Any]]) -> list[str]:
    """Returns a sentence for each rung and precision, on what it used of its limits, and for each rung's time."""
    current = of_report(report)
    alike = [run for run in runs if run["of"] == current["of"]]
    if not alike:
        return [f"baseline: the first run of {current['of']['sides']} like this; there is nothing to compare with"]
    sentences = []
    for what, unit, factor in (("shares", "%", CHANGED), ("seconds", "s", SLOWER)):
        for name, value in current[what].items():
            before = [run[what][name] for run in alike if name in run[what]]
            if before:
                sentences.append(_sentence(name, value, before, unit, factor))
    return sentences


def of_report(report: Report) -> dict[str, Any]:
    """Returns a run's entry: the largest share of a limit by rung and precision, and each rung's seconds."""
    shares = {}
    for rung in report["rungs"]:
        for precision in dict.fromkeys(line["precision"] for line in rung["lines"]):
            lines = [line for line in rung["lines"] if line["precision"] == precision]
            used = [share for line in lines if (share := share_of(line)) is not None]
            if used:
                shares[f"{rung['name']} {precision}"] = max(used)
    of = work(report["options"], report["sides"], report["precision"])
    seconds = {f"{rung['name']} time": rung["seconds"] for rung in report["rungs"]}
    program = report["attestation"]["sides"][report["precision"]]["candidate"].get(PROGRAM)
    return {"created": report["created"], "of": of, "program": program, "shares": shares, "seconds": seconds}


def work(options: dict[str, Any], sides: dict[str, str], precision: str) -> dict[str, Any]:
    """Returns what two runs must have in common to be compared."""
    settings = {name: options[name] for name in SAME}
    return settings | {"sides": f"{sides['candidate']} against {sides['reference']}", "precision": precision}


def same_program(of: dict[str, Any], attestation: dict[str, Any], runs: list[dict[str, Any]]) -> str | None:
    """Returns a sentence if the candidate's compiled forward pass is that of the latest run of the same work; None if
    it is not, or there is none. It is known before anything is compared."""
    program = attestation["sides"][of["precision"]]["candidate"].get(PROGRAM)
    latest = next((run for run in reversed(runs) if run["of"] == of), None)
    if program is None or latest is None or latest["program"] != program:
        return None
    return f"the candidate's compiled forward pass is that of {latest['created']}: the compiler changed nothing in it"


def share_of(line: dict[str, Any]) -> float | None:
    """Returns the share of its limit that a line of a report uses; None if it is exact, or has no limit."""
    if line["used"] is not None:
        return float(line["used"])
    limit = float(line["limit"])
    return float(line["difference"]) / limit if 0 < limit < float("inf") else None


def added(path: Path, report: Report, runs: list[dict[str, Any]]) -> None:
    """Writes the file with this run at its end, if it holds; one that fails is no measure for others."""
    if report["holds"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "runs": [*runs, of_report(report)][-KEPT:]})


def _sentence(name: str, value: float, before: list[float], unit: str, factor: float) -> str:
    low, high = min(before), max(before)
    change = "the same"
    if value > factor * high:
        change = "WORSE"
    elif value < low / factor:
        change = "better"
    shown = [f"{100 * number:.3g} %" if unit == "%" else f"{number:.1f} s" for number in (value, low, high)]
    runs = f"{len(before)} run{'s' if len(before) > 1 else ''}"
    middle = statistics.median(before)
    ratio = f", {value / middle:.2f} times the median" if middle and change != "the same" else ""
    of_limit = " of the limit" if unit == "%" else ""
    sentence = f"{name}: {change}, {shown[0]}{of_limit} ({shown[1]} to {shown[2]} in {runs}{ratio})"
    if unit == "%" and len(before) >= ENOUGH and max(high, value) < WIDE:
        sentence += f"; no run used more than {100 * max(high, value):.3g} %, so that a tighter limit would hold"
    return sentence
