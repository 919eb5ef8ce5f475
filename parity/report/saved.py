"""Builds the report of a finished comparison, a dict in JSON's types, and keeps it in the run's folder.

Everything that is shown is made from the report alone, so that a saved run looks as it did when it ran.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.claims import CLAIM, claimed
from input_pipeline.errors import RequestError
from input_pipeline.files import read_json, replacing, write_json
from parity.ladder.ladder import Ladder, RungResult
from parity.ladder.verdict import HIGH, LIMIT, LIMIT_REASON, MULTIPLE, MULTIPLE_REASON, SLACK, worst

VERSION = 2
RUNS = Path("runs/parity")
Report = dict[str, Any]


def build(ladder: Ladder, attestation: dict[str, Any], results: list[RungResult], command: str) -> Report:
    """Returns the report of a comparison: everything but the logits."""
    failed = next((result.name for result in results if result.verdict == "bug"), None)
    options = {key: value for key, value in dataclasses.asdict(ladder.options).items() if key != "fault"}
    return {
        "version": VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "options": json.loads(json.dumps(options, default=str)),
        "sides": ladder.names,
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


def with_accuracy(report: Report, judged: RungResult, margin: float) -> Report:
    """Returns the report with its accuracy rung's statistics, and the lines that follow from them, replaced."""
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


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have, such as infinity, by text, which `float` reads back."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def owned(folder: Path | None) -> Iterator[Path]:
    """Makes a run's folder and claims it for this process; a folder without a saved report is removed in the end.

    Args:
        folder: the folder; None: a new one in `RUNS`, named by the time.

    Raises:
        RequestError: the folder holds a saved run, another process owns it, or it cannot be made.
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
            with contextlib.suppress(OSError):  # it holds a saved run
                parent.rmdir()


def _made(folder: Path, *, another: bool) -> tuple[Path, bool]:
    """Makes the folder and returns (folder, whether it is new).

    Args:
        another: whether a folder that exists is to be replaced by a new one with a number at the end of its name.
    """
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
    """Writes logits.npz, if there was an accuracy rung, and last report.json, which makes the folder a saved run."""
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
    """Reads a saved run's report.

    Raises:
        RequestError: the folder holds no report, or the report of another version.
    """
    path = folder / "report.json" if folder.is_dir() else folder
    if not path.exists():
        raise RequestError(f"{path} cannot be read: there is no such file; give the folder of a saved run")
    report = read_json(path, dict, "run the comparison again")
    if report.get("version") != VERSION:
        raise RequestError(f"{path} is not a report of version {VERSION}; run the comparison again")
    return report


def load_logits(folder: Path) -> dict[str, np.ndarray]:
    """Reads {labels, ids, reference, candidate} of a saved run.

    Raises:
        RequestError: the run has no readable logits.
    """
    try:
        with np.load(folder / "logits.npz") as file:
            return {name: file[name] for name in ("labels", "ids", "reference", "candidate")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"{folder} holds no readable logits.npz ({error}); run its accuracy rung again") from None
