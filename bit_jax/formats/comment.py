"""The comment of an official `.npz`, which keeps what its weights were trained with and no array says.

An `.npz` is a zip archive, and a zip archive ends with a comment. NumPy, timm and the original code do not look at it,
and whoever copies or renames the file keeps it. BiT's own value is not written, so that its files stay as they were.
"""

import json
import numbers
from pathlib import Path
from typing import Any

from bit_jax.formats.official import AGAIN, SPELLED, WeightsError
from bit_jax.model.architecture import STANDARDIZE_EPS

KEY = "standardize_eps"
END = b"PK\x05\x06"  # what a zip archive's last record begins with: 22 bytes, the last two the comment's length
END_SIZE = 22
LONGEST = (1 << 16) - 1  # bytes of a comment


def is_eps(value: Any) -> bool:
    """Whether a value can be added to a variance: a number above 0 and below 1."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 < float(value) < 1


def written(standardize_eps: float) -> bytes:
    """Returns the comment for a file whose model adds that to a kernel's variance: none for BiT's own value."""
    return b"" if standardize_eps == STANDARDIZE_EPS else json.dumps({KEY: float(standardize_eps)}).encode()


def read(path: Path) -> float:
    """Returns what a file's model adds to a kernel's variance.

    Another's comment says nothing, and stands for BiT's value.

    Raises:
        WeightsError: the comment is cut off, or names the constant and is not what `written` writes.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - END_SIZE - LONGEST))
        tail = file.read(END_SIZE + LONGEST)
    start = tail.rfind(END)
    record = tail[start:]
    length = int.from_bytes(record[END_SIZE - 2 : END_SIZE], "little")
    comment = record[END_SIZE : END_SIZE + length]
    if start < 0 or len(comment) != length:
        # zipfile takes such a file, and a constant that was lost would be taken for BiT's
        raise WeightsError(f"{path} is truncated: its last {length - len(comment):,} bytes are missing; {AGAIN}")
    if KEY.encode() not in comment:
        return STANDARDIZE_EPS
    try:
        content = json.loads(comment)
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.keys() != {KEY} or not is_eps(content[KEY]):
        raise WeightsError(
            f'{path} has a damaged comment ({repr(comment)[1 : SPELLED + 1]}), where {{"{KEY}": 1e-08}} or the like is '
            f"written; {AGAIN}"
        )
    return float(content[KEY])
