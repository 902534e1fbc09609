"""Texts of messages in the source: constants, and f-strings with placeholders."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.docs.blocks import ROOT

# Minimum length of the constant part of a message, so that no other text matches by chance.
LEAST = 14


def templates() -> list[re.Pattern[str]]:
    """A pattern for each sufficiently long text of the package, the configs and launch.py."""
    found = []
    for path in (
        ROOT / "launch.py",
        *(ROOT / "configs").glob("*.py"),
        *(ROOT / "modelstock_jax").rglob("*.py"),
    ):
        for parts in _texts(ast.parse(path.read_text())):
            if sum(len(part.strip()) for part in parts if part) >= LEAST:
                pattern = "".join(".*?" if part is None else re.escape(part) for part in parts)
                pattern = pattern.removesuffix("\\\n")  # Where it ends a line.
                found.append(re.compile(pattern, re.DOTALL))
    return found


def _texts(tree: ast.AST) -> Iterator[list[str | None]]:
    """Each text as its constant parts, None for placeholders; without docstrings."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if id(node) in statements or id(node) in inside:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield [node.value]
        elif isinstance(node, ast.JoinedStr):
            yield [part.value if isinstance(part, ast.Constant) else None for part in node.values]


def known(message: str, patterns: list[re.Pattern[str]]) -> list[str]:
    """Parts of a message that the source contains, longest first."""
    said = {found[0] for pattern in patterns if (found := pattern.search(message))}
    return sorted(said, key=len, reverse=True)
