"""What a run has written of itself, as far as its next start is concerned: starts.jsonl and config.json of WORKDIR."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from bit_jax.stores.store import Store
from input_pipeline.errors import RequestError
from input_pipeline.files import Url, place


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
        text: the flag's value, a path or a URL; None, or what cannot be read from here, for one of which nothing is
            known.
    """

    def __init__(self, text: str | None):
        self._place: Path | Store | None = None
        with contextlib.suppress(RequestError):
            there = None if text is None else place(text)
            self._place = Store(there) if isinstance(there, Url) else there

    def _content(self, name: str) -> bytes:
        """Returns the content of a file; empty if there is none, or if it cannot be read."""
        try:
            if isinstance(self._place, Store):
                return self._place.read(name) or b""
            return b"" if self._place is None else (self._place / name).read_bytes()
        except (OSError, RequestError):
            return b""

    def length(self) -> int:
        """Returns the length of starts.jsonl in bytes, for `last_start`."""
        return len(self._content("starts.jsonl"))

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
        text = self._content("starts.jsonl")
        found = []
        for line in text[since if since <= len(text) else 0 :].splitlines():
            with contextlib.suppress(ValueError):  # UnicodeDecodeError and JSONDecodeError
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def config(self) -> dict[str, Any] | None:
        """Returns the content of config.json; None if no run has begun there, or if it is damaged, which the run itself
        says."""
        try:
            content = json.loads(self._content("config.json"))
        except ValueError:
            return None
        return content if isinstance(content, dict) else None
