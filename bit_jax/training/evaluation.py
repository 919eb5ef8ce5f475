"""Evaluates a whole split, each example exactly once: it sums on the devices and divides once at the end."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Accuracy:
    acc1: float
    acc5: float
    loss: float  # mean cross-entropy, nats
    examples: int


def evaluate(
    eval_step: Callable[[Any, Any], dict],
    params: Any,
    batches: Iterable[Any],
    expected: int,
    check: Callable[[dict], None] = lambda sums: None,
) -> Accuracy:
    """Runs `eval_step` over the batches of one split.

    Args:
        eval_step: function (params, batch) -> sums of loss, correct1, correct5 and seen.
        batches: device batches with a mask.
        expected: number of examples in the split.
        check: function that gets each batch's sums, and may raise.

    Raises:
        RuntimeError: the batches do not contain each example of the split exactly once.
    """
    totals = dict.fromkeys(("loss", "correct1", "correct5", "seen"), 0)
    for sums in one_behind(eval_step(params, batch) for batch in batches):
        check(sums)
        totals = {name: total + sums[name].item() for name, total in totals.items()}
    seen = totals["seen"]
    if seen != expected:
        raise RuntimeError(f"evaluated {seen} examples of a split of {expected}")
    return Accuracy(totals["correct1"] / seen, totals["correct5"] / seen, totals["loss"] / seen, seen)


def one_behind(results: Iterable[dict]) -> Iterator[dict]:
    """Yields each result once the next is dispatched: the devices never idle, and never hold more than two batches."""
    waiting = None
    for result in results:
        if waiting is not None:
            yield waiting
        waiting = result
    if waiting is not None:
        yield waiting
