"""Seconds by activity, and FlagPerf's rates from them. This module imports no framework."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator

STARTING, OTHER = "starting", "other"  # activities that no `with` block names
Observer = Callable[[str, float | None], None]  # it is told an activity's name, and its seconds where it ends


def nobody(activity: str, seconds: float | None) -> None:
    """The observer that does nothing."""


class Timeline:
    """Seconds by activity. To time work of a device, wait for it before the end of the `with` block.

    Activities nest, in one thread. `seconds` counts the inner ones' time for the outer ones too; `own` counts each
    moment once, for the innermost activity, so that its sum is all the time since the beginning.

    Args:
        observer: function that is called where an activity begins, with its name and None, and where it ends without
            an exception, with its name and the seconds since then.
        before: seconds since this process began, which count as `STARTING`; 0 leaves them out.

    Attributes:
        observer: that function, which may be replaced.
        seconds: {activity: seconds that it took in total}.
        began: {activity: seconds from the beginning, `before` included, to when it first began}.
        turns: how often an activity began, ended or went on so far; what hangs adds none.
    """

    def __init__(self, observer: Observer = nobody, *, before: float = 0.0):
        self.observer = observer
        self.seconds: dict[str, float] = {}
        self.began: dict[str, float] = {}
        self.turns = 0
        self._own = {STARTING: before} if before else {}
        self._open = [OTHER]
        self._turned = time.perf_counter()  # when the innermost activity began, or went on
        self._zero = self._turned - before
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        start = self._turn(lambda: self._open.append(activity))
        self.began.setdefault(activity, start - self._zero)
        self.observer(activity, None)
        try:
            yield
        finally:
            seconds = self._turn(self._open.pop) - start
            self.add(activity, seconds)
        self.observer(activity, seconds)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning, `before` included. The clock is one that nobody sets, unlike the time of day."""
        return time.perf_counter() - self._zero

    def goes_on(self) -> None:
        """Notes that the innermost activity makes progress, as where a part of its work is done. Any thread may."""
        self._turn(lambda: None)

    def add(self, activity: str, seconds: float) -> None:
        """Adds to `seconds`; `own` does not know of it."""
        self.seconds[activity] = self[activity] + seconds

    def part(self, activity: str, seconds: float, of: str) -> None:
        """Counts seconds that another activity took as this one's."""
        self.add(activity, seconds)
        with self._lock:
            self._own[activity] = self._own.get(activity, 0.0) + seconds
            self._own[of] = self._own.get(of, 0.0) - seconds

    def own(self) -> tuple[dict[str, float], str, float]:
        """Returns {activity: seconds in which it was the innermost one}, up to now, the innermost activity, and the
        seconds since it began or went on. Any thread may ask."""
        with self._lock:
            activity, since = self._open[-1], time.perf_counter() - self._turned
            return self._own | {activity: self._own.get(activity, 0.0) + since}, activity, since

    def __getitem__(self, activity: str) -> float:
        return self.seconds.get(activity, 0.0)

    def waiting(self, activity: str, items: Iterable) -> Iterator:
        """Yields the items; the time until each of them arrives counts as `activity`."""
        iterator = iter(items)
        while True:
            with self(activity):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def _turn(self, change: Callable[[], object]) -> float:
        """Counts the time so far for the innermost activity, changes which that is, and returns the time."""
        with self._lock:
            now, activity = time.perf_counter(), self._open[-1]
            self._own[activity] = self._own.get(activity, 0.0) + now - self._turned
            self._turned = now
            self.turns += 1
            change()
            return now


def rates(timeline: Timeline, trained: int) -> dict[str, float | None]:
    """Returns FlagPerf's rates in images/s, from the activities `whole`, `evaluation` and `input`.

    p_whole counts the time of training with its evaluations; p_train leaves out evaluations; p_core also leaves out
    waiting for input. All are None if nothing was trained.
    """
    training = timeline["whole"] - timeline["evaluation"]
    return {
        "p_whole": trained / timeline["whole"] if trained else None,
        "p_train": trained / training if trained else None,
        "p_core": trained / (training - timeline["input"]) if trained else None,
    }
