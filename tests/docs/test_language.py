"""The text of the project uses plain American English and the words of the field."""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

# Words that this project used in a private sense, or in British spelling -> what to write.
WORDS = {
    r"\b(lies|lay)\b": "is stored in, is located at, is in",
    r"\bstands\b": "is",
    r"\bbeside\b": "next to, compared with, in addition to",
    r"\b(is|are|was|were|be) refused\b": "raises an error",
    r"\b(wholly|anew)\b": "completely; again",
    r"\b(go|goes|going|went) on\b": "resumes, continues",
    r"\bway out\b": "how to fix it",
    r"\bno clock\b": "no timestamps",
    r"\bset-up\b": "setup",
    r"\bglyph world\b": "the synthetic benchmark",
    r"\bfor it is\b": "because it is",
    r"\b(colour|centre|grey|behaviour|neighbour|favour|catalogue|licence|artefact)\w*": "US",
    r"\b\w*(normalis|initialis|summaris|optimis|organis|recognis|minimis|quantis)\w+": "-ize",
}
# (file, text) of hits that are right, with the reason.
ALLOWED = {
    ("CHANGELOG.md", "LICENCE"): "a file name",
    ("CHANGELOG.md", "centre"): "old names of parameters",
    ("modelstock_jax/data/glyphs/captions.py", "grey"): "training captions of the bundled models",
    ("modelstock_jax/checkpoint_merge/sources.py", "LICENCE"): "a file name",
}


def pages() -> list[Path]:
    """Markdown pages, and Python files of the package and of the folders next to it."""
    docs = [path for path in ROOT.glob("*.md")] + list((ROOT / "docs").rglob("*.md"))
    folders = ("modelstock_jax", "configs", "studies", "notebooks", "benchmarks", "examples")
    python = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted([*docs, *python, ROOT / "launch.py"])


@functools.cache
def all_texts() -> list[tuple[str, int, str]]:
    """(file, line, text) of everything that a person reads."""
    return [
        (str(path.relative_to(ROOT)), line, text) for path in pages() for line, text in texts(path)
    ]


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of a page, or of the strings and comments of a Python file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(source.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.mark.parametrize("word", WORDS)
def test_plain_words(word):
    found = [
        f"{name}:{line}: {hit[0]!r}: write {WORDS[word]}"
        for name, line, text in all_texts()
        for hit in re.finditer(word, text, re.IGNORECASE)
        if (name, hit[0]) not in ALLOWED
    ]
    assert not found, "\n".join(found)
