"""Fills in a template and writes the page, which fetches nothing: its style is inside, and its images are data URLs."""

import base64
import io
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from input_pipeline.files import replacing

SHARED = "bit_jax.pages"  # the package of the templates that every page may include


def render(
    package: str, template: str, path: Path, *, filters: Mapping[str, Callable] | None = None, **values: Any
) -> None:
    """Fills in a template and writes the page, atomically.

    Args:
        package: name of the package that has the template.
        template: the template's file name.
        filters: {name: function} beside jinja2's own filters.
        values: values that the template uses.
    """

    def source(name: str) -> str | None:
        places = (resources.files(where).joinpath(name) for where in (package, SHARED))
        return next((place.read_text() for place in places if place.is_file()), None)

    loader = jinja2.FunctionLoader(source)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    environment.filters.update(filters or {})
    page = environment.get_template(template).render(**values)
    with replacing(path) as file:
        file.write(page.encode("utf-8", "backslashreplace"))  # a file's name may hold bytes that are no UTF-8


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    """Returns an image as a data URL.

    Args:
        kind: Pillow's name of the format: PNG, which keeps every pixel, or JPEG, which is smaller for photographs.
    """
    encoded = io.BytesIO()
    image.save(encoded, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"
