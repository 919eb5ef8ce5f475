"""Measures how far JAX and PyTorch differ, by architecture, for the table of docs/parity_verdict.md.

It runs `python -m parity all --until RUNG` for each case and keeps a summary of each saved report.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro
from rich.table import Table

from input_pipeline import terminal
from input_pipeline.files import writable, write_json

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "parity.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison, with parity's flags.

    Attributes:
        weights, size, rows, precision: parity's flags of those names.
        until: name of the last rung that is compared.
    """

    weights: str
    size: str
    rows: int
    precision: str = "fp32"
    until: str = "gradients"

    def __str__(self) -> str:
        return f"{self.weights.removeprefix('random:')}, {self.size}, {self.rows} images, {self.precision}"


CASES = (
    Case("embedded", "64", 8, until="accuracy"),
    Case("random:R14x2", "17x64", 4),
    Case("random:R26x1", "33x65", 8),
    Case("random:R101x0.5", "64", 4),
    Case("random:R50x1", "224", 2),
    Case("embedded", "64", 8, "bf16"),
    Case("embedded", "64", 8, "fp16", until="accuracy"),
    Case("random:R152x0.5", "48x31", 4),
)


def main(only: str = "", output: Path = RESULTS) -> None:
    """Measures one case after another and prints the table; all take a quarter of an hour on two cores.

    Args:
        only: Text that the name of a case must contain to be measured; the others keep their records. Empty: all cases.
        output: JSON file with one record for each case.
    """
    writable(output)
    records = {record["case"]: record for record in json.loads(output.read_text())} if output.exists() else {}
    for case in CASES:
        if only in str(case):
            print(f"{case} ...", file=sys.stderr, flush=True)
            records[str(case)] = measure(case)
            write_json(output, list(records.values()))
    terminal.console(width=160).print(table([records[str(case)] for case in CASES if str(case) in records]))


def measure(case: Case) -> dict:
    """Runs one comparison and returns its record."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "parity", "all", "--until", case.until, "--weights", case.weights]
        command += ["--size", case.size, "--rows", str(case.rows), "--precision", case.precision, "--run", folder]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        report = Path(folder) / "report.json"
        if not report.exists():
            sys.exit(done.stderr)
        saved = json.loads(report.read_text())
    rungs = {rung["name"]: rung for rung in saved["rungs"]}
    return {
        "case": str(case),
        "command": "python " + " ".join(command[1:-2]),
        "holds": saved["holds"],
        "seconds": sum(rung["seconds"] for rung in saved["rungs"]),
        "amplitude in ulp": rungs["forward"]["details"].get("amplitude", {}).get("ulp"),
        "rungs": {name: summary(rung["lines"]) for name, rung in rungs.items()},
    }


def summary(lines: list[dict]) -> dict:
    """Summarizes a rung's lines.

    Returns:
        The number of arrays, the largest difference in float64, the candidate's largest error, the least, median and
        largest ratio of the two sides' errors, and the largest share that an error takes of its limit.
    """
    float64 = [float(line["difference"]) for line in lines if line["precision"] == "fp64"]
    judged = [line for line in lines if line["reference_error"] and line["candidate_error"]]
    ratios = sorted(line["candidate_error"] / line["reference_error"] for line in judged)
    used = [line["used"] for line in judged if line["used"] is not None]
    return {
        "arrays": len({line["name"] for line in lines}),
        "float64": max(float64, default=None),
        "error": max((line["candidate_error"] for line in judged), default=None),
        "ratio": [ratios[0], ratios[len(ratios) // 2], ratios[-1]] if ratios else None,
        "used": max(used, default=None),
    }


def table(records: list[dict]) -> Table:
    """Returns the records as a table with a row for each case and rung."""
    shown = Table(title="JAX against PyTorch")
    for column in (
        "case",
        "rung",
        "arrays",
        "float64 apart",
        "JAX error",
        "JAX/PyTorch: least, median, most",
        "of allowed",
    ):
        shown.add_column(column)
    for record in records:
        for name, rung in record["rungs"].items():
            ratio = " ".join(f"{value:.2f}" for value in rung["ratio"]) if rung["ratio"] else ""
            numbers = ["" if rung[key] is None else f"{rung[key]:.1e}" for key in ("float64", "error")]
            used = "" if rung["used"] is None else f"{rung['used']:.0%}"
            shown.add_row(record["case"], name, str(rung["arrays"]), *numbers, ratio, used)
    return shown


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
