"""Reports that neither end nor block the work that they are about."""

import queue
import threading
from collections.abc import Callable

WAITING = 1000  # reports that may wait for a slow terminal or disk; further ones are dropped
PATIENCE = 5.0  # seconds that the end of a run waits for these reports


class Reporter:
    """A thread that makes reports in order; after the first that fails, the others are dropped.

    Attributes:
        failure: the reason why a report failed; empty as long as none did.
    """

    def __init__(self, name: str, end: Callable[[], object] = lambda: None):
        """end: function that the thread calls after the last report."""
        self.failure = ""
        self._end, self._ended = end, threading.Event()
        self._reports: queue.Queue[Callable[[], None]] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __call__(self, report: Callable[[], None]) -> None:
        """Queues the report and returns at once."""
        try:
            self._reports.put_nowait(report)
        except queue.Full:  # the terminal or disk is stuck
            return

    def close(self) -> None:
        """Waits for the remaining reports, for `PATIENCE` seconds at most."""
        self._ended.set()
        self(lambda: None)  # wakes a thread that waits for a report
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        while not (self._ended.is_set() and self._reports.empty()):
            self._do(self._reports.get())
        self._do(self._end)

    def _do(self, report: Callable[[], object]) -> None:
        if self.failure and report is not self._end:
            return
        try:
            report()
        except Exception as error:  # a closed pipe, a full disk, or a library's reaction to one
            self.failure = str(error) or type(error).__name__
