"""The curves of runs: a plot of each scalar in metrics.jsonl."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bit_jax.pages.plot import literal, plot
from bit_jax.report.record import Record
from bit_jax.watching import numbers
from input_pipeline.files import is_number
from input_pipeline.terminal import printable

TEXTS = {
    "loss": "Loss of each logged step's batch.",
    "images_per_s": "Images a second since the start that logged them began to train, over steps and input.",
    "input_wait": "Share of the training time in which the devices waited for input, since that start.",
    "val_acc1": "Top-1 accuracy on the evaluation split.",
    "val_acc5": "Top-5 accuracy on the evaluation split.",
    "val_loss": "Loss on the evaluation split.",
    "loss_scale": "Factor of the loss in fp16.",
    numbers.GRADIENT: "Euclidean norm of the gradient, before clipping.",
    numbers.UPDATE: "Norm of what a step adds to the parameters, divided by the norm of these.",
    numbers.LARGEST: "Largest absolute value of the outputs of units and ReLUs.",
    numbers.DEAD: "Share of the ReLUs' channels that are 0 in every place of every image of the batch.",
}
MARKED = 100  # a curve of fewer points shows each of them
STRETCHES = 1000  # of a longer curve that many stretches are shown, by the smallest and the largest value of each
STYLES = ("-", "--", ":", "-.")  # of every ten runs, which have the ten colours of matplotlib
Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def plots(records: Sequence[Record]) -> list[dict[str, str]]:
    """Returns a plot, see `plot`, of each scalar that any run has logged, with a curve for each run that has. Of what
    `--watch-every` measures, only the numbers of the whole model are shown: there may be a hundred others."""
    curves = [curves_of(record.metrics) for record in records]
    logged = dict.fromkeys(name for of_run in curves for name in of_run)
    runs = [printable(record.workdir) for record in records]
    return [
        plot(printable(name), _text(name, records), _draw, name, runs, [of_run.get(name) for of_run in curves])
        for name in (*(name for name in TEXTS if name in logged), *(name for name in logged if name not in TEXTS))
    ]


def _text(name: str, records: Sequence[Record]) -> str:
    parts = any(part.startswith(f"{name}/") for record in records for part in record.watched)
    more = " TensorBoard shows it for each part of the model, too." if name in numbers.WHOLE and parts else ""
    return TEXTS.get(name, "") + more


@functools.cache
def _is_of_a_part(name: str) -> bool:
    """Whether this is a number of `--watch-every` for a part of the model."""
    return any(name.startswith(f"{whole}/") for whole in numbers.WHOLE)


def curves_of(entries: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """Returns the curve of each scalar in the entries of metrics.jsonl but those of parts of the model; long ones as
    `shortened` has them."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for entry in entries:
        for name, value in entry.items():
            if name != "step" and is_number(value) and not _is_of_a_part(name):
                steps, values = points.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    return {
        name: shortened(np.array(steps, float), np.array(values, float)) for name, (steps, values) in points.items()
    }


def shortened(steps: np.ndarray, values: np.ndarray) -> Curve:
    """Returns a curve that looks the same: of each of `STRETCHES` stretches the smallest and the largest value, in
    their order, so that a single high loss among millions is seen. A curve with no more points than that stays."""
    if len(steps) <= 2 * STRETCHES:
        return steps, values
    bounds = np.linspace(0, len(steps), STRETCHES + 1).astype(int)
    extremes = [
        begin + place
        for begin, end in itertools.pairwise(bounds)
        for place in sorted({int(values[begin:end].argmin()), int(values[begin:end].argmax())})
    ]
    return steps[extremes], values[extremes]


def _draw(figure: Figure, name: str, runs: Sequence[str], curves: Sequence[Curve | None]) -> None:
    axes, lines = figure.subplots(), {}
    for number, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        if curve is not None:
            marker, style = "." if len(curve[0]) < MARKED else None, STYLES[number // 10 % len(STYLES)]
            (lines[literal(run)],) = axes.plot(*curve, color=f"C{number % 10}", linestyle=style, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel(literal(printable(name)))
    axes.legend(lines.values(), lines.keys())  # given so, a name may begin with an underscore
