"""Where mergekit 0.1.5 is correct, the same recipe gives the same weights.

The models are small float32 tensors with clear angles, for which its arithmetic is accurate. Its
outputs are stored (`mergekit_reference.py` generates them); `test_faults.py` lists the cases in
which it is wrong. The slow test runs an installed mergekit if MERGEKIT_PYTHON names its Python
interpreter.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge import mergekit_reference as reference


@pytest.fixture(scope="module")
def stored():
    return reference.load()


@pytest.fixture(scope="module")
def folder(stored, tmp_path_factory):
    path = tmp_path_factory.mktemp("mergekit")
    reference.write_inputs(path, stored)
    return path


@pytest.mark.parametrize("name", reference.RECIPES)
def test_a_recipe_gives_the_weights_of_mergekit(name, stored, folder, capsys):
    recipe = reference.write_recipe(folder, name)
    assert main(["merge", "--recipe", str(recipe), "--out", str(folder / f"out_{name}")]) == 0
    check(TensorFiles(folder / f"out_{name}"), stored[name], stored, CHANGED.get(name, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.RECIPES)
def test_a_recipe_gives_the_weights_of_an_installed_mergekit(name, stored, folder, capsys):
    """Without MERGEKIT_PYTHON, compare with the stored outputs, but write shards."""
    is_installed = "MERGEKIT_PYTHON" in os.environ
    expected = reference.run_mergekit(folder, name) if is_installed else stored[name]
    out = folder / f"live_{name}"
    recipe = str(reference.write_recipe(folder, name))
    assert main(["merge", "--recipe", recipe, "--out", str(out), "--max-shard-size", "4KB"]) == 0
    check(TensorFiles(out), expected, stored, CHANGED.get(name, 0.3))


# Arcee Fusion leaves most elements as they are in the base.
CHANGED = {"arcee_fusion": 0.03}


def check(merged, reference_weights, stored, changed):
    """Check that two outputs are equal up to the rounding of float32.

    A fraction `changed` of the elements must be far from the base.
    """
    assert set(merged) == set(reference_weights)
    for tensor, expected in reference_weights.items():
        anchor = stored["base"][tensor]
        update = np.max([np.abs(stored[m][tensor] - anchor) for m in reference.MODELS[1:]])
        # The float32 of mergekit: a few roundings of a weight, and a ratio accurate to 2e-6.
        allowed = 2 * np.spacing(np.maximum(abs(anchor), abs(expected))) + 2e-6 * update
        error = np.abs(merged[tensor].astype(np.float64) - expected)
        assert (error <= allowed).all(), (tensor, (error / allowed).max())
        # Compared with this tolerance, the output is far from the base.
        assert (np.abs(expected - anchor) > 100 * allowed).mean() > changed
