"""A notebook and its text form have the same cells, and all start with the same code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import types

import pytest

from notebooks.pairing import FOLDER, as_json, cells, notebook, pairs
from tests.notebooks.cells import code

NAMES = [text.stem for text in pairs()]
every_notebook = pytest.mark.parametrize("name", NAMES)


def test_the_notebooks():
    assert NAMES == ["geometry", "merge_your_models", "quickstart", "tpu_vitl14"]
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@every_notebook
def test_both_forms_have_the_same_cells(name):
    text = (FOLDER / f"{name}.py").read_text()
    stored = (FOLDER / f"{name}.ipynb").read_text()
    assert stored == as_json(notebook(text)), "run `python notebooks/pairing.py`"
    # Read independently of the code that wrote it.
    read = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(stored)["cells"]]
    assert read == cells(text)
    assert 4 < len(read) < 20 and read[0][0] == "markdown" and read[1][0] == "code"
    assert all(source.strip() for _, source in read)


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
