"""Two pages: an evaluation with its mistakes, and single images with the likeliest classes of each."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from bit_jax.pages.page import data_url, render
from bit_jax.predictions import views
from bit_jax.predictions.evaluation import Evaluation
from bit_jax.predictions.summary import WORST, names_of
from input_pipeline.preprocess import decode
from input_pipeline.terminal import printable

SMALL = 96  # pixels: an image with no longer side is shown pixel by pixel
LONGEST = 384  # pixels that the longer side of a larger image is reduced to: twice as many as it takes on the page


class Likely(Protocol):
    """A likely class of an image."""

    @property
    def name(self) -> str: ...
    @property
    def probability(self) -> float: ...


def write_evaluation(path: Path, evaluation: Evaluation, mistakes: int) -> None:
    """Writes an evaluation's page, atomically.

    Args:
        mistakes: largest number of mistakes to show; their images are read again.

    Raises:
        DatasetError: an image cannot be read again.
    """
    summary, work = evaluation.summary, evaluation.work
    every = summary.classes()
    acc1 = summary.accuracy(1)
    render(
        "bit_jax.predictions",
        "evaluation.html.j2",
        path,
        weights=printable(evaluation.weights),
        dataset=printable(work.source.name),
        architecture=work.architecture,
        view=views.in_words(work.views),
        precision=work.target.precision.name,
        accuracies=[(1, acc1), (5, summary.accuracy(5))],
        loss=summary.loss,
        examples=summary.examples,
        wrong=acc1.examples - acc1.count,
        occurring=len(every),
        speed=evaluation.speed(),
        how=printable(evaluation.notes[0]),
        notes=[printable(note) for note in evaluation.notes[1:]],
        worst=[each for each in every if each.accuracy.count < each.accuracy.examples][:WORST],
        confused=names_of(summary.confused(), summary.names),
        mistakes=[_mistake(evaluation, index) for index in summary.mistakes(mistakes)],
        every=every,
    )


def _mistake(evaluation: Evaluation, index: int) -> dict[str, Any]:
    summary, example = evaluation.summary, evaluation.work.source[index]
    row = {name: array[index].item() for name, array in summary.rows.items()}
    return _shown(example["image"]) | {
        "id": printable(example["id"]),
        "label": printable(summary.names[row["label"]]),
        "label_probability": row["label_probability"],
        "predicted": printable(summary.names[row["predicted"]]),
        "probability": row["probability"],
    }


def write_images(
    path: Path,
    images: Iterable[tuple[str, bytes, Sequence[Likely]]],
    *,
    weights: str,
    architecture: object,
) -> None:
    """Writes the page of single images, atomically.

    Args:
        images: name, encoded image and likeliest classes of each image.
        weights: name of the weights.
        architecture: the model's architecture.
    """
    shown = [
        _shown(encoded)
        | {
            "name": printable(name),
            "predictions": [{"name": printable(each.name), "probability": each.probability} for each in predictions],
        }
        for name, encoded, predictions in images
    ]
    render(
        "bit_jax.predictions",
        "images.html.j2",
        path,
        weights=printable(weights),
        architecture=architecture,
        images=shown,
    )


def _shown(encoded: np.ndarray | bytes) -> dict[str, Any]:
    """Returns the data URL of an image in a size for the page, and whether it is `large`, that is no few pixels."""
    image = Image.fromarray(decode(encoded))
    large = max(image.size) > SMALL
    if large:
        image.thumbnail((LONGEST, LONGEST))
    return {"url": data_url(image, "JPEG" if large else "PNG"), "large": large}
