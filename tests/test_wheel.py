"""The wheel, built from the files in git and installed in a separate environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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


def tracked(folder: str) -> list[str]:
    """Return the files of the repository in a folder, including new files that are not ignored."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    found = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the wheel and an environment with it; the other packages are those of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source, clean = folder / "source", folder / "clean"
    for name in tracked("."):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    venv.create(clean, with_pip=True)
    pip = [str(clean / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", wheel], check=True)
    (packages,) = clean.glob("lib/python*/site-packages")
    # Python reads this .pth file, but no .pth files in the folder that it names: editable installs
    # there are therefore not visible.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return wheel, clean


def run(clean: Path, folder: Path, program: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    completed = subprocess.run(
        [clean / "bin" / program, *arguments], cwd=folder, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.mark.slow
def test_the_wheel_contains_only_the_package(installed):
    wheel, _ = installed
    files = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in files if ".dist-info/" not in n) == sorted(tracked("modelstock_jax"))


@pytest.mark.slow
def test_an_installed_copy_works_outside_the_repository(installed, tmp_path):
    _, clean = installed
    assert "merge" in run(clean, tmp_path, "modelstock", "--help")
    assert run(clean, tmp_path, "python", "-c", PROGRAM).split() == ["0.5", "24", "1000"]
    assert "--out" in run(clean, tmp_path, "python", "-m", "modelstock_jax", "merge", "--help")


@pytest.mark.slow
def test_the_metadata_names_extras_script_and_license(installed):
    wheel, _ = installed
    files = zipfile.ZipFile(wheel)
    (info,) = {name.split("/")[0] for name in files.namelist() if ".dist-info/" in name}
    metadata = files.read(f"{info}/METADATA").decode()
    for extra in ("cpu", "cuda12", "cuda13", "tpu", "test", "parity"):
        assert f"Provides-Extra: {extra}\n" in metadata, extra
    assert "modelstock = " in files.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in files.namelist()
    assert "Requires-Python: >=3.11\n" in metadata
