"""Run the cells of a notebook in order in one namespace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from notebooks.pairing import FOLDER, cells

Names = dict[str, Any]


def code(name: str) -> list[str]:
    """Return the code cells of a notebook."""
    return [source for kind, source in cells((FOLDER / f"{name}.py").read_text()) if kind == "code"]


def run(
    name: str, replacements: Mapping[str, Callable[[Names], Names]] | None = None, **parameters: Any
) -> Names:
    """Run a notebook from top to bottom, with other parameters than those of its first cell.

    A traceback names the notebook and the cell.

    Args:
      name: name of the notebook
      replacements: line -> function whose names replace the cell that contains the line
      **parameters: parameters that the first cell defines

    Returns:
      all names at the end
    """
    names: Names = {"__name__": name}
    unused = dict(replacements or {})
    for number, source in enumerate(code(name)):
        line = next((line for line in unused if line in source.splitlines()), None)
        if line is None:
            exec(compile(source, f"{name}, code cell {number}", "exec"), names)
        else:
            names |= unused.pop(line)(names)
        if number == 0:
            assert parameters.keys() <= names.keys(), parameters.keys() - names.keys()
            names |= parameters
    assert not unused, f"no cell has the line {list(unused)}"
    return names
