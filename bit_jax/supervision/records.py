"""What a run has written of itself, as far as its next start is concerned: starts.jsonl and config.json of WORKDIR."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from input_pipeline.errors import RequestError
from input_pipeline.files import user_path


@dataclasses.dataclass(frozen=True)
class Record:
    """The last start that starts.jsonl tells of.

    Attributes:
        step: last finished step; None if it is not known.
        ended: finished, stopped, failed, refused, lost host, stalled or defect; None if the start could not write its
            end.
        why: the sentence that it ended with; may be empty.
        devices, hosts: how many it ran on; None if it does not say.
        began: whether it had restored its checkpoint, or made its first parameters.
    """

    step: int | None = None
    ended: str | None = None
    why: str = ""
    devices: int | None = None
    hosts: int | None = None
    began: bool = False


class RunFolder:
    """The work directory that a command's --workdir names, to be read; nothing of it has to be there.

    Args:
        path: the flag's value; None, or what is no folder of this machine, for one that cannot be read.
    """

    def __init__(self, path: str | None):
        self._path: Path | None = None
        with contextlib.suppress(RequestError):
            self._path = None if path is None else user_path(path)

    def length(self) -> int:
        """Returns the length of starts.jsonl in bytes, for `since`."""
        try:
            return 0 if self._path is None else (self._path / "starts.jsonl").stat().st_size
        except OSError:
            return 0

    def last_start(self, since: int = 0) -> Record | None:
        """Returns the last start in starts.jsonl; None if there is none.

        A start has several lines, all with the same "began"; a later one adds to those before it. Lines that are cut or
        damaged count for nothing.

        Args:
            since: number of bytes to leave out, to see only starts that were begun after a call of `length`.
        """
        merged: dict[str, Any] = {}
        for line in self._lines(since):
            merged = (merged if line.get("began") == merged.get("began") else {}) | line
        if not merged:
            return None
        step, devices, hosts = (
            value if isinstance(value := merged.get(name), int) else None for name in ("step", "devices", "hosts")
        )
        ended, why = merged.get("ended"), merged.get("why")
        began = merged.get("start") is not None
        return Record(step, str(ended) if ended else None, str(why or ""), devices, hosts, began)

    def _lines(self, since: int) -> list[dict[str, Any]]:
        if self._path is None:
            return []
        try:
            text = (self._path / "starts.jsonl").read_bytes()
        except OSError:
            return []
        found = []
        for line in text[since if since <= len(text) else 0 :].splitlines():
            with contextlib.suppress(ValueError):  # UnicodeDecodeError and JSONDecodeError
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def config(self) -> dict[str, Any] | None:
        """Returns the content of config.json; None if no run has begun there, or if it is damaged, which the run itself
        says."""
        try:
            content = None if self._path is None else json.loads((self._path / "config.json").read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None
