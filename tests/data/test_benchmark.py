"""A run imports only the data modules of the dataset in its config."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# The options import none of the packages that `launch.py --help` must not wait for.
OPTIONS = """
import sys
from configs import default
data = default.get_config().data
assert not {"numpy", "jax"} & sys.modules.keys()
"""
OPEN = """
from modelstock_jax.data import benchmark
from modelstock_jax.errors import UserError
data.name, data.root = sys.argv[1:]
data.shifts = ("none",)
try:
    benchmark.load(data)
    sys.exit("opened")
except UserError:  # Raised by the module of the dataset, before anything is rendered.
    pass
print(*(name for name in ("glyphs", "imagenet", "cifar", "custom_dataset", "records")
        if f"modelstock_jax.data.{name}" in sys.modules))
"""


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("glyphs", "glyphs"),
        ("imagenet", "imagenet records"),
        ("cifar10", "cifar records"),
        ("cifar100", "cifar records"),
        ("folder", "custom_dataset records"),
    ],
)
def test_a_run_imports_only_the_modules_of_its_dataset(tmp_path, name, modules):
    done = subprocess.run(
        [sys.executable, "-c", OPTIONS + OPEN, name, str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == modules.split()
