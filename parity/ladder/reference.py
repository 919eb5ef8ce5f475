"""What the reference says of a task: computed now by its process, or, with the same methods, read from a record."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bit_jax.training.steps import FIRST_SCALE
from parity.ladder.kept import Kept, Whole, relative_difference
from parity.ladder.verdict import MULTIPLE, ULP, Expected
from parity.sides.worker import Arrays

if TYPE_CHECKING:
    from parity.ladder.ladder import Ladder
    from parity.ladder.question import Question

LEAST_SCALE = 1.0  # smallest loss scale in float16: gradients that overflow without any scaling are wrong
DISTURBED_ULPS = 16.0  # disturbance, in float64's ulps, that shows how far a chaotic curve carries rounding

Readers = dict[str, list[Callable[[], np.ndarray]]]  # {name: functions that read the array, one for each batch}


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What evaluation says of a dataset.

    Attributes:
        logits: logits of every row, [rows, classes].
        labels, index: label of every row, and the number of its example in the dataset, [rows].
        correct: {"correct1": ..., "correct5": ...}: the counts that evaluation itself makes.
        partial: whether only each row's largest logits are known; the others are the least of these.
    """

    logits: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    correct: dict[str, int]
    partial: bool = False


class Reference(Protocol):
    """The reference's answers to questions. `look` numbers the sets of images, starting at 0."""

    def attested(self, precision: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns the entries of the attestation."""
        ...

    def oracle(self, question: "Question", look: int) -> Iterator[tuple[str, list[Kept]]]:
        """Yields (name, float64 result of each batch) of every array."""
        ...

    def expected(
        self, question: "Question", look: int, names: Sequence[str] | None, scaled: dict[str, float]
    ) -> Iterator[tuple[str, Expected]]:
        """Yields (name, what is expected of the array in the precision asked for).

        Args:
            names: names of the arrays; None: all.
            scaled: {"scale": loss scale}, or {} if the loss is not scaled.
        """
        ...

    def grown(self, question: "Question", look: int, names: Sequence[str] | None) -> dict[str, float]:
        """Returns {name: difference that float64's own rounding grows to}."""
        ...

    def scale(self, question: "Question", look: int) -> float:
        """Returns the largest loss scale at which no gradient overflows in float16."""
        ...

    def losses(self, question: "Question", precision: str, scaled: dict[str, float]) -> list[float] | None:
        """Returns the losses of the steps that the task trains, if it trains."""
        ...

    def products(self) -> tuple[str, str]:
        """Returns the formats in which a matrix product and a convolution multiply in the precision asked for."""
        ...

    def teacher(self, precision: str) -> Path | None:
        """Returns the file of every unit's float64 output, from which each unit is given its input; None if it is not
        to be had. In a precision other than float64, the candidate's float64 outputs agree with the reference's."""
        ...

    def fed(self) -> dict[str, np.ndarray]:
        """Returns {unit: [RMSE, `HIGH` quantile] of its error if it is given its input}, in the precision asked for."""
        ...

    def accuracy(self, arguments: dict[str, Any]) -> Evaluated:
        """Returns what evaluation says of a dataset, in the precision asked for."""
        ...


class Live:
    """The reference's process, which computes every answer when it is asked for.

    If the reference is an exported file, which has no float64, the oracle is the candidate's float64.
    """

    def __init__(self, ladder: "Ladder"):
        self._ladder = ladder

    def attested(self, precision: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._ladder.ask("reference", precision, "attest", **arguments).info

    def oracle(self, question: "Question", look: int) -> Iterator[tuple[str, list[Kept]]]:
        arrays = self._oracle(question, look).arrays
        for name, batches in question.group(arrays).items():
            yield name, [Whole(read()) for read in batches]

    def expected(
        self, question: "Question", look: int, names: Sequence[str] | None, scaled: dict[str, float]
    ) -> Iterator[tuple[str, Expected]]:
        ladder = self._ladder
        results = question.group(self._ask(question, look, ladder.options.precision, **scaled).arrays)
        disturbed = self._disturbed(question, look, MULTIPLE * ladder.amplitude) if question.disturb else []
        for name, exact in self.oracle(question, look):
            if name in results and (names is None or name in names):
                yield name, Expected.of(exact, _read(results[name]), [_read(readers[name]) for readers in disturbed])

    def grown(self, question: "Question", look: int, names: Sequence[str] | None) -> dict[str, float]:
        exact = question.group(self._oracle(question, look).arrays)
        disturbed = self._disturbed(question, look, DISTURBED_ULPS * ULP["fp64"])
        return {
            name: max(
                relative_difference(ours(), theirs())
                for readers in disturbed
                for ours, theirs in zip(batches, readers[name], strict=True)
            )
            for name, batches in exact.items()
            if names is None or name in names
        }

    def scale(self, question: "Question", look: int) -> float:
        return loss_scale(self._ladder, "reference", question, look)

    def losses(self, question: "Question", precision: str, scaled: dict[str, float]) -> list[float] | None:
        arrays = self._ask(question, 0, precision, **scaled).arrays
        return arrays["losses"].tolist() if "losses" in arrays else None

    def products(self) -> tuple[str, str]:
        return self._ladder.ask("reference", self._ladder.options.precision, "products").info

    def teacher(self, precision: str) -> Path | None:
        return self._ladder.ask("reference", "fp64", "forward", images=self._ladder.pictures()).arrays.path

    def fed(self) -> dict[str, np.ndarray]:
        path, ladder = self.teacher("fp64"), self._ladder
        arguments = {"images": ladder.pictures(), "teacher": path}
        answer = ladder.ask("reference", ladder.options.precision, "forward", **arguments).arrays
        exact = ladder.ask("reference", "fp64", "forward", images=ladder.pictures()).arrays
        return {site: Whole(exact[site]).errors(answer[site]) for site in exact.names if site in answer}

    def accuracy(self, arguments: dict[str, Any]) -> Evaluated:
        return evaluated(self._ladder, "reference", arguments)

    def _ask(self, question: "Question", look: int, precision: str, **more: Any) -> Any:
        return self._ladder.ask("reference", precision, question.task, **question.arguments(look), **more)

    def _oracle(self, question: "Question", look: int) -> Any:
        return self._ladder.ask(self._ladder.oracle, "fp64", question.task, **question.arguments(look))

    def _disturbed(self, question: "Question", look: int, amplitude: float) -> list[Readers]:
        answers = self._ladder.disturbed(question.task, amplitude, look, **question.arguments(look))
        return [question.group(arrays) for arrays in answers]


def evaluated(ladder: "Ladder", role: str, arguments: dict[str, Any]) -> Evaluated:
    """Asks one side for the accuracy task, in the precision asked for."""
    answer = ladder.ask(role, ladder.options.precision, "accuracy", **arguments)
    arrays, correct = answer.arrays, {name: answer.info[name] for name in ("correct1", "correct5")}
    return Evaluated(arrays["logits"], arrays["labels"], arrays["index"], correct)


def loss_scale(ladder: "Ladder", role: str, question: "Question", look: int) -> float:
    """Returns the largest loss scale at which no gradient of that side overflows in float16.

    The scales tried are train.py's first one and its halves. Training halves its scale in the same way; both sides are
    judged at the smaller of their two scales.
    """
    scale = FIRST_SCALE
    while scale > LEAST_SCALE:
        answer = ladder.ask(role, ladder.options.precision, question.task, **question.arguments(look), scale=scale)
        if not answer.info["overflows"]:
            break
        answer.discard()
        scale /= 2
    return scale


def one_batch(arrays: Arrays) -> Readers:
    """Returns the readers of an answer's arrays, each of which is of one batch."""
    return {name: [lambda name=name: arrays[name]] for name in arrays.names}


def by_batch(arrays: Arrays) -> Readers:
    """Returns the readers of an answer whose array names begin with the number of the batch, as in `0/KEY`."""
    batches = defaultdict(list)
    for name in arrays.names:
        batches[name.split("/", 1)[1]].append(lambda name=name: arrays[name])
    return dict(batches)


def _read(batches: Sequence[Callable[[], np.ndarray]]) -> list[np.ndarray]:
    return [read() for read in batches]
