"""All claims at a glance: a page over the pages of the studies that have been run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax.fileio import write_text
from modelstock_jax.studies.page import stems
from modelstock_jax.studies.report.claims import cell
from modelstock_jax.studies.study import Study

PAGE = "README.md"


def write_index(studies: Sequence[Study], directory: Path) -> Path:
    """Writes the verdicts of every page in the directory.

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
        "numbers; claims of ours are marked so. Paired differences, mean ± standard error over n "
        "seeds or disjoint groups of models; *holds* where the 95 % interval of Student's t lies "
        "above zero, *does not hold* where it lies below, *not decided* where it holds zero. With "
        "*at most*, the mean deviation is held against a bound, over n seeds, tensors, epochs or "
        "draws of noise, of which some may lie beyond it. All seeds meet the same test images: "
        "what chance there favours is in no error. Of several anchors, one under another, a claim "
        "holds where it holds from each. Written by `make studies`.",
        "",
        "| study | claim | where | here | verdict |",
        "|---|---|---|---:|---|",
    ]
    for study in studies:
        for stem in stems(study):
            path = directory / f"{stem}.json"
            if path.exists():
                lines += _rows(study.name, path)
    return write_text(directory / PAGE, "\n".join([*lines, ""]))


def _rows(name: str, path: Path) -> list[str]:
    try:
        return _claims(path.stem, json.loads(path.read_text(encoding="utf-8")))
    # Of an older version, or no longer whole.
    except (ValueError, KeyError, TypeError, AttributeError):
        command = f"python -m modelstock_jax.studies {name}"
        if path.stem != name:
            command += " --anchors=..."
        return [f"| {path.stem} | cannot be read: run `{command}` | | | |"]


def _claims(name: str, document: Mapping[str, Any]) -> list[str]:
    anchors = len(document.get("further", ())) + 1
    title = document["title"] + (f", from {anchors} anchors" if anchors > 1 else "")
    link = f"[{title}]({name}.md)"
    # Of several anchors, what all of them were asked: the rest is on the first one's own page.
    claims = document["together"] if anchors > 1 else document["claims"]
    if not claims:
        return [f"| {link} | | | | |"]
    rows = []
    for number, claim in enumerate(claims):
        here = claim["here"] if anchors == 1 else "<br>".join(claim["here"])
        first, verdict = "" if number else link, f"**{claim['verdict']}**"
        row = [first, cell(claim["text"]), claim["where"], here, verdict]
        rows.append(f"| {' | '.join(row)} |")
    return rows
