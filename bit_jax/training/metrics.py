"""Reading metrics.jsonl, the file of a run with a JSON object a line; see `log.Log.write`."""

import math
import sys
from pathlib import Path
from typing import Any

from input_pipeline.errors import RequestError
from input_pipeline.files import DamagedFile, is_number, parse_json


def read(path: Path, last: float = math.inf) -> tuple[list[dict[str, Any]], int]:
    """Returns the entries up to step `last`, in order, and the number of damaged lines.

    No file is a file without lines. A last line without an end, which a killed process leaves, is dropped and not
    counted.

    Raises:
        RequestError: the file cannot be read.
    """
    if not path.is_file():
        return [], 0
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise RequestError(f"cannot read {path} ({error.strerror}); mend that and start again") from None
    entries, bad = [], 0
    for line in lines:
        try:
            entry = parse_json(line, dict, path, "")
        except DamagedFile:
            entry = {}
        if isinstance(step := entry.get("step"), int) and is_number(step):
            entries.append({sys.intern(name): value for name, value in entry.items()})  # the names are kept once
        else:
            bad += 1
    return [entry for entry in entries if entry["step"] <= last], bad
