"""Modules import only lower layers, are short, and none is named utils."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import modelstock_jax

PACKAGE, STUDIES = "modelstock_jax", "studies"
ROOT = Path(__file__).parents[1]
MAX_LINES = 600
MAX_FUNCTION_LINES = 50  # without the docstring
MAX_LAUNCH_LINES = 60

# A unit (a module or a folder of the package) may import units of lower layers. Units of the same
# layer may import each other in one direction only.
LAYERS = [
    {"errors", "extras", "fileio", "flags", "machine", "registry"},
    {"merging", "tensor_files"},
    {"data", "models"},
    {"training", "evaluation", "reporting"},
    {"experiment", "checkpoint_merge"},
    {"__main__"},
    {"studies"},
]
LAYER = {unit: depth for depth, units in enumerate(LAYERS) for unit in units}
# These units import nothing but the standard library, other units, and these packages.
THIRD_PARTIES = {
    "errors": set(),
    "extras": set(),
    "machine": set(),
    "fileio": set(),
    "registry": set(),
    "flags": {"absl", "ml_collections"},
    "merging": {"jax", "numpy"},
    "tensor_files": {"numpy", "ml_dtypes", "safetensors", "huggingface_hub", "zlib_ng"},
    "checkpoint_merge": {"numpy", "ml_dtypes", "rich", "yaml", "matplotlib"},
}
# A merge of files starts quickly and needs no accelerator: it must not import training.
INTERNAL = {
    "checkpoint_merge": {
        *("errors", "fileio", "machine", "registry", "merging", "tensor_files", "reporting"),
        "checkpoint_merge",
    }
}


def imports(path: Path, root: Path) -> list[tuple[int, str]]:
    """Return (line, dotted name) of every import in a file; relative imports are resolved."""
    package = list(path.relative_to(root).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *(node.module or "").split(".")] if node.module else base
            found += [(node.lineno, ".".join([*names, alias.name])) for alias in node.names]
    return found


def unit_of(path: Path, root: Path) -> str:
    first, *rest = path.relative_to(root).with_suffix("").parts
    return rest[0] if first == PACKAGE else first


def too_long(path: Path) -> list[tuple[int, str]]:
    """Return (line, problem) for a module that is too long and for each function that is."""
    text, found = path.read_text(), []
    if (length := len(text.splitlines())) > MAX_LINES:
        found.append((length, f"longer than {MAX_LINES} lines"))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body and (node.end_lineno or 0) - body[0].lineno >= MAX_FUNCTION_LINES:
                found.append((node.lineno, f"{node.name} is over {MAX_FUNCTION_LINES} lines"))
    return found


def wrong_import(unit: str, name: str) -> str | None:
    """Return the problem with an import of `name` in a unit, or None."""
    top, *rest = name.split(".")
    if top == STUDIES and unit != STUDIES:
        return f"{unit} imports {STUDIES}, which is in a higher layer"
    if top != PACKAGE:
        allowed = THIRD_PARTIES.get(unit, {top}) | sys.stdlib_module_names
        return None if top in allowed else f"{unit} may not import {top}"
    target = rest[0] if rest else ""
    if target == "__version__":
        return None
    if target not in LAYER:
        return f"import {name} from the module that defines it"
    if target not in INTERNAL.get(unit, LAYER):
        return f"{unit} may not import {target}"
    return (
        f"{unit} imports {target}, which is in a higher layer"
        if LAYER[target] > LAYER[unit]
        else None
    )


def violations(root: Path) -> list[str]:
    """Return one line `file:line: problem` for every broken rule under `root`."""
    found: list[str] = []
    sideways: dict[tuple[str, str], str] = {}
    for path in [*sorted((root / PACKAGE).rglob("*.py")), *sorted((root / STUDIES).rglob("*.py"))]:
        where, unit = path.relative_to(root).as_posix(), unit_of(path, root)
        found += [f"{where}:{line}: {wrong}" for line, wrong in too_long(path)]
        if path.name == "utils.py":
            found.append(f"{where}:1: name the module after its contents, not utils")
        if unit == "__init__":
            continue  # the public names, imported on first use: above all layers
        if unit not in LAYER:
            found.append(f"{where}:1: {unit} is missing in LAYERS")
            continue
        for line, name in imports(path, root):
            if wrong := wrong_import(unit, name):
                found.append(f"{where}:{line}: {wrong}")
            target = name.split(".")[1] if name.startswith(f"{PACKAGE}.") else unit
            if target != unit and LAYER.get(target) == LAYER[unit]:
                if other := sideways.get((target, unit)):
                    found.append(f"{where}:{line}: {unit} imports {target}, and {other} back")
                sideways.setdefault((unit, target), f"{where}:{line}")
    launch = root / "launch.py"
    if launch.exists() and (length := len(launch.read_text().splitlines())) > MAX_LAUNCH_LINES:
        found.append(f"launch.py:{length}: longer than {MAX_LAUNCH_LINES} lines")
    return found


def import_cycle(root: Path) -> list[str]:
    """Return the modules of an import cycle, or []."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in (PACKAGE, STUDIES)
        for path in (root / folder).rglob("*.py")
    }
    graph = {}
    for module, path in paths.items():
        names = [name for _, name in imports(path, root)]
        # An imported name is a module, or a name in a module.
        found = {name if name in paths else name.rpartition(".")[0] for name in names}
        graph[module] = (found & paths.keys()) - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_there_is_no_import_cycle(tmp_path):
    assert import_cycle(ROOT) == []
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "a.py").write_text("def f():\n    from modelstock_jax.b import g\n")
    (package / "b.py").write_text("from modelstock_jax import a\n")
    assert set(import_cycle(tmp_path)) == {f"{PACKAGE}.a", f"{PACKAGE}.b"}


def test_this_tree():
    assert not violations(ROOT), "\n" + "\n".join(violations(ROOT))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("merging/a.py", "from ..training.train_step import f\n", "merging/a.py:1: merging imp"),
        ("checkpoint_merge/a.py", "import jax\n", "checkpoint_merge/a.py:1: checkpoint_merge may"),
        ("training/a.py", "from studies import runs\n", "training/a.py:1: training imports stud"),
        ("data/a.py", "def f():\n" + "    x = 1\n" * 51, "data/a.py:1: f is over"),
    ],
)
def test_a_broken_rule_is_reported(tmp_path, file, text, expected):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{PACKAGE}/{expected}"), found


def test_the_package_does_not_import_jax():
    code = (
        "import sys, modelstock_jax; dir(modelstock_jax); modelstock_jax.UserError\n"
        "assert 'numpy' not in sys.modules and 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_every_public_name_resolves():
    assert set(modelstock_jax.__all__) <= set(dir(modelstock_jax))
    for name in modelstock_jax.__all__:
        assert callable(getattr(modelstock_jax, name)), name
    with pytest.raises(AttributeError, match="'model_stok'"):
        _ = modelstock_jax.model_stok
