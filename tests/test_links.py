"""Links between the Markdown files of the repository lead to files and headings that exist.

`make docs` checks the links within docs/ once more, with the same anchors; README and its kind are not on the site.
"""

import re

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bit_jax/assets/*/*.md")])
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)")


def prose(text: str) -> str:
    """The text without blocks of code, in which a # begins no heading."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for path, anchor in LINK.findall(prose(page.read_text())):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text()), f"{path}#{anchor}"


def test_a_link_to_nowhere_would_be_noticed():
    assert LINK.findall("[a](docs/a.md#b-c), [b](#d), [c](x/y), [d](https://example.org/#e)") == [
        ("docs/a.md", "b-c"),
        ("", "d"),
        ("x/y", ""),
    ]
    assert anchors("# What's `--new`, 2-fold?\n```\n# no heading\n```\n") == {"whats---new-2-fold"}
