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
    rank0_acc1: float | None = None  # acc1 of a `flagperf.Rank0Share`, where the evaluation step sums it
    rank0_examples: int | None = None


def evaluate(
    eval_step: Callable[[Any, Any], dict],
    params: Any,
    batches: Iterable[Any],
    expected: int,
    check: Callable[[dict], None] = lambda sums: None,
) -> Accuracy:
    """Runs `eval_step` over the batches of one split.

    Args:
        eval_step: function (params, batch) -> sums of loss, correct1, correct5 and seen; it may add rank0_correct and
            rank0_seen.
        batches: device batches with a mask.
        expected: number of examples in the split.
        check: function that gets each batch's sums, and may raise.

    Raises:
        RuntimeError: the batches do not contain each example of the split exactly once.
    """
    totals: dict[str, Any] = dict.fromkeys(("loss", "correct1", "correct5", "seen", "rank0_correct", "rank0_seen"), 0)
    for sums in one_behind(eval_step(params, batch) for batch in batches):
        check(sums)
        totals = {name: total + (sums[name].item() if name in sums else 0) for name, total in totals.items()}
    seen = totals["seen"]
    if seen != expected:
        raise RuntimeError(f"evaluated {seen} examples of a split of {expected}")
    accuracy = Accuracy(totals["correct1"] / seen, totals["correct5"] / seen, totals["loss"] / seen, seen)
    if share := totals["rank0_seen"]:
        accuracy = dataclasses.replace(accuracy, rank0_acc1=totals["rank0_correct"] / share, rank0_examples=share)
    return accuracy


def one_behind(results: Iterable[dict]) -> Iterator[dict]:
    """Yields each result once the next is dispatched: the devices never idle, and never hold more than two batches."""
    waiting = None
    for result in results:
        if waiting is not None:
            yield waiting
        waiting = result
    if waiting is not None:
        yield waiting
