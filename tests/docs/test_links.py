"""Every link of a page leads to an existing file and heading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from notebooks.pairing import cells, pairs
from tests.docs.blocks import PAGES, ROOT, named

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|md|json|txt|ipynb|png|yml))`")
# Written by runs, or outside this repository, or a name pattern.
ELSEWHERE = ("runs/", "WORKDIR/", "merged/", "src/")


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as on GitHub."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def lost(text: str, place: Path) -> list[str]:
    """Broken links of a text in folder `place`."""
    found = []
    for target in _LINK.findall(text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, heading = target.partition("#")
        path = (place / name).resolve() if name else None
        if path is not None and not path.exists():
            found.append(target)
        elif heading and heading not in anchors(path or ROOT / "README.md"):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    text = page.read_text()
    own = re.sub(r"\]\((#[^)]+)\)", rf"]({page.name}\1)", text)
    assert not lost(own, page.parent)


def test_links_of_the_notebooks():
    for path in pairs():
        for _, source in cells(path.read_text()):
            assert not lost(source, path.parent), path.name


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_are_named_are_there(page):
    """`folder/file.py`, relative to the root, the package or the page."""
    places = (ROOT, ROOT / "modelstock_jax", page.parent)
    paths = [path for path in _PATH.findall(page.read_text()) if not path.startswith(ELSEWHERE)]
    assert not [path for path in paths if not any((place / path).exists() for place in places)]


def test_a_dead_link_is_seen(tmp_path):
    (tmp_path / "page.md").write_text("# A title: of two_parts\n\n```sh\n# no heading\n```\n")
    text = (
        "[a](page.md) [b](nowhere.md) [c](page.md#a-title-of-two_parts) "
        "[d](page.md#no-heading) [e](https://example.org/x)"
    )
    assert lost(text, tmp_path) == ["nowhere.md", "page.md#no-heading"]


def test_the_architecture_page_names_every_module():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    modules = {path.name for path in (ROOT / "modelstock_jax").rglob("*.py")} - {"__init__.py"}
    assert not [name for name in sorted(modules) if not re.search(rf"\b{name}", page)]
