"""The source distribution and the wheel built from it, installed in a separate environment."""

from __future__ import annotations

import re
import sysconfig
import tarfile
import zipfile

import pytest

import modelstock_jax
from tests.installs import Environment, check_merge, copy_source, tracked

# Only an installed copy can test this: its data files are found, the repository is not.
PROGRAM = """
import importlib.util, pathlib, sys
import jax.numpy as jnp
import modelstock_jax
from modelstock_jax.models.checkpoint_io import load
from modelstock_jax.data.imagenet import CLASS_NAMES
from modelstock_jax.experiment.setup import BUNDLED
assert pathlib.Path(modelstock_jax.__file__).is_relative_to(sys.prefix), modelstock_jax.__file__
assert not importlib.util.find_spec("configs") and not importlib.util.find_spec("tests")
checkpoint = load(BUNDLED["glyph-clip"])
anchor = {"w": jnp.zeros(2)}
merged, _ = modelstock_jax.model_stock(anchor, {"w": jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])})
print(round(float(merged["w"][0]), 3), checkpoint.config.vision.image_size, len(CLASS_NAMES))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder of both distributions; the wheel is built from the other one."""
    folder = tmp_path_factory.mktemp("built")
    builder = Environment(folder / "builder")
    builder.install("pip install build twine", folder)
    source = copy_source(folder / "source")
    builder.run(f"python -m build --outdir {folder / 'dist'} {source}", folder)
    files = " ".join(str(path) for path in (folder / "dist").iterdir())
    builder.run(f"twine check --strict {files}", folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Return an environment with the wheel; the other packages are those of the tests."""
    clean = Environment(tmp_path_factory.mktemp("clean") / "environment")
    clean.install(f"pip install --no-deps {wheel}", wheel.parent)
    # Python reads this .pth file, but no .pth files in the folder that it names: editable installs
    # there are therefore not visible.
    (clean.packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return clean


@pytest.mark.slow
def test_the_wheel_contains_only_the_package(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in files if ".dist-info/" not in n) == sorted(tracked("modelstock_jax"))
    assert "modelstock_jax/py.typed" in files


@pytest.mark.slow
def test_the_source_distribution_contains_the_programs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "launch.py"}
    for folder in ("modelstock_jax", "configs", "studies", "examples"):
        expected |= set(tracked(folder))
    assert not expected - names


@pytest.mark.slow
def test_an_installed_copy_works_outside_the_repository(installed, tmp_path):
    version = f"modelstock {modelstock_jax.__version__}"
    assert installed.run("modelstock --version", tmp_path).strip() == version
    check_merge(
        installed, "python -m modelstock_jax merge BASE FT1 FT2 --out DIR", tmp_path, tmp_path
    )
    (tmp_path / "program.py").write_text(PROGRAM)
    output = installed.run("python -P program.py", tmp_path)
    assert output.split() == ["0.5", "24", "1000"]


@pytest.mark.slow
def test_the_metadata_names_extras_script_and_license(wheel):
    files = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in files.namelist() if ".dist-info/" in name}
    metadata = files.read(f"{info}/METADATA").decode()
    assert f"Version: {modelstock_jax.__version__}\n" in metadata
    for extra in ("jax", "train", "cpu", "cuda12", "cuda13", "tpu", "test", "parity", "docs"):
        assert f"Provides-Extra: {extra}\n" in metadata, extra
    assert "modelstock = " in files.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in files.namelist()
    (python,) = re.findall("^Requires-Python: (.*)$", metadata, re.MULTILINE)
    assert set(python.split(",")) == {">=3.11", "<3.13"}
