"""The clock that every arm of a throughput comparison is timed with: finished work only, the first call apart."""

import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from bit_jax.training.timeline import Timeline, rates
from parity.sides.flops import Convolution

WARM_UP = 2  # calls after the first, in which allocators and caches settle
STARTS = 1 + WARM_UP
LEAST = 3  # timed calls, however long they take
CEILING = {"cpu": 2048, "gpu": 8192}  # side of the matrices that show what products a device reaches
CEILING_SECONDS = 1.0  # that they are multiplied
MOMENTUM, MIXUP = 0.9, 0.1
EVALUATED = 8  # batches
Pass = Literal["forward", "by input", "by kernel"]
SCHEDULE: dict[str, Any] = {"base_lr": 0.003, "warmup_steps": 1, "decay_steps": (), "steps": 10**6}


def timed(
    call: Callable[[int], None], seconds: float, agreed: Callable[[bool], bool] = lambda own: own
) -> dict[str, Any]:
    """Calls again and again for so many seconds.

    Args:
        call: (number of the call) -> None; returns when its work is done, on the device too.
        agreed: (whether this process would call once more) -> whether all do, where several call together.

    Returns:
        {"calls": seconds of each, "first": what the first call took longer than the median: compilation}.
    """
    first, *_ = [_seconds(call, number) for number in range(STARTS)]
    calls = repeated(call, seconds, agreed)
    return {"calls": calls, "first": max(first - statistics.median(calls), 0.0)}


def repeated(
    call: Callable[[int], None], seconds: float, agreed: Callable[[bool], bool] = lambda own: own
) -> list[float]:
    """Seconds of each call, after the first ones; see `timed`."""
    calls: list[float] = []
    end = time.perf_counter() + seconds
    while agreed(len(calls) < LEAST or time.perf_counter() < end):
        calls.append(_seconds(call, STARTS + len(calls)))
    return calls


def again(call: Callable[[int], None], seconds: float, agreed: Callable[[bool], bool] = lambda own: own) -> list[float]:
    """As `repeated`, after another process has had the device: a first call is not timed."""
    call(STARTS)
    return repeated(call, seconds, agreed)


def whole_loop(
    timeline: Timeline,
    batches: Iterator[Any],
    step: Callable[[Any], None],
    evaluate: Callable[[int], int],
    *,
    rows: int,
    steps: int,
) -> dict[str, Any]:
    """So many steps of training, each waiting for its batch, and an evaluation after them; compilation apart.

    Args:
        batches: the input; at least `STARTS` more than the steps.
        step, evaluate: return when the device is done. The one takes a batch, the other a number of examples, and
            returns how many it has seen.

    Returns:
        {"calls": seconds of each step without its wait, "first": as of `timed`, "input_share": of the training time,
        "evaluation": images/s, and `timeline.rates`}.
    """
    examples = EVALUATED * rows
    evaluate(rows)  # compiles
    first, *_ = [_seconds(lambda: step(next(batches))) for _ in range(STARTS)]
    calls = []
    with timeline("whole"):
        for batch in timeline.waiting("input", itertools.islice(batches, steps)):
            calls.append(_seconds(lambda batch=batch: step(batch)))
        with timeline("evaluation"):
            seen = evaluate(examples)
    assert (len(calls), seen) == (steps, examples)
    return {
        "calls": calls,
        "first": max(first - statistics.median(calls), 0.0),
        "input_share": timeline["input"] / (timeline["whole"] - timeline["evaluation"]),
        "evaluation": seen / timeline["evaluation"],
    } | rates(timeline, rows * steps)


def _seconds(call: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def matrices(platform: str) -> np.ndarray:
    """Two square matrices of normally distributed values, float32; not of one value, which a GPU multiplies faster."""
    side = CEILING["cpu" if platform == "cpu" else "gpu"]
    return np.random.default_rng(0).standard_normal((2, side, side), np.float32)


def convolution_arrays(one: Convolution, rows: int, sets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normally distributed float32: inputs [sets, rows, height, width, cin], a kernel [size, size, cin, cout], and
    gradients of outputs [sets, rows, height out, width out, cout]."""
    rng = np.random.default_rng(0)
    shapes = (
        (sets, rows, *one.given, one.cin),
        (one.size, one.size, one.cin, one.cout),
        (sets, rows, *one.out, one.cout),
    )
    inputs, kernel, gradients = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return inputs, kernel, gradients


def rate(times: dict[str, Any], side: int) -> float:
    """Floating-point operations a second of the products of matrices of that side that were timed."""
    return 2 * side**3 / statistics.median(times["calls"])


def process_memory() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
