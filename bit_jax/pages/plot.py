"""Plots of a page: inline SVG, whose text stays text."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "bit_jax",  # the same data give the same page
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def plot(title: str, text: str, draw: Callable[..., None], *data: Any) -> dict[str, str]:
    """Returns {title, text, svg}, where `draw` draws the data on a figure."""
    svg = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        draw(figure, *data)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return {"title": title, "text": text, "svg": svg.getvalue()[svg.getvalue().index("<svg") :]}
