"""The values of docs/questions.md are those of the pages that it links, and its block runs."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.blocks import ROOT, run_blocks

PAGE = ROOT / "docs/questions.md"
_VALUE = re.compile(r"\d+(?:\.\d+)?(?: %)? ± \d+\.\d+(?: %)?")


def sections() -> list[str]:
    """Question and answer, one by one."""
    return re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]


def lost(section: str, place: Path) -> list[str]:
    """Values with an error that no page has that the section links."""
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", section)}
    pages = [place / link for link in links if link and not link.startswith("http")]
    known = {value for page in pages for value in _VALUE.findall(page.read_text())}
    return [value for value in _VALUE.findall(section) if value not in known]


def test_values_are_in_the_linked_pages():
    assert sum(len(_VALUE.findall(section)) for section in sections()) > 60
    for section in sections():
        assert not lost(section, PAGE.parent), section.splitlines()[0]


def test_every_answer_names_its_evidence():
    assert len(sections()) > 12
    for section in sections():
        assert re.search(r"\]\((results|method|merging|reproduce)", section), section.splitlines()[
            0
        ]


def test_a_changed_value_is_seen(tmp_path):
    (tmp_path / "table.md").write_text("| +1.25 ± 0.10 points | 0.5 % ± 0.1 % |")
    text = "[table](table.md): −1.25 ± 0.10, 0.5 % ± 0.1 %, 1.26 ± 0.10, 25 ± 0.10"
    assert lost(text, tmp_path) == ["1.26 ± 0.10", "25 ± 0.10"]


def test_the_ratios(capsys):
    """The block of docs/questions.md prints what its comment says."""
    run_blocks(PAGE)
    printed = capsys.readouterr().out.split()
    assert printed[1::2] == re.search(r"# ([\d., ]+)\n", PAGE.read_text())[1].split(", ")
