"""Writes a report as one self-contained HTML page, which fetches nothing: plots are inline SVG, images data URLs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from bit_jax.model.class_names import in_words
from bit_jax.pages import page as pages
from bit_jax.pages.plot import plot
from input_pipeline.errors import RequestError
from input_pipeline.examples import DatasetError, Source
from input_pipeline.sources import open_source
from parity.ladder.ladder import ROLES
from parity.ladder.verdict import LIMIT, MULTIPLE
from parity.report import operations, terminal
from parity.report.saved import Report
from parity.sides.images import decode
from parity.sides.tasks import UNKNOWN

THUMBNAIL = 96  # side of a flipped image on the page, in pixels
SHOWN_FLIPS = 60  # the most flipped images that the page shows
COLOURS = {"reference": "#c2185b", "candidate": "#1565c0", "disturbed": "#757575"}


def write(report: Report, path: Path, logits: dict[str, np.ndarray] | None = None) -> None:
    """Writes the page, atomically.

    Args:
        logits: the accuracy rung's arrays, see `saved.load_logits`; without them no flipped images are shown.
    """
    render(
        "page.html.j2",
        path,
        report=report,
        conclusion=terminal.conclusion(report),
        plots=plots(report),
        operations=operations.tables(report),
        columns=operations.COLUMNS,
        flips=flipped_images(report, logits),
        accuracy=_accuracy(report),
        attested=_attested(report),
    )


def render(template: str, path: Path, **values: Any) -> None:
    """Fills in one of this package's templates and writes the page, atomically."""
    filters: dict[str, Callable] = {
        "error": operations.error,
        "number": lambda value: "" if value is None else terminal.number(value),
    }
    pages.render("parity.report", template, path, filters=filters, **values)


def plots(report: Report) -> list[dict[str, str]]:
    """Returns the plots, see `plot`, of the rungs that ran."""
    rungs = {rung["name"]: rung for rung in report["rungs"]}
    drawn = []
    if "forward" in rungs:
        text = "Each point is one unit's output, free-running from the same image, relative to its RMS."
        drawn.append(plot("Error by depth", text, _by_depth, rungs["forward"], report["precision"]))
    if "gradients" in rungs and report["precision"] != "fp64" and rungs["gradients"]["verdict"] != "bug":
        text = (
            "Each point is one parameter's gradient: its relative RMSE against float64 in either framework. Inside "
            f"the band neither errs more than {MULTIPLE:g} times as much as the other."
        )
        drawn.append(plot("Gradients", text, _gradients, rungs["gradients"], report["precision"]))
    if rungs.get("curve", {}).get("details", {}).get("losses"):
        text = "Losses on identical batches; below, how far each is from the reference in float64."
        drawn.append(plot("Training curve", text, _curve, rungs["curve"], report["precision"]))
    return drawn


def flipped_images(report: Report, logits: dict[str, np.ndarray] | None) -> list[dict[str, Any]]:
    """Returns the flips, those that rounding does not explain first, with the image's id and the label.

    If the dataset can still be read, each flip also has the image, as a data URL.
    """
    rung = next((rung for rung in report["rungs"] if rung["name"] == "accuracy"), None)
    if rung is None or not rung["details"].get("flips") or logits is None:
        return []
    options = report["options"]
    source: Source | None
    try:
        source = open_source(options["dataset"], options["eval_split"], options["data_dir"])
    except (DatasetError, RequestError, OSError):
        source = None
    names = in_words(rung["details"]["class_names"])

    def named(label: int) -> str:
        return names[label] if label < len(names) else f"class {label}"

    flips = sorted(rung["details"]["flips"], key=lambda flip: flip["expected"])[:SHOWN_FLIPS]
    return [
        flip
        | {"id": str(logits["ids"][flip["row"]]), "label": named(int(logits["labels"][flip["row"]]))}
        | {who: named(flip[who]) for who in ("reference_class", "candidate_class")}
        | ({"url": _thumbnail(source, flip["row"])} if source is not None else {})
        for flip in flips
    ]


def _by_depth(figure: Figure, rung: dict, precision: str) -> None:
    axes = figure.subplots()
    float64 = [line for line in rung["lines"] if line["precision"] == "fp64" and _positive(line["difference"])]
    sites = list(dict.fromkeys(line["name"] for line in rung["lines"]))
    place = {site: index for index, site in enumerate(sites)}
    _line(axes, place, float64, "difference", "black", "float64: reference and candidate apart")
    axes.axhline(LIMIT, color="black", linestyle=":", linewidth=1, label=f"float64 limit {LIMIT:.0e}")
    judged = [line for line in rung["lines"] if line["precision"] == precision and line["reference_error"] is not None]
    for who, colour in COLOURS.items():
        _line(axes, place, judged, f"{who}_error", colour, f"{precision}: {who}")
    forced = rung["details"].get("divergence", {}).get("teacher_forced_errors", {})
    kept = {site: float(error) for site, error in forced.items() if _positive(error)}
    if kept:
        points = [place[site] for site in kept], list(kept.values())
        axes.plot(*points, "x", color="#ef6c00", label="candidate, fed the reference's input")
    axes.set(yscale="log", ylabel="relative error")
    axes.set_xticks(range(len(sites)), sites, rotation=90, fontsize=7 if len(sites) < 30 else 4)
    _legend(axes)


def _gradients(figure: Figure, rung: dict, precision: str) -> None:
    axes = figure.subplots()
    judged = [line for line in rung["lines"] if line["precision"] == precision and line["reference_error"]]
    kinds = {"kernel": ("o", "#1565c0"), "gamma": ("^", "#2e7d32"), "beta": ("v", "#ef6c00"), "bias": ("s", "#6a1b9a")}
    for kind, (marker, colour) in kinds.items():
        of_kind = [line for line in judged if line["name"].endswith(kind)]
        errors = [[float(line[f"{who}_error"]) for line in of_kind] for who in ("reference", "candidate")]
        axes.scatter(*errors, marker=marker, s=18, color=colour, alpha=0.7, label=f"{kind} ({len(of_kind)})")
    axes.set(xscale="log", yscale="log", xlabel="error of the reference", ylabel="error of the candidate")
    ends = np.array([min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])])
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.plot(ends, ends, color="grey", linewidth=1)
    axes.fill_between(
        ends, ends / MULTIPLE, ends * MULTIPLE, color="grey", alpha=0.12, label=f"within {MULTIPLE:g} times"
    )
    _legend(axes)


def _curve(figure: Figure, rung: dict, precision: str) -> None:
    above, below = figure.subplots(2, 1, sharex=True)
    losses = rung["details"]["losses"]
    exact = np.array(losses["fp64"][0])
    steps = np.arange(len(exact))
    for name, pair in losses.items():
        for who, values in zip(("reference", "candidate"), pair, strict=True):
            style = "-" if name == "fp64" else "--"
            above.plot(steps, values, style, color=COLOURS[who], linewidth=3 if who == "reference" else 1.2)
            apart = np.abs(np.subtract(values, exact)) / np.abs(exact)
            if name != "fp64" or who != "reference":
                shown = np.where(apart > 0, apart, np.nan)
                below.plot(steps, shown, f"{style}o", markersize=3, color=COLOURS[who], label=f"{who}, {name}")
    above.set(ylabel="loss")
    below.set(xlabel="step", ylabel="relative difference", yscale="log")
    _legend(below)


def _legend(axes: Axes) -> None:
    """Puts the legend beside the plot, where it hides nothing."""
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _line(axes: Axes, place: dict[str, int], lines: list[dict], field: str, colour: str, label: str) -> None:
    """Draws one field of the report's lines over their places; a logarithmic axis has no zero and no infinity."""
    lines = [line for line in lines if _positive(line[field])]
    values = [float(line[field]) for line in lines]
    if not lines:
        return
    axes.plot([place[line["name"]] for line in lines], values, "o-", markersize=3, color=colour, label=label)


def _positive(value: Any) -> bool:
    return value is not None and 0 < float(value) < float("inf")


def _thumbnail(source: Source, index: int) -> str:
    """Returns an example's image as the data URL of a small PNG."""
    image = decode(source[index]["image"]).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    return pages.data_url(image)


def _accuracy(report: Report) -> dict[str, Any] | None:
    """Returns the accuracy rung's statistics, also in sentences; None if the rung has none."""
    rung = next((rung for rung in report["rungs"] if rung["name"] == "accuracy"), None)
    if rung is None or "acc1" not in rung["details"]:
        return None
    return rung["details"] | {"sentences": terminal.accuracy_sentences(rung["details"])}


def _attested(report: Report) -> list[dict[str, Any]]:
    """Returns the attestation as [{precision, rows: [(entry, reference, candidate, whether they differ)]}]."""
    tables = []
    for precision, pair in report["attestation"]["sides"].items():
        reference, candidate = (pair.get(role, {}) for role in ROLES)  # an exported file has no float64
        entries = dict.fromkeys([*reference, *candidate])
        rows = [
            (
                entry,
                plain(reference.get(entry)),
                plain(candidate.get(entry)),
                reference.get(entry) != candidate.get(entry)
                and UNKNOWN not in (reference.get(entry, UNKNOWN), candidate.get(entry, UNKNOWN)),
            )
            for entry in entries
        ]
        tables.append({"precision": precision, "rows": rows})
    return tables


def plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "" if value is None else str(value)
