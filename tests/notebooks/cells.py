"""Notebooks as programs: their cells, one after the other, in one namespace."""

from __future__ import annotations

from typing import Any

from notebooks.pairing import FOLDER, cells


def code(name: str) -> list[str]:
    """The code cells of a notebook."""
    return [source for kind, source in cells((FOLDER / f"{name}.py").read_text()) if kind == "code"]


def run(name: str, **parameters: Any) -> dict[str, Any]:
    """Runs a notebook from top to bottom; `parameters` take the place of those of its first cell.

    A traceback names the notebook and the cell.
    """
    names: dict[str, Any] = {"__name__": name}
    for number, source in enumerate(code(name)):
        exec(compile(source, f"{name}, code cell {number}", "exec"), names)
        if number == 0:
            assert parameters.keys() <= names.keys(), parameters.keys() - names.keys()
            names |= parameters
    return names
