"""Every command on a page is accepted by its program."""

from __future__ import annotations

import re

import pytest

from tests.docs.blocks import PAGES, ROOT, commands, named
from tests.docs.checks import wrong


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # --config=configs/... is a path from there.


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_is_taken(page):
    found = {command: wrong(command) for command in commands(page)}
    assert not any(found.values()), "\n".join(
        f"{named(page)}: {command}: {what}" for command, what in found.items() if what
    )


def test_so_is_every_command_of_the_configs():
    for path in sorted((ROOT / "configs").glob("*.py")):
        text = path.read_text().replace("\\\\\n", " ")
        for line in re.findall(r"^ *python launch\.py (.*)$", text, re.MULTILINE):
            assert wrong(f"python launch.py {line}") is None, f"{path.name}: {line}"


def test_pages_have_commands():
    """Otherwise the checks above would pass without checking anything."""
    counts = {named(page): len(commands(page)) for page in PAGES}
    assert counts["README.md"] > 12 and counts["docs/train_on_imagenet.md"] > 7
    assert counts["docs/merging.md"] > 8 and counts["docs/scale.md"] > 3


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("JAX_PLATFORMS=cpu python launch.py --config.merge.evry=100", "evry"),
        ("modelstock merge BASE FT1 FT2 --out DIR --units layer", "exit status 2"),
        ("make demos", "no target"),
    ],
)
def test_a_mistake_is_seen(command, what):
    assert what in (wrong(command) or "")
