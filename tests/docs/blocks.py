"""Code blocks of Markdown pages: Python blocks as programs, shell blocks as commands."""

from __future__ import annotations

import re
import shlex
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


def named(page: Path) -> str:
    """Name of a page in messages; there are two README.md."""
    return page.relative_to(ROOT).as_posix()


def fenced(page: Path) -> list[tuple[int, str, str]]:
    """(line, language, text) of a page's fenced blocks, including those in lists."""
    text = page.read_text()
    return [
        (
            text.count("\n", 0, found.start(3)) + 1,
            found[2],
            re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE),
        )
        for found in _FENCED.finditer(text)
    ]


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(line, text) of the Python blocks of a page."""
    return [(line, text) for line, language, text in fenced(page) if language == "python"]


def run_blocks(page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the blocks of a page in order; a traceback names the page and its line.

    `names` are what the page speaks of and does not make.
    """
    names = {"__name__": f"docs.{page.stem}", **(names or {})}
    for line, text in python_blocks(page):
        exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)
    return names


def commands(page: Path) -> list[str]:
    """Commands of a page: lines of shell and indented blocks, and `code` that is a command.

    Continued lines are joined, those with pipes and the like taken apart.
    """
    text = page.read_text()
    shell = [block for _, language, block in fenced(page) if language in ("sh", "bash")]
    prose = _FENCED.sub("", text)
    shell += [
        re.sub("^ {4}", "", block, flags=re.MULTILINE)
        for block in _INDENTED.findall(prose)
        if re.match(r" {4}(python|modelstock|make|pytest|XLA_)", block)
    ]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python |modelstock |make |pytest |pip |uvx |hf )[^`\n]+)`", prose)
    return [command for line in lines for command in simple_commands(line)]


def simple_commands(line: str) -> list[str]:
    """Commands of a line, without comments and separators."""
    # <placeholder> is replaced by the reader; ... means more of the same.
    line = re.sub(r"\$\w+", "1", re.sub(r"<[^>]*>", "PLACEHOLDER", line)).replace(" ...", "")
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("&|;()<>"):
            found.append([])
        else:
            found[-1].append(word)
    return [shlex.join(command) for command in found if command]
