"""An evaluation: what was computed with, what came of it, and how a terminal and a JSON file show it."""

import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from bit_jax.model.precision import products
from bit_jax.predictions import rows, views
from bit_jax.predictions.classes import FEW_OCCUR, Matched
from bit_jax.predictions.summary import WORST, Summary, names_of
from bit_jax.training import figures
from input_pipeline.files import replacing
from input_pipeline.terminal import printable

SAVED_PAIRS = 100  # confused pairs in the JSON file


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A split and a model's predictions for it.

    Attributes:
        weights: the weights as they were named.
        work: the model, the examples and the devices.
        matched: the classes that competed.
        computed: what was computed of every example.
        notes: how the classes were matched, and sentences that a reader of the figures should know.
    """

    weights: str
    work: rows.Work
    matched: Matched
    computed: rows.Computed
    notes: tuple[str, ...]

    @classmethod
    def of(cls, weights: str, work: rows.Work, matched: Matched, computed: rows.Computed) -> "Evaluation":
        evaluation = cls(weights, work, matched, computed, ())
        return dataclasses.replace(evaluation, notes=(*matched.notes, *evaluation._remarks()))

    @property
    def summary(self) -> Summary:
        return Summary(self.computed.rows, self.matched.names)

    @property
    def images_per_second(self) -> float:
        """Reading, decoding and resizing included, compilation not."""
        return self.summary.examples / self.computed.seconds

    def _remarks(self) -> list[str]:
        summary, remarks = self.summary, []
        occurring, competing = len(summary.classes()), len(self.matched.competing)
        if occurring < FEW_OCCUR * competing:
            remarks.append(
                f"only {occurring:,} of {competing:,} competing classes occur; --classes occurring lets only these "
                "compete, as the papers of ImageNet-A and -R do"
            )
        if summary.not_finite:
            remarks.append(
                f"{summary.not_finite:,} images have logits that are not finite in {self.work.target.precision.name}, "
                "and count as wrong"
            )
        return remarks

    def as_json(self) -> dict[str, Any]:
        """Returns the content of the --json file."""
        summary, work = self.summary, self.work
        mesh = work.target.mesh
        return {
            "weights": self.weights,
            "architecture": str(work.architecture),
            "dataset": work.source.name,
            "examples": summary.examples,
            "acc1": summary.accuracy(1).as_json(),
            "acc5": summary.accuracy(5).as_json(),
            "loss": summary.loss if math.isfinite(summary.loss) else None,
            "not_finite": summary.not_finite,
            "size": work.views.crop,
            "view": views.in_words(work.views),
            "classes": {"head": work.architecture.num_classes, "competing": len(self.matched.competing)},
            "notes": list(self.notes),
            "precision": work.target.precision.name,
            "products": dict(zip(("matrix", "convolution"), products(work.target.precision), strict=True)),
            "device_kind": mesh.devices.flat[0].device_kind,
            "devices": mesh.size,
            "hosts": jax.process_count(),
            "global_batch": work.global_batch,
            "seconds": self.computed.seconds,
            "compile_seconds": self.computed.compile_seconds,
            "images_per_second": self.images_per_second,
            "per_class": [
                {
                    "label": each.label,
                    "head_label": self.matched.competing[each.label],
                    "name": each.name,
                    "examples": each.accuracy.examples,
                }
                | each.accuracy.as_json()
                for each in summary.classes()
            ],
            "confused": names_of(summary.confused(SAVED_PAIRS), summary.names),
            "versions": figures.versions(),
        }

    def write_predictions(self, path: Path) -> None:
        """Writes a CSV file, atomically, with a line for each example in the order of the split: its id, the names of
        label and prediction, their probabilities, and the number of classes ahead of the label.

        Raises:
            DatasetError: an example cannot be read again.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("id", "label", "predicted", "label_probability", "probability", "rank"))
        names, table = self.summary.names, self.computed.rows
        columns = (table[name].tolist() for name in ("label", "predicted", "label_probability", "probability", "rank"))
        for index, (label, predicted, *numbers) in enumerate(zip(*columns, strict=True)):
            writer.writerow((self.work.source[index]["id"], names[label], names[predicted], *numbers))
        with replacing(path) as file:
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))

    def show(self, console: Console) -> None:
        """Prints the figures, the worst classes and the most confused pairs."""
        summary, work = self.summary, self.work
        console.print(printable(f"{self.weights}, {work.architecture}, on {work.source.name}"))
        console.print(f"  acc1 {summary.accuracy(1)}, acc5 {summary.accuracy(5)}, 95 % intervals")
        console.print(f"  loss {summary.loss:.4f} nats over {summary.examples:,} images, each once")
        console.print(f"  {views.in_words(work.views)}")
        console.print(f"  {work.target.precision.name}, {self.speed()}")
        console.print(printable(f"  classes {self.notes[0]}"))
        for note in self.notes[1:]:
            console.print(printable(f"  {note}"))
        worst = [each for each in summary.classes() if each.accuracy.count < each.accuracy.examples][:WORST]
        if not worst:
            return
        table = Table("worst classes", "accuracy", "95 % interval", "images", "most often taken for")
        for each in worst:
            low, high = each.accuracy.interval
            taken = "" if each.taken_for is None else f"{each.taken_for[0]} ({each.taken_for[1]})"
            cells = f"{each.accuracy.value:.1%}", f"{low:.1%} to {high:.1%}", f"{each.accuracy.examples:,}"
            table.add_row(printable(each.name), *cells, printable(taken))
        console.print(table)
        table = Table("most confused: label", "predicted", "images", "of the label's")
        for pair in names_of(summary.confused(), summary.names):
            table.add_row(
                printable(pair["label"]), printable(pair["predicted"]), f"{pair['count']:,}", f"{pair['of']:,}"
            )
        console.print(table)

    def speed(self) -> str:
        """Returns a clause with the images/s."""
        mesh = self.work.target.mesh
        devices = (
            f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
            if mesh.size > 1
            else f"{mesh.devices.flat[0].device_kind}"
        )
        return (
            f"{self.images_per_second:,.1f} images/s with reading and resizing on {devices} "
            f"(compiled in {self.computed.compile_seconds:.1f} s before)"
        )
