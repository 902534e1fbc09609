"""Notebooks as programs: their cells, one after the other, in one namespace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from notebooks.pairing import FOLDER, cells

Names = dict[str, Any]


def code(name: str) -> list[str]:
    """The code cells of a notebook."""
    return [source for kind, source in cells((FOLDER / f"{name}.py").read_text()) if kind == "code"]


def run(
    name: str, instead: Mapping[str, Callable[[Names], Names]] | None = None, **parameters: Any
) -> Names:
    """Runs a notebook from top to bottom; `parameters` take the place of those of its first cell.

    A traceback names the notebook and the cell.

    Args:
      name: of the notebook.
      instead: a line -> what gives names in place of the one cell that holds it.
      **parameters: must be in the first cell.

    Returns:
      All names at its end.
    """
    names: Names = {"__name__": name}
    left = dict(instead or {})
    for number, source in enumerate(code(name)):
        line = next((line for line in left if line in source.splitlines()), None)
        if line is None:
            exec(compile(source, f"{name}, code cell {number}", "exec"), names)
        else:
            names |= left.pop(line)(names)
        if number == 0:
            assert parameters.keys() <= names.keys(), parameters.keys() - names.keys()
            names |= parameters
    assert not left, f"no cell has the line {list(left)}"
    return names
