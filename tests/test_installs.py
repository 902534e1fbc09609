"""The documented lines that install this project bring what they promise, and no more."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from modelstock_jax import extras
from tests.installs import (
    INSTALLED,
    NEEDS,
    OTHERS,
    RESOLVED,
    ROOT,
    TEMPORARY,
    Environment,
    check_installed,
    check_merge,
    check_resolved,
    copy_source,
    documented,
    install_line,
)
from tests.test_layering import PACKAGE, STUDIES, imports

TOML = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Units that the base install runs; the others need an extra.
BASE = {"checkpoint_merge", "errors", "extras", "fileio", "machine", "registry", "tensor_files"}
PROGRAMS = [(extra, program) for extra, programs in NEEDS.items() for program in programs]


@pytest.fixture(scope="module")
def generator():
    """The script docs/requirements.py."""
    spec = importlib.util.spec_from_file_location("requirements", ROOT / "docs/requirements.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normalized(requirement: str) -> str:
    """The name of a requirement, as in the metadata of pip."""
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")


def third_parties(units) -> set[str]:
    """Packages that modules of these units import, at their start or later."""
    known = importlib.metadata.packages_distributions()
    paths = (path for unit in units for path in _modules(unit))
    names = {name.partition(".")[0] for path in paths for _, name in imports(path, ROOT)}
    return {normalized(known[name][0]) for name in names if name in known} - {"modelstock-jax"}


def _modules(unit: str) -> list[Path]:
    folder = ROOT / (unit if unit == STUDIES else f"{PACKAGE}/{unit}")
    return [*folder.rglob("*.py")] if folder.is_dir() else [folder.with_suffix(".py")]


def units() -> set[str]:
    found = {path.stem for path in (ROOT / PACKAGE).iterdir() if path.suffix in (".py", "")}
    return found - {"__init__", "__pycache__", "__main__"} | {STUDIES}


def test_every_documented_line_is_tried():
    lines = {line for line in documented() if line.removeprefix("pip install ") not in OTHERS}
    assert lines == {*INSTALLED, *RESOLVED, *TEMPORARY}


def test_lines_are_found_in_pages_and_notebooks():
    assert documented()["pip install -e '.[tpu]'"].startswith("notebooks/")
    assert documented()["pip install -e ."].endswith(".md")


def test_requirements_txt_is_current(generator):
    text = generator.text(generator.SOURCE.read_text())
    assert generator.LIST.read_text() == text, "run `python docs/requirements.py`"


def test_each_part_imports_only_what_its_extra_installs(generator):
    source = generator.SOURCE.read_text()
    base = {normalized(line) for line in TOML["dependencies"]}
    library = base | {normalized(line) for line in generator.requirements("jax", source)}
    train = base | {normalized(line) for line in generator.requirements("train", source)}
    assert third_parties(BASE) <= base
    assert third_parties({"merging"}) <= library
    assert third_parties({"reporting"}) - {"tensorboardx"} <= base
    assert third_parties(units()) <= train
    assert len(base) == 8 and len(library) == 9


def test_the_imports_of_an_extra_are_those_at_the_start_of_its_modules():
    """In the order of the table, a missing package is named before it is imported."""
    known = importlib.metadata.packages_distributions()
    base = {normalized(line) for line in TOML["dependencies"]}
    found = set()
    for unit in units() - {STUDIES}:
        for path in _modules(unit):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add((node.module or "").partition(".")[0])
    third = {name for name in found & known.keys() if normalized(known[name][0]) not in base}
    assert set(extras._IMPORTS["train"]) == third - {PACKAGE}


def test_make_installs_the_same_torch_first():
    makefile = (ROOT / "Makefile").read_text()
    (torch,) = [r for r in TOML["optional-dependencies"]["parity"] if r.startswith("torch=")]
    assert f" {torch}\n" in makefile and makefile.index(torch) < makefile.index(",parity]'\n")


@pytest.mark.parametrize(("extra", "program"), PROGRAMS, ids=[program for _, program in PROGRAMS])
def test_without_any_package_a_program_names_its_extra(extra, program):
    """The option -S hides all installed packages."""
    _, *arguments = shlex.split(program)
    done = subprocess.run(
        [sys.executable, "-S", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and install_line(extra) in lines[-1], done.stderr
    assert " -c " in program or len(lines) == 1, done.stderr


def test_other_import_errors_are_not_hidden(monkeypatch):
    """A module that is broken although jax is installed keeps its own error."""
    from modelstock_jax import merging

    monkeypatch.setitem(merging._MODULE_OF, "model_stock", "no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        _ = merging.model_stock


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return copy_source(tmp_path_factory.mktemp("source"))


@pytest.mark.slow
@pytest.mark.parametrize("line", INSTALLED)
def test_a_line_installs_its_parts_and_no_others(line, source, tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.install(line, source)
    check_installed(environment, INSTALLED[line], source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("line", RESOLVED)
def test_a_long_line_can_be_resolved(line, source, tmp_path):
    check_resolved(Environment(tmp_path / "environment"), line, RESOLVED[line], source)


@pytest.mark.slow
@pytest.mark.parametrize("line", TEMPORARY)
def test_uv_merges_without_an_installation(line, source, tmp_path, monkeypatch):
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    environment = Environment(tmp_path / "environment")
    environment.install("pip install uv", source)
    check_merge(environment, line, source, tmp_path)
