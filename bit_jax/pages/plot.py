"""Plots of a page: inline SVG, whose text stays text."""

import html
import io
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
    "svg.hashsalt": "bit_jax",  # the same data give the same page
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def plot(title: str, text: str, draw: Callable[..., None], *data: Any) -> dict[str, str]:
    """Returns {title, text, svg}, where `draw` draws the data on a figure. To a screen reader it is an image of that
    title and text."""
    svg = io.StringIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # the font by which matplotlib places a text may lack its characters; the browser's shows them
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        draw(figure, *data)
        figure.savefig(svg, format="svg", metadata={"Date": None})
    label = html.escape(f"{title}. {text}".strip())
    drawn = svg.getvalue()[svg.getvalue().index("<svg") :]
    return {"title": title, "text": text, "svg": drawn.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)}


def literal(text: str) -> str:
    """Returns a text that matplotlib shows as it is: dollar signs begin no formula."""
    return text.replace("$", r"\$")
