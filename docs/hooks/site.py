"""What the documentation site shows otherwise than the repository; MkDocs calls this for every page that it builds."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("input_pipeline", "bit_jax", "parity")
DOCSTRING = """
::: {name}
    options:
      heading_level: {level}
      members: false
      show_root_full_path: true
"""
OUTSIDE = re.compile(r"\[`?([^]`]+)`?\]\(\.\./[^)]+\)")  # a link to a file that is not in docs/


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Shows the names of files that are not on the site instead of links to them, and lists the rooms in rooms.md."""
    markdown = OUTSIDE.sub(r"`\1`", markdown)
    return markdown + rooms() if page.file.src_uri == "rooms.md" else markdown


def rooms() -> str:
    """Directives for the docstrings of each package and of each of its folders that is a package."""
    text = ""
    for package in PACKAGES:
        text += DOCSTRING.format(name=package, level=2)
        for path in sorted((ROOT / package).glob("*/__init__.py")):
            text += DOCSTRING.format(name=f"{package}.{path.parent.name}", level=3)
    return text
