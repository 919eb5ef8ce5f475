"""A finished comparison as one JSON-like dict, and that dict as a folder, a terminal table and JUnit XML.

Everything that is shown is shown from the dict, so that a saved run looks as it did when it ran.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from input_pipeline.claims import CLAIM, claimed
from input_pipeline.errors import RequestError
from input_pipeline.files import read_json, replacing, write_json
from input_pipeline.terminal import printable
from parity.ladder.ladder import ROLES, Ladder, RungResult
from parity.ladder.verdict import HIGH, LIMIT, LIMIT_REASON, MULTIPLE, MULTIPLE_REASON, SLACK, worst

VERSION = 2
RUNS = Path("runs/parity")
COLOURS = {"equal": "green", "rounding": "green", "bug": "red"}
Report = dict[str, Any]


def build(ladder: Ladder, attestation: dict[str, Any], results: list[RungResult], command: str) -> Report:
    """The whole of a comparison but its logits."""
    failed = next((result.name for result in results if result.verdict == "bug"), None)
    options = {key: value for key, value in dataclasses.asdict(ladder.options).items() if key != "fault"}
    return {
        "version": VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "options": json.loads(json.dumps(options, default=str)),
        "sides": {role: str(side) for role, side in ladder.sides.items()},
        "architecture": str(ladder.architecture),
        "precision": ladder.options.precision,
        "attestation": attestation,
        "judged_by": {
            "float64 limit": LIMIT,
            "float64 reason": LIMIT_REASON,
            "multiple": MULTIPLE,
            "multiple reason": MULTIPLE_REASON,
            "slack": SLACK,
            "percentile": HIGH,
        },
        "rungs": [_rung(result) for result in results],
        "failed": failed,
        "holds": failed is None,
    }


def writable(path: Path) -> None:
    """Makes the directory of a file that will be written, and tries whether it can be.

    Raises:
        RequestError: it cannot; this is better known at the start than after an hour.
    """
    if path.is_dir():
        raise RequestError(f"{path} is a directory, and a file is to be written there; give another path")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(_Tried), replacing(path):
            raise _Tried
    except OSError as error:
        raise RequestError(f"{path} cannot be written ({error.strerror}); give another path") from None
    finally:
        for parent in made:  # nothing is left of a comparison that is refused or fails
            with contextlib.suppress(OSError):
                parent.rmdir()


class _Tried(Exception):
    pass


@contextlib.contextmanager
def owned(folder: Path | None) -> Iterator[Path]:
    """Within, the folder of a run is this process's own; nothing is left of one in which no report was saved.

    Args:
        folder: None: a new one in `RUNS`, named by the time.

    Raises:
        RequestError: it holds a saved run, another process owns it, or it cannot be made.
    """
    wanted = folder or RUNS / datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    made = [parent for parent in wanted.parents if not parent.exists()]
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        taken, fresh = _made(wanted, another=folder is None)
        made = [taken, *made] if fresh else made
        with claimed(taken / CLAIM, taken, "choose another --run"):
            if (taken / "report.json").exists():
                raise RequestError(f"{taken} holds a saved run; choose another --run")
            yield taken
    except (FileExistsError, NotADirectoryError):
        raise RequestError(f"--run {wanted} is not a directory; choose another") from None
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # it holds the run
                parent.rmdir()


def _made(folder: Path, *, another: bool) -> tuple[Path, bool]:
    """The folder, and whether it is new; one that exists is taken, or `another` whose name has a number behind it."""
    for number in itertools.count(2):
        try:
            folder.mkdir()
            return folder, True
        except FileExistsError:
            if not another:
                return folder, False
            folder = folder.with_name(f"{folder.name.partition('_')[0]}_{number}")
    raise AssertionError("counting ends only in a new folder")


def save(report: Report, results: list[RungResult], folder: Path) -> None:
    """logits.npz where there was an accuracy rung, and last report.json, which makes it a saved run."""
    for result in results:
        if "arrays" in result.details:
            with replacing(folder / "logits.npz") as file:
                np.savez(file, **result.details["arrays"])
    try:
        write_json(folder / "report.json", _finite(report))
    except OSError:
        (folder / "logits.npz").unlink(missing_ok=True)
        raise


def load(folder: Path) -> Report:
    """A saved run's report.

    Raises:
        RequestError: the folder holds none, or one of another version.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    if not path.exists():
        raise RequestError(f"{path} cannot be read: there is no such file; give the folder of a saved run")
    report = read_json(path, dict, "run the comparison again")
    if report.get("version") != VERSION:
        raise RequestError(f"{path} is not a report of version {VERSION}; run the comparison again")
    return report


def load_logits(folder: Path) -> dict[str, np.ndarray]:
    """labels, ids, reference, candidate of a saved run.

    Raises:
        RequestError: the run kept none.
    """
    try:
        with np.load(folder / "logits.npz") as file:
            return {name: file[name] for name in ("labels", "ids", "reference", "candidate")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"{folder} holds no readable logits.npz ({error}); run its accuracy rung again") from None


def show(report: Report, console: Console) -> None:
    """The table, what was found, and one sentence at the end; the console takes no markup."""
    sides, precision = report["sides"], report["precision"]
    names = [sides[role] for role in ROLES]
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
    _show_accuracy(report, console)
    console.print(Text(printable(conclusion(report)), f"bold {'green' if report['holds'] else 'red'}"))


def _plain(text: object) -> Text:
    """As it is: names of arrays and files may look like markup."""
    return Text(printable(text))


def _marked(mark: str, sentence: str) -> Text:
    return Text.assemble((mark, "bold red"), "  ", printable(sentence))


def conclusion(report: Report) -> str:
    """One sentence."""
    reference, candidate = (report["sides"][role] for role in ROLES)
    if not report["rungs"]:
        return "nothing was compared"
    if report["holds"]:
        rungs = ", ".join(rung["name"] for rung in report["rungs"])
        return f"HOLDS: {candidate} and {reference} compute the same up to rounding ({rungs})"
    rung = next(rung for rung in report["rungs"] if rung["name"] == report["failed"])
    first = next(line for line in rung["lines"] if line["verdict"] == "bug")
    return (
        f"FAILS at {rung['name']}: {first['name']} differs between {candidate} and {reference} ({first['precision']})"
    )


def junit(report: Report) -> bytes:
    """JUnit XML: a suite a rung, a case an array and precision."""
    suites = ET.Element(
        "testsuites", name=f"parity: {report['sides']['candidate']} against {report['sides']['reference']}"
    )
    for rung in report["rungs"]:
        failures = [line for line in rung["lines"] if line["verdict"] == "bug"]
        suite = ET.SubElement(
            suites,
            "testsuite",
            name=rung["name"],
            tests=str(len(rung["lines"])),
            failures=str(len(failures)),
            time=f"{rung['seconds']:.3f}",
        )
        for line in rung["lines"]:
            name = f"{line['name']} [{line['precision']}]"
            case = ET.SubElement(suite, "testcase", classname=f"parity.{rung['name']}", name=name)
            if line["verdict"] == "bug":
                message = line["note"] or f"difference {line['difference']}, limit {line['limit']}"
                ET.SubElement(case, "failure", message=message).text = json.dumps(line)
    ET.indent(suites)
    return ET.tostring(suites, encoding="utf-8", xml_declaration=True) + b"\n"


def with_accuracy(report: Report, judged: RungResult, margin: float) -> Report:
    """The report with its accuracy rung's statistics and the lines that follow from them replaced."""
    names = {line.name for line in judged.lines}
    report = json.loads(json.dumps(report))
    for rung in report["rungs"]:
        if rung["name"] == "accuracy":
            kept = [line for line in rung["lines"] if line["name"] not in names]
            rung["lines"] = kept + [_finite(dataclasses.asdict(line)) for line in judged.lines]
            rung["details"] |= _finite(judged.details) | {"margin": margin}
            rung["findings"] = judged.findings
            rung["verdict"] = worst([line["verdict"] for line in rung["lines"]])
    report["failed"] = next((rung["name"] for rung in report["rungs"] if rung["verdict"] == "bug"), None)
    report["holds"] = report["failed"] is None
    return report


def _rung(result: RungResult) -> dict[str, Any]:
    details = {key: value for key, value in result.details.items() if key != "arrays"}
    return {
        "name": result.name,
        "verdict": result.verdict,
        "arrays": len({line.name for line in result.lines}),
        "seconds": result.seconds,
        "findings": result.findings,
        "details": details,
        "lines": [dataclasses.asdict(line) for line in result.lines],
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity: such numbers become text, which `float` reads back."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def number(value: Any) -> str:
    number = float(value)
    return "0" if number == 0 else f"{number:.1e}"


def short(name: str) -> str:
    """A parameter's key without what every key says; other names as they are."""
    return name.replace("resnet/", "").replace("standardized_conv2d/", "")


def _float64_cell(rung: dict) -> str:
    lines = [line for line in rung["lines"] if line["precision"] == "fp64" and float(line["limit"]) < math.inf]
    if not lines:
        return ""
    line = max(lines, key=lambda line: (line["verdict"] == "bug", float(line["difference"])))
    if line["verdict"] == "equal":
        return "bit for bit equal"
    return f"{number(line['difference'])}  {short(line['name'])}"


def _precision_cell(rung: dict, precision: str) -> str:
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
    errors = (number(line[f"{who}_error"]) for who in ROLES)
    return f"{' / '.join(errors)} ({number(line['limit'])})  {short(line['name'])}"


def _show_accuracy(report: Report, console: Console) -> None:
    rung = next((rung for rung in report["rungs"] if rung["name"] == "accuracy"), None)
    if rung is None or "acc1" not in rung["details"]:
        return
    for sentence in accuracy_sentences(rung["details"]):
        console.print(_plain(sentence))


def accuracy_sentences(details: dict[str, Any]) -> list[str]:
    """What the statistics of the accuracy rung say."""
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
