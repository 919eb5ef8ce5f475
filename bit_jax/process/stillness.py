"""How long something has stood still, by looks of a thread that may have stood still itself."""

import time
from collections.abc import Callable

BEAT = 1.0  # seconds between two looks


class Stillness:
    """Seconds in which something has not changed, as far as somebody looked.

    Between two looks at most two beats count. So the time in which the process that looks was stopped, or its machine
    asleep, is nobody's fault, and what thaws with it has time to go on.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._looked = clock, clock()
        self._seen: object = None
        self._seconds = 0.0

    def __call__(self, seen: object) -> float:
        """Returns the seconds for which what is looked at has been equal to `seen`."""
        now = self._clock()
        self._seconds = self._seconds + min(now - self._looked, 2 * BEAT) if seen == self._seen else 0.0
        self._seen, self._looked = seen, now
        return self._seconds
