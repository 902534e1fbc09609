"""All claims at a glance: a page over the pages of the studies that have been run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax.reporting.files import write_text
from modelstock_jax.studies.claims import cell
from modelstock_jax.studies.study import Study

PAGE = "README.md"


def write_index(studies: Sequence[Study], directory: Path) -> Path:
    """Writes the verdicts of every study whose NAME.json lies in the directory.

    Args:
      studies: in the order of the page.
      directory: of all studies.

    Returns:
      The page's path.
    """
    lines = [
        "# Verdicts",
        "",
        "Whether what the paper says holds on the glyph world: orderings, never its absolute "
        "numbers. Paired differences over seeds, mean ± standard error; *holds* where the 95 % "
        "interval of Student's t lies above zero, *does not hold* where it lies below, *not "
        "decided* where it holds zero. Written by `python -m modelstock_jax.studies`.",
        "",
        "| study | claim | here | verdict |",
        "|---|---|---:|---|",
    ]
    for study in studies:
        path = directory / f"{study.name}.json"
        if path.exists():
            lines += _rows(study.name, path)
    return write_text(directory / PAGE, "\n".join([*lines, ""]))


def _rows(name: str, path: Path) -> list[str]:
    try:
        return _claims(name, json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):  # Of an older version, or no longer whole.
        return [f"| {name} | cannot be read: run `python -m modelstock_jax.studies {name}` | | |"]


def _claims(name: str, document: Mapping[str, Any]) -> list[str]:
    link = f"[{document['title']}]({name}.md)"
    if not document["claims"]:
        return [f"| {link} | | | |"]
    together = document.get("together", {})
    rows = []
    for number, claim in enumerate(document["claims"]):
        verdict = together.get(claim["text"], {}).get("all", claim["verdict"])
        first = "" if number else link
        rows.append(f"| {first} | {cell(claim['text'])} | {claim['here']} | **{verdict}** |")
    return rows
