"""The pages of the API reference and of the site's menu name everything that there is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import modelstock_jax

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def conf():
    spec = importlib.util.spec_from_file_location("conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_is_on_one_page(conf):
    text = "".join(map(conf.api_page, conf.API_PAGES))
    found = re.findall(r"automodule:: modelstock_jax\.([\w.]+)", text)
    root = ROOT / "modelstock_jax"
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    expected = [".".join(x.with_suffix("").parts) for x in files if not x.stem.startswith("__")]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("See `Stats`.", "See ``Stats``."),
        ("All `Stream`s of |w_i| and *x, x_", r"All ``Stream``\ s of \|w_i\| and \*x, x\_"),
        ("The ratio:\n\n    t = cos\n\nNext", "The ratio:\n\n\n::\n\n    t = cos\n\nNext"),
        ("Args:\n  x: text\n    more", "Args:\n  x: text\n    more"),
        ("Returns:\n  a: one\n  b: two", "Returned values:\n  a: one\n  b: two"),
        ("Example:\n  >>> f(a | b)\n  1 | 2", "Example:\n  >>> f(a | b)\n  1 | 2"),
    ],
)
def test_docstrings_become_restructured_text(conf, text, expected):
    lines = text.split("\n")
    conf.markdown_to_rst(None, "function", "name", None, None, lines)
    assert "\n".join(lines).strip() == expected


def test_every_public_name_is_on_the_library_page():
    text = (DOCS / "api/library.md").read_text()
    found = re.findall(r"auto(?:function|class|exception):: modelstock_jax\.(\w+)", text)
    assert sorted(found) == sorted(modelstock_jax.__all__)


def test_every_page_is_in_the_menu(conf):
    """The build warns about a page outside of every toctree; this is seen without a build."""
    menu = set(re.findall(r"^(?:.*<)?([\w./]+)>?$", (DOCS / "index.md").read_text(), re.MULTILINE))
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    notebooks = {f"../notebooks/{page.stem}" for page in (ROOT / "notebooks").glob("*.ipynb")}
    api = {f"api/{page}" for page in ("library", *conf.API_PAGES)}
    root = {f"../{page.stem}" for page in ROOT.glob("*.md")}
    assert not (pages | notebooks | api | root) - menu
    assert "results/*" in (DOCS / "index.md").read_text()


def test_workflows_call_the_commands_of_ci():
    commands = set(re.findall(r"^make [\w-]+", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    run = set()
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            run |= {step["run"] for step in job["steps"] if "run" in step}
    assert run == commands | {"make docs"}
