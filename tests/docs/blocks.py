"""Blocks of Markdown pages: those of Python as programs, those of a shell as commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md")),
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)


def fenced(page: Path) -> list[tuple[int, str, str]]:
    """(line, language, text) of a page's fenced blocks, those in lists too."""
    text = page.read_text()
    return [
        (text.count("\n", 0, found.start(3)) + 1, found[2],
         re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE))
        for found in _FENCED.finditer(text)
    ]


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(line, text) of a page's Python blocks."""
    return [(line, text) for line, language, text in fenced(page) if language == "python"]


def run_blocks(page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a page's blocks one after the other; a traceback names the page and its line.

    `names` are what the page speaks of and does not make.
    """
    names = {"__name__": f"docs.{page.stem}", **(names or {})}
    for line, text in python_blocks(page):
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)
    return names


def commands(page: Path) -> list[str]:
    """What a page gives to type: lines of shell blocks and indented ones, and `code` of commands.

    Continued lines are joined, comments and what follows a pipe or a redirection left out.
    """
    text = page.read_text()
    shell = [block for _, language, block in fenced(page) if language in ("sh", "bash")]
    prose = _FENCED.sub("", text)
    shell += [re.sub("^ {4}", "", block, flags=re.MULTILINE) for block in _INDENTED.findall(prose)
              if re.match(r" {4}(python|modelstock|make|pytest|XLA_)", block)]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python |modelstock |make |pytest |pip |hf )[^`\n]+)`", prose)
    parts = (part for line in lines for part in re.split(r" [|&] | && |; ", line))
    return [part.strip() for part in parts if part.strip() and not part.strip().startswith("#")]
