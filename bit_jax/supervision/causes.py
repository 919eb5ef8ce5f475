"""Why a start ended, and whether that speaks for another one: a machine's fault, the run's own, or a wrong request."""

import dataclasses
import re
import signal
from collections.abc import Sequence
from typing import Literal

from bit_jax.supervision.records import Record
from input_pipeline import exits

REFUSED = 2  # the exit code of a wrong request
RSH_FAILED = 255  # ssh's exit code for its own failures


@dataclasses.dataclass(frozen=True)
class End:
    """The end of one host.

    Attributes:
        host: what it is called, such as "host 1 on b".
        code: its exit code, or 128 plus the number of the signal that killed it.
        far: whether it ran behind ssh, whose own exit code may be in place of the host's.
        killed: whether the supervisor killed it, because it had not ended long after another one.
        silent: whether its guard killed it, because it gave no sign of life any more.
    """

    host: str
    code: int
    far: bool = False
    killed: bool = False
    silent: bool = False

    @property
    def lost(self) -> str:
        """What the machine, the system or somebody has done to the host; empty if it ended by itself."""
        if self.killed:
            return f"{self.host} was frozen or waited for others, and was killed"
        if self.far and self.code == RSH_FAILED:
            return f"the connection to {self.host} was lost"
        if self.silent:
            return f"{self.host} gave no sign of life any more, and was killed"
        if self.code <= 128:
            return ""
        name = _signal(self.code - 128)
        if self.code - 128 in exits.ASKING:
            return f"{self.host} was asked to end by {name}, which did not come through this command"
        return f"{self.host} was killed by {name}"

    @property
    def said(self) -> str:
        return self.lost or f"{self.host} ended with exit code {self.code}"


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a start ended.

    Attributes:
        fault: whose it is. A machine's may be gone at the next start; the run's own comes again if it is in the data or
            the numbers; a wrong request is wrong every time.
        sentence: what happened.
        kind: a word that is the same if the run's own fault comes again.
    """

    fault: Literal["machine", "run", "request"]
    sentence: str
    kind: str = ""


def cause_of(ends: Sequence[End], record: Record | None) -> Cause | None:
    """Returns why a start ended; None if it has finished.

    Hosts that lose another one, or wait for it in vain at the start, end with exit code 1, so one that was lost
    explains them. The first end counts before later ones: a host that waits for one whose request was refused is
    killed.

    Args:
        ends: how the hosts ended, the first one first.
        record: what host 0 has written of this start; None if nothing.
    """
    failed = [end for end in ends if end.code]
    if not failed:
        return None
    if failed[0].lost:
        return Cause("machine", failed[0].lost)
    if refused := next((end for end in failed if end.code == REFUSED), None):
        # what had begun to train was no wrong request: its disk is full, or one of its files damaged
        began = record is not None and record.began
        return Cause("run", _why(refused, record), "refused") if began else Cause("request", refused.said)
    if lost := next((end for end in failed if end.lost), None):
        return Cause("machine", f"{failed[0].said}, and {lost.lost}" if lost.killed else lost.lost)
    return _recorded(failed[0], record)


def _recorded(first: End, record: Record | None) -> Cause:
    """Returns the cause where every host ended by itself with exit code 1; host 0 has written why, if it could. The
    advice behind the first clause is left out: the hosts themselves have given it."""
    if record is None:  # as where the hosts did not find each other
        return Cause("machine", f"{first.said} before the run had begun")
    if record.ended is None:
        return Cause("run", first.said, f"exit code {first.code}")
    why = _why(first, record)
    if record.ended == "stalled":
        return Cause("machine", why)
    if record.ended == "lost host":
        # a host that fails by itself tells the others why, and one that is not heard any more does not
        if own := re.search(r"\bhost \d+ ended: (.+)", why):
            return Cause("run", own[0], "failed")
        return Cause("machine", why)
    return Cause("run", why, record.ended)


def _why(end: End, record: Record | None) -> str:
    return ((record.why if record is not None else "") or end.said).partition("; ")[0]


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
