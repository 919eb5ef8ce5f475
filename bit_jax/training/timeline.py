"""Seconds by activity, and FlagPerf's rates from them. This module imports no framework."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

Observer = Callable[[str, float | None], None]  # it is told an activity's name, and its seconds where it ends


def nobody(activity: str, seconds: float | None) -> None:
    """The observer that does nothing."""


class Timeline:
    """Seconds by activity. To time work of a device, wait for it before the end of the `with` block.

    Args:
        observer: function that is called where an activity begins, with its name and None, and where it ends without
            an exception, with its name and the seconds since then.

    Attributes:
        seconds: {activity: seconds that it took in total}.
        began: {activity: time when it first began, in seconds since 1970}.
    """

    def __init__(self, observer: Observer = nobody):
        self._observer = observer
        self.seconds: dict[str, float] = {}
        self.began: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        start = time.perf_counter()
        self.began.setdefault(activity, time.time())
        self._observer(activity, None)
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.add(activity, seconds)
        self._observer(activity, seconds)

    def add(self, activity: str, seconds: float) -> None:
        self.seconds[activity] = self[activity] + seconds

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
