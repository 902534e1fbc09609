"""Write each notebook from its text form, a .py file in Jupytext's percent format.

Edit the .py file, then run:

    python notebooks/pairing.py                      # writes every NAME.ipynb from its NAME.py
    python notebooks/pairing.py --execute geometry   # also runs it and stores its outputs

Both forms have the same cells, so a change can be reviewed as text. The .ipynb files contain their
outputs, so that a reader of the pages sees them.

No output is older than the code of its notebook: the metadata of a cell contain the SHA-256 of all
code from the top to this cell. If that code changes, the first command drops the output, and
tests/notebooks/test_pairing.py fails until the notebook is executed again. Changes of the text
between the cells, and of the code that a notebook imports, drop nothing.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, TextIO

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


def notebook(text: str, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    """Convert a text form to a notebook of format 4.5.

    Args:
      text: text form.
      stored: an earlier version of the notebook. Outputs of its cells are kept if the same code
        made them; otherwise a cell has no output.
    """
    kept = {
        cell["metadata"]["executed"]: cell
        for cell in (stored or {}).get("cells", [])
        if "executed" in cell["metadata"]
    }
    made, code = [], []
    for number, (kind, source) in enumerate(cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}}
        if kind == "code":
            code.append(source)
            cell |= {"execution_count": None, "outputs": []}
            if earlier := kept.get(checksum(code)):
                cell |= {key: earlier[key] for key in ("execution_count", "metadata", "outputs")}
        made.append(cell | {"source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def checksum(code: list[str]) -> str:
    """Return the SHA-256 of the sources of code cells."""
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def execute(document: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook with the outputs of its code cells, run in order in this process.

    Outputs are those that Jupyter would store, for what the notebooks use: printed text and errors,
    the value of the last expression of a cell, as text and, for a figure, as PNG, and the figures
    of pyplot.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    made, code = [], []
    for cell in document["cells"]:
        if cell["cell_type"] == "code":
            code.append("".join(cell["source"]))
            start = time.monotonic()
            outputs = _outputs(code[-1], names, len(code))
            print(f"[{len(code)}] {time.monotonic() - start:.1f} s", file=sys.stderr)
            cell = cell | {
                "execution_count": len(code),
                "metadata": {"executed": checksum(code)},
                "outputs": outputs,
            }
        made.append(cell)
    return document | {"cells": made}


def _outputs(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Run one cell in `names` and return its outputs."""
    body, value = ast.parse(source).body, None
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed, errors = _Copy(sys.stdout), _Copy(sys.stderr)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    outputs: list[dict[str, Any]] = []
    for stream, copy in (("stdout", printed), ("stderr", errors)):
        if text := copy.getvalue():
            lines = text.splitlines(keepends=True)
            outputs.append({"name": stream, "output_type": "stream", "text": lines})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            data["image/png"] = base64.b64encode(value._repr_png_()).decode() + "\n"
        result = {"data": data, "execution_count": number, "metadata": {}}
        outputs.append(result | {"output_type": "execute_result"})
    return outputs + _pyplot_figures()


def _pyplot_figures() -> list[dict[str, Any]]:
    """Return the open figures of pyplot and close them."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    import matplotlib.pyplot as plt

    outputs = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, format="png", bbox_inches="tight", dpi=60)
        data = {"image/png": base64.b64encode(file.getvalue()).decode() + "\n"}
        data["text/plain"] = ["<Figure>"]
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


class _Copy(io.StringIO):
    """Text that is also written to a stream."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(text)
        return super().write(text)

    def flush(self) -> None:
        self._stream.flush()


def as_json(document: dict[str, Any]) -> str:
    """Serialize a notebook in the way Jupyter does."""
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def pairs() -> dict[Path, Path]:
    """Return a mapping from the text form of each notebook to the notebook."""
    texts = sorted(path for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)
    return {text: text.with_suffix(".ipynb") for text in texts}


def main(arguments: list[str] | None = None) -> None:
    """Write every notebook; execute one of them before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [text.stem for text in pairs()]
    parser.add_argument("--execute", choices=names, help="run this notebook, store its outputs")
    name = parser.parse_args(arguments).execute
    os.environ.setdefault("MPLBACKEND", "agg")
    for text, path in pairs().items():
        stored = json.loads(path.read_text()) if path.exists() else None
        document = notebook(text.read_text(), stored)
        if text.stem == name:
            document = execute(document)
        path.write_text(as_json(document))
        print(path)


if __name__ == "__main__":
    main()
