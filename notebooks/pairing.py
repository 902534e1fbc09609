"""Write each notebook from its text form, a .py file in Jupytext's percent format.

Edit the .py file, then run:

    python notebooks/pairing.py        # writes every NAME.ipynb from its NAME.py

The .ipynb files contain no outputs. Both forms therefore have the same content, a change can be
reviewed as text, and no output can be older than the code. docs/ contains the figures.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
_CELL = re.compile(r"^# %%(| \[markdown\])\n", re.MULTILINE)


def cells(text: str) -> list[tuple[str, str]]:
    """Return (kind, source) of each cell of a text form; the header above them is left out."""
    parts = _CELL.split(text)[1:]
    return [
        ("code", source.strip("\n"))
        if not kind
        else ("markdown", re.sub(r"^# ?", "", source.strip("\n"), flags=re.MULTILINE))
        for kind, source in zip(parts[::2], parts[1::2], strict=True)
    ]


def notebook(text: str) -> dict[str, Any]:
    """Convert a text form to a notebook of format 4.5, without outputs."""
    made = []
    for number, (kind, source) in enumerate(cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell | {"source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def as_json(document: dict[str, Any]) -> str:
    """Serialize a notebook in the way Jupyter does."""
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def pairs() -> dict[Path, Path]:
    """Return a mapping from the text form of each notebook to the notebook."""
    texts = sorted(path for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)
    return {text: text.with_suffix(".ipynb") for text in texts}


if __name__ == "__main__":
    for text, made in pairs().items():
        made.write_text(as_json(notebook(text.read_text())))
        print(made)
