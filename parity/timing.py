"""The clock that every arm of a throughput comparison is timed with: finished work only, the first call apart."""

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UP = 2  # calls after the first, in which allocators and caches settle
LEAST = 3  # timed calls, however long they take
CEILING, CEILING_SECONDS = 2048, 1.0  # side of the matrices, and how long they are multiplied
MOMENTUM = 0.9
SCHEDULE: dict[str, Any] = {"base_lr": 0.003, "warmup_steps": 1, "decay_steps": (), "steps": 10**6}


def timed(call: Callable[[int], None], seconds: float) -> dict[str, Any]:
    """Calls again and again for so many seconds.

    Args:
        call: (number of the call) -> None; returns when its work is done, on the device too.

    Returns:
        {"calls": seconds of each, "first": what the first call took longer than the median: compilation}.
    """

    def once(number: int) -> float:
        start = time.perf_counter()
        call(number)
        return time.perf_counter() - start

    first, *_ = [once(number) for number in range(1 + WARM_UP)]
    calls: list[float] = []
    end = time.perf_counter() + seconds
    while len(calls) < LEAST or time.perf_counter() < end:
        calls.append(once(1 + WARM_UP + len(calls)))
    return {"calls": calls, "first": max(first - statistics.median(calls), 0.0)}


def rate(times: dict[str, Any]) -> float:
    """Floating-point operations a second of the matrix products that were timed."""
    return 2 * CEILING**3 / statistics.median(times["calls"])


def process_memory() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
