"""The clock of throughput comparisons: it times finished work only, and reports the first call separately."""

import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from bit_jax.accounts.timeline import Timeline, rates
from parity.sides.flops import Convolution

WARM_UP = 2  # calls after the first, in which allocators and caches settle
STARTS = 1 + WARM_UP  # calls before the timed ones
LEAST = 3  # minimum number of timed calls, however long they take
# Sides of the matrices that measure a device's peak rate of products. The last is taken, unless a product of smaller
# ones takes long: where the processor lacks float16, PyTorch needs 15 s for a product of the last.
CEILING = {"cpu": (256, 512, 1024, 2048), "gpu": (2048, 4096, 8192)}
CEILING_SECONDS = 1.0  # the most seconds that these matrices are multiplied
CEILING_CALLS = 20  # products of the smaller matrices that must fit into these seconds before larger ones are tried
MOMENTUM, MIXUP = 0.9, 0.1
EVALUATED = 8  # batches in an evaluation
Pass = Literal["forward", "by input", "by kernel"]
SCHEDULE: dict[str, Any] = {"base_lr": 0.003, "warmup_steps": 1, "decay_steps": (), "steps": 10**6}


def timed(
    call: Callable[[int], None], seconds: float, agreed: Callable[[bool], bool] = lambda own: own
) -> dict[str, Any]:
    """Makes and times calls for so many seconds.

    Args:
        call: function (number of the call) -> None that returns when its work is done, on the device too.
        seconds: seconds to time calls for.
        agreed: function (whether this process would call once more) -> whether to call, if several call together.

    Returns:
        {"calls": seconds of each call, "first": seconds that the first call took longer than the median: compilation}.
    """
    first, *_ = [_seconds(call, number) for number in range(STARTS)]
    calls = repeated(call, seconds, agreed)
    return {"calls": calls, "first": max(first - statistics.median(calls), 0.0)}


def repeated(
    call: Callable[[int], None], seconds: float, agreed: Callable[[bool], bool] = lambda own: own
) -> list[float]:
    """Returns the seconds of each call, without `timed`'s first calls."""
    calls: list[float] = []
    end = time.perf_counter() + seconds
    while agreed(len(calls) < LEAST or time.perf_counter() < end):
        calls.append(_seconds(call, STARTS + len(calls)))
    return calls


def again(call: Callable[[int], None], seconds: float, agreed: Callable[[bool], bool] = lambda own: own) -> list[float]:
    """Makes one call that is not timed, because another process has used the device, and then does `repeated`."""
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
    """Times training steps, each of which waits for its batch, and then an evaluation, without compilation.

    Args:
        batches: the input; at least `STARTS` more batches than steps.
        step: function of a batch that returns when the device is done.
        evaluate: function of a number of examples that returns the number it has seen, when the device is done.
        rows: examples per batch.
        steps: number of timed steps.

    Returns:
        {"calls": seconds of each step without its wait, "first": see `timed`, "input_share": share of the training time
        that steps wait for input, "evaluation": images/s, and the entries of `timeline.rates`}.
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


def _seconds(call: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def ceiling(
    product: Callable[[np.ndarray, np.ndarray], Callable[[], object]],
    platform: str,
    seconds: float,
    agreed: Callable[[bool], bool] = lambda own: own,
) -> float:
    """Returns the floating-point operations per second of products of large square matrices.

    Args:
        product: function of two float32 matrices that places them, and returns a function that multiplies them and
            returns when the device is done.
        platform: name of the kind of device, such as `cpu`.
        seconds: seconds to multiply for.
        agreed: as in `timed`.
    """
    rng = np.random.default_rng(0)
    for side in CEILING["cpu" if platform == "cpu" else "gpu"]:
        # a GPU would multiply constant matrices faster
        multiply = product(*rng.standard_normal((2, side, side), np.float32))
        multiply()  # compiles
        if not agreed(_seconds(multiply) < seconds / CEILING_CALLS):
            break

    def call(number: int) -> None:
        multiply()

    calls = timed(call, seconds, agreed)["calls"]
    return 2 * side**3 / statistics.median(calls)


def convolution_arrays(layer: Convolution, rows: int, sets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns normally distributed float32 arrays: inputs [sets, rows, height, width, cin], a kernel [size, size, cin,
    cout], and gradients of outputs [sets, rows, height out, width out, cout]."""
    rng = np.random.default_rng(0)
    shapes = (
        (sets, rows, *layer.input_size, layer.cin),
        (layer.size, layer.size, layer.cin, layer.cout),
        (sets, rows, *layer.output_size, layer.cout),
    )
    inputs, kernel, gradients = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return inputs, kernel, gradients


def process_memory() -> int:
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
