"""The end of a run that makes no progress: a collective that never ends, a file system that never answers, a deadlock.

Signs of life do not show that: they come from threads of their own (`scale/watch.py`, `process/signs.py`).
"""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType

from bit_jax.accounts.starts import STALLED, Start
from bit_jax.accounts.timeline import Timeline
from bit_jax.process.reporter import Reporter
from bit_jax.process.stillness import BEAT, Stillness
from bit_jax.scale import hosts
from input_pipeline import exits

# Before the first step of a start: compiling for a GPU, with a search for algorithms, takes many minutes, and so may
# opening a dataset, fetching weights or reading a first batch from storage that was not used before. A run that is
# ended there gets no further at its next start either, so this is generous.
FIRST = 3600.0  # seconds
OTHERS_SAY = 5 * BEAT  # seconds in which the other hosts, which stand still as well, notice and say where they stand


class Watchdog:
    """Ends this process if nothing happens for so long that the run must hang.

    What happens is that an activity of the timeline begins or ends, or that its `goes_on` is called, here or on another
    host: a host that waits for one that compiles or reads does not hang.

    Args:
        limit: seconds; before the first step of this start they are `FIRST` if that is more. 0: nothing is ended.
        timeline: the activities of this process.
        clock: returns seconds.

    Attributes:
        account: the account of this start, in which the end is written; None as long as there is none.
    """

    def __init__(self, limit: float, timeline: Timeline, clock: Callable[[], float] = time.monotonic):
        self.account: Start | None = None
        self._limit, self._timeline = limit, timeline
        self._still = Stillness(clock)
        self._stopping = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stopping.set()

    def look(self) -> str | None:
        """Returns a sentence if nothing has happened for too long, by the looks so far; one is due every `BEAT`."""
        seconds = self._still((self._timeline.turns, hosts.progress()))
        stepped = self.account is not None and self.account.steps
        if seconds <= (self._limit if stepped else max(self._limit, FIRST)):
            return None
        _, activity, since = self._timeline.own()
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - since))
        after = "before the first step" if self.account is None else f"after step {self.account.step}"
        return f"the run has made no progress for {seconds:.0f} s, since {began}, {after} ({activity})"

    def _watch(self) -> None:
        while not self._stopping.wait(BEAT):
            if (sentence := self.look()) is not None:
                try:
                    self._say(sentence)
                finally:
                    os._exit(1)

    def _say(self, sentence: str) -> None:
        """Writes to the account and to standard error why this process ends, and where its threads stand. A disk or a
        terminal that is stuck, perhaps the cause of it all, delays the end by some seconds."""
        place = hosts.place()
        reporter = Reporter("stall")
        remedy = "the same command continues from the last checkpoint; here is where the threads stand:"
        reporter(lambda: exits.tell(f"error: {place}{sentence}; {remedy}\n".encode()))
        reporter(lambda: _write_traces(place))
        if self.account is not None:
            self.account.end(STALLED, sentence)
        reporter.close()
        if hosts.progress():
            time.sleep(OTHERS_SAY)


def _write_traces(place: str) -> None:
    """Writes to standard error where every thread of this process stands, the innermost call first, under the threads'
    names and behind `place`, because several hosts may write to one terminal."""
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = file.read().decode(errors="replace")
    except OSError:  # a disk that is full or away
        return faulthandler.dump_traceback(2, all_threads=True)
    for thread in threading.enumerate():
        number = f"0x{thread.ident:016x} ("  # from Python 3.14 on, the name stands between the two
        text = text.replace(number, f"{number[:-1]}[{thread.name}] (")
    octets = "".join(f"{place}{line}\n" for line in text.splitlines()).encode()
    while octets:
        octets = octets[os.write(2, octets) :]
