"""Shows a report in the terminal: a table of the rungs, the findings, and one sentence at the end."""

import math
import shlex
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from input_pipeline.terminal import printable
from parity.ladder.ladder import ROLES
from parity.ladder.verdict import LIMIT
from parity.report import operations
from parity.report.saved import Report

COLOURS = {"equal": "green", "rounding": "green", "bug": "red"}


def show(report: Report, console: Console) -> None:
    """Prints notes, mismatches, rungs, findings and the conclusion; the console must not read markup."""
    sides, precision = report["sides"], report["precision"]
    names = [sides[role] for role in ROLES]
    for sentence in report["attestation"].get("notes", ()):
        console.print(Text.assemble(("note", "bold"), "  ", printable(sentence)))
    for sentence in report["attestation"]["mismatches"]:
        console.print(_marked("mismatch", sentence))
    table = Table(title=_plain(f"{names[1]} against {names[0]}, {report['architecture']}"), title_justify="left")
    table.add_column("rung")
    table.add_column("verdict")
    table.add_column("arrays", justify="right")
    table.add_column(f"float64: furthest apart ({LIMIT:.0e} allowed)")
    if precision != "fp64":
        table.add_column(_plain(f"{precision} error: {names[0]} / {names[1]} (allowed)"))
    table.add_column("s", justify="right")
    for rung in report["rungs"]:
        verdict = rung["verdict"]
        cells = [rung["name"], Text(verdict, COLOURS[verdict]), str(rung["arrays"]), _plain(_float64_cell(rung))]
        cells += [_plain(_precision_cell(rung, precision))] if precision != "fp64" else []
        table.add_row(*cells, f"{rung['seconds']:.1f}")
    console.print(table)
    for rung in report["rungs"]:
        for finding in rung["findings"]:
            console.print(_marked(rung["name"], finding))
    _show_operations(report, console)
    _show_accuracy(report, console)
    _show_baseline(report, console)
    for sentence in report.get("answers", []):
        console.print(_plain(sentence))
    console.print(Text(printable(conclusion(report)), f"bold {'green' if report['holds'] else 'red'}"))
    if not report["holds"] and report["rungs"]:
        console.print(_plain(f"again: {again(report)}"))


def _plain(text: object) -> Text:
    """Returns the text as it is: names of arrays and files may look like markup."""
    return Text(printable(text))


def _marked(mark: str, sentence: str) -> Text:
    """Returns a sentence behind a mark in red."""
    return Text.assemble((mark, "bold red"), "  ", printable(sentence))


def _float64_cell(rung: dict) -> str:
    """Returns the largest difference in float64 and its array; that of a bug, if there is one."""
    lines = [line for line in rung["lines"] if line["precision"] == "fp64" and float(line["limit"]) < math.inf]
    if not lines:
        return ""
    line = max(lines, key=lambda line: (line["verdict"] == "bug", float(line["difference"])))
    if line["verdict"] == "equal":
        return "bit for bit equal"
    return f"{number(line['difference'])}  {short(line['name'])}"


def _precision_cell(rung: dict, precision: str) -> str:
    """Returns both sides' errors on the array that takes the largest share of its limit; of accuracy, both acc1."""
    if rung["name"] == "accuracy":
        details = rung["details"]
        if "acc1" not in details:
            return ""
        flips = details["flips"]
        return (
            f"acc1 {details['acc1'][0]:.5f} / {details['acc1'][1]:.5f}, {len(flips)} flipped of {details['examples']:,}"
        )
    lines = [line for line in rung["lines"] if line["precision"] == precision and line["used"] is not None]
    if not lines:
        return ""
    line = max(lines, key=lambda line: float(line["used"]))
    errors = (number(line[f"{who}_error"]) for who in ROLES if line[f"{who}_error"] is not None)
    return f"{' / '.join(errors)} ({number(line['limit'])})  {short(line['name'])}"


def _show_operations(report: Report, console: Console) -> None:
    for found in operations.tables(report):
        table = Table(title=f"operations, each fed the oracle's values ({found['precision']})", title_justify="left")
        table.add_column("operation")
        for column in operations.COLUMNS:
            table.add_column(column, justify="right")
        for row in found["rows"]:
            lines = [row["cells"].get(column) for column in operations.COLUMNS]
            cells = [Text(number(operations.error(line)), COLOURS[line["verdict"]]) if line else "" for line in lines]
            table.add_row(_plain(row["operation"]), *cells)
        console.print(table)


def _show_accuracy(report: Report, console: Console) -> None:
    rung = next((rung for rung in report["rungs"] if rung["name"] == "accuracy"), None)
    if rung is None or "acc1" not in rung["details"]:
        return
    for sentence in accuracy_sentences(rung["details"]):
        console.print(_plain(sentence))


def _show_baseline(report: Report, console: Console) -> None:
    """Prints what changed against the baseline, and how much did not."""
    sentences = report.get("baseline", [])
    same = [sentence for sentence in sentences if ": the same, " in sentence]
    for sentence in sentences:
        if sentence not in same or sentence.endswith("would hold"):
            console.print(_plain(sentence))
    if same:
        console.print(_plain(f"baseline: {len(same)} of {len(sentences)} figures are the same as before"))


def accuracy_sentences(details: dict[str, Any]) -> list[str]:
    """Returns sentences with the statistics of the accuracy rung."""
    (both, reference_only), (candidate_only, neither) = details["table"]
    low, high = (f"{100 * end:+.4f}" for end in details["interval"])
    flips, margin = details["flips"], details["margin"]
    reference5, candidate5 = details["acc5"]
    unexpected = sum(not flip["expected"] for flip in flips)
    equivalence = f"equivalence within {margin:g} points is {details['equivalence']}"
    if details["equivalence"] == "not shown":
        equivalence += f": that takes about {details['examples_needed']:,} images"
    return [
        f"right: both {both:,}, the reference alone {reference_only:,}, the candidate alone {candidate_only:,}, "
        f"neither {neither:,}; McNemar p = {details['mcnemar']:.3g}; acc5 {reference5:.5f} / {candidate5:.5f}",
        f"difference {100 * details['difference']:+.4f} points, 95 % interval {low} to {high}; {equivalence}",
        f"{len(flips)} predictions flipped, {unexpected} by more than twice the {number(details['measured_error'])} "
        "that rounding brings to a logit at most",
    ]


def conclusion(report: Report) -> str:
    """Returns one sentence on whether the comparison holds, and if not, where it fails."""
    if "conclusion" in report:  # of a run's step, see `step.Examination`
        return report["conclusion"]
    reference, candidate = (report["sides"][role] for role in ROLES)
    if not report["rungs"]:
        return "nothing was compared"
    accepted = "; ".join(report["attestation"].get("accepted", ()))
    accepted = f", with accepted differences: {accepted}" if accepted else ""
    if report["holds"]:
        rungs = ", ".join(rung["name"] for rung in report["rungs"])
        return f"HOLDS: {candidate} and {reference} compute the same up to rounding ({rungs}){accepted}"
    rung = next(rung for rung in report["rungs"] if rung["name"] == report["failed"])
    first = next(line for line in rung["lines"] if line["verdict"] == "bug")
    return (
        f"FAILS at {rung['name']}: {first['name']} differs between {candidate} and {reference} ({first['precision']})"
        f"{accepted}"
    )


def again(report: Report) -> str:
    """Returns the command that runs the rung at which a comparison failed, alone if it can be, in a new folder."""
    words = shlex.split(report["command"])
    if "--run" in words:
        place = words.index("--run")
        del words[place : place + 2]
    if "all" in words and "--until" not in words:
        words[words.index("all")] = report["failed"]
    return shlex.join(words)


def number(value: Any) -> str:
    """Writes an error with two digits; zero is 0."""
    return "0" if float(value) == 0 else f"{float(value):.1e}"


def short(name: str) -> str:
    """Returns a parameter's key without the parts that all keys share; other names are returned unchanged."""
    return name.replace("resnet/", "").replace("standardized_conv2d/", "")
