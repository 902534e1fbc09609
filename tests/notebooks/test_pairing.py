"""A notebook and its text form have the same cells; no stored output is older than the code."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tomllib
import types

import pytest

from notebooks import pairing
from notebooks.pairing import FOLDER, as_json, cells, notebook, pairs
from tests.notebooks.cells import code

NAMES = [text.stem for text in pairs()]
every_notebook = pytest.mark.parametrize("name", NAMES)


def test_the_notebooks():
    assert NAMES == [
        "geometry",
        "merge_your_models",
        "quickstart",
        "sentence_encoder",
        "tpu_vitl14",
    ]
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@every_notebook
def test_both_forms_have_the_same_cells(name):
    text = (FOLDER / f"{name}.py").read_text()
    stored = (FOLDER / f"{name}.ipynb").read_text()
    expected = notebook(text, json.loads(stored))
    assert stored == as_json(expected), "run `python notebooks/pairing.py`"
    # Read independently of the code that wrote it.
    read = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(stored)["cells"]]
    assert read == cells(text)
    assert 4 < len(read) < 20 and read[0][0] == "markdown" and read[1][0] == "code"
    assert all(source.strip() for _, source in read)


@every_notebook
def test_outputs_are_those_of_the_code(name):
    stored = json.loads((FOLDER / f"{name}.ipynb").read_text())
    current = notebook((FOLDER / f"{name}.py").read_text(), stored)
    run = [cell for cell in current["cells"] if cell["cell_type"] == "code"]
    # Outputs of other code were dropped by `notebook`.
    counts = [cell["execution_count"] for cell in run]
    complete = list(range(1, len(run) + 1))
    assert counts == complete, f"run `python notebooks/pairing.py --execute {name}`"


@every_notebook
def test_outputs_are_small_and_contain_no_paths(name):
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < 500_000  # Six figures.
    outputs = [o for cell in json.loads(path.read_text())["cells"] for o in cell.get("outputs", ())]
    assert len(outputs) > 1
    for output in outputs:
        data = output.get("data", {"text/plain": output.get("text")})
        text = "".join(data["text/plain"])
        assert not re.search(r"(^|[\s'\"])[/~]\w|\w:\\\\|0x[0-9a-f]{6}", text), text
        if "image/png" in data:
            assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")


TEXT = """
# %% [markdown]
# # Title

# %%
import sys

x = 2
print("two", x)

# %%
y = x + 1

# %%
class Figure:
    def _repr_png_(self):
        return b"png"

    def __repr__(self):
        return "a figure"


print(y)
print("careful", file=sys.stderr)
Figure()
"""


@pytest.fixture
def one_notebook(tmp_path, monkeypatch):
    """A folder with the text form NAME.py of a notebook that may have outputs."""
    monkeypatch.setattr(pairing, "FOLDER", tmp_path)
    (tmp_path / "name.py").write_text(TEXT)
    return tmp_path


def executed(folder):
    """Numbers of the cells that have outputs or an execution count."""
    stored = json.loads((folder / "name.ipynb").read_text())["cells"]
    return [k for k, cell in enumerate(stored) if cell.get("execution_count")]


def test_execute_stores_what_jupyter_would(one_notebook, capsys):
    pairing.main([])
    assert executed(one_notebook) == []
    pairing.main(["--execute", "name"])
    assert "two 2" in capsys.readouterr().out  # Also shown while the notebook runs.
    stored = json.loads((one_notebook / "name.ipynb").read_text())["cells"]
    assert [cell.get("execution_count") for cell in stored] == [None, 1, 2, 3]

    def printed(text, name="stdout"):
        return {"name": name, "output_type": "stream", "text": [text]}

    data = {"image/png": "cG5n\n", "text/plain": ["a figure"]}
    result = {"output_type": "execute_result", "execution_count": 3, "metadata": {}, "data": data}
    outputs = [cell["outputs"] for cell in stored[1:]]
    shown = [printed("3\n"), printed("careful\n", "stderr")]
    assert outputs == [[printed("two 2\n")], [], [*shown, result]]


def test_figures_of_pyplot_are_stored(one_notebook):
    figure = "# %%\nimport matplotlib.pyplot as plt\n\nplt.plot([1, 2])\nplt.figure()\nNone\n"
    (one_notebook / "name.py").write_text(TEXT + "\n" + figure)
    pairing.main(["--execute", "name"])
    cell = json.loads((one_notebook / "name.ipynb").read_text())["cells"][-1]
    assert [o["output_type"] for o in cell["outputs"]] == ["display_data"] * 2
    for output in cell["outputs"]:
        assert base64.b64decode(output["data"]["image/png"]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ("# # Title", "# # Another title", [1, 2, 3]),
        ("print(y)", "print(-y)", [1, 2]),
        ("x + 1", "x + 2", [1]),
        ("x = 2", "x = 3", []),
        # A new cell has no output, and changes what the cells below see.
        ("# %%\ny =", "# %%\nx = 5\n\n# %%\ny =", [1]),
    ],
)
def test_outputs_are_dropped_where_the_code_changes(old, new, kept, one_notebook):
    pairing.main(["--execute", "name"])
    assert TEXT.count(old) == 1
    (one_notebook / "name.py").write_text(TEXT.replace(old, new))
    pairing.main([])
    assert executed(one_notebook) == kept


def test_outputs_of_other_code_are_not_kept(one_notebook):
    """Also if someone edited the code of the notebook and its text form in the same way."""
    pairing.main(["--execute", "name"])
    for path in (one_notebook / "name.py", one_notebook / "name.ipynb"):
        path.write_text(path.read_text().replace("x = 2", "x = 3"))
    stored = json.loads((one_notebook / "name.ipynb").read_text())
    assert notebook((one_notebook / "name.py").read_text(), stored) != stored


def test_a_notebook_that_fails_is_not_written(one_notebook):
    pairing.main([])
    before = (one_notebook / "name.ipynb").read_text()
    (one_notebook / "name.py").write_text(TEXT.replace("x + 1", "x / 0"))
    with pytest.raises(ZeroDivisionError):
        pairing.main(["--execute", "name"])
    assert (one_notebook / "name.ipynb").read_text() == before


def test_text_form_is_read_like_jupytext():
    text = (
        "# ---\n# jupyter: x\n# ---\n\n# %% [markdown]\n# # Title\n#\n# text\n\n"
        "# %%\nx = 1\n# a comment\n\n# %%\ny = '# %%'\n"
    )
    assert cells(text) == [
        ("markdown", "# Title\n\ntext"),
        ("code", "x = 1\n# a comment"),
        ("code", "y = '# %%'"),
    ]
    assert notebook(text)["cells"][1]["source"] == ["x = 1\n", "# a comment"]


@every_notebook
def test_first_cell_installs_only_on_colab(name, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: commands.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(FOLDER)
    exec(code(name)[0], {})
    assert not commands and os.getcwd() == str(FOLDER.parent)

    # Colab: an empty folder, into which the repository is cloned.
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="set REPOSITORY"):
        exec(code(name)[0], {})

    def clone(command, **options):
        commands.append(command)
        (tmp_path / "modelstock_jax").mkdir(exist_ok=True)
        (tmp_path / "modelstock_jax" / "launch.py").touch()

    monkeypatch.setattr(subprocess, "run", clone)
    exec(code(name)[0].replace('REPOSITORY = ""', 'REPOSITORY = "URL"'), {})
    assert os.getcwd() == str(tmp_path / "modelstock_jax")
    assert commands[0][:2] == ["git", "clone"] and "URL" in commands[0]
    extras = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
    assert commands[1][-1] in {".", *(f".[{e}]" for e in extras["optional-dependencies"])}


def test_all_start_with_the_same_code():
    """The installation is the same; the parameters follow it."""
    imports = {code(name)[0].split("\n\n", 2)[1] for name in NAMES}
    starts = {code(name)[0].split("sys.path.insert")[0] for name in NAMES}
    assert len(imports) == len(starts) == 1
