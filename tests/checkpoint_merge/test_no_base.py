"""Merges without a base, on the command line and in recipes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modelstock_jax.registry import COMMANDS
from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge.engine import SHAPES, models, numbers, save
from tests.checkpoint_merge.test_methods import slerp

WITHOUT = [method for method in COMMANDS.values() if not method.needs_base]
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def paths(tmp_path):
    """Three models; none of them is a base."""
    return save(tmp_path, models(number=2))


def merged(say, tmp_path, *arguments):
    out = tmp_path / "out"
    result = say("merge", "--no-base", *arguments, "--out", out, "--overwrite")
    assert result.status == 0, result.err
    report = json.loads((out / "merge_report.json").read_text())
    card = (out / "README.md").read_text()
    assert report["base"] is None and report["ratios"] == {}
    assert all(row["ratio"] is row["angle"] is None and not row["norms"] for row in report["units"])
    assert not (out / "angles.png").exists() and "This method has no ratio." in card
    assert "fine-tune" not in result.out + card.split("## Ratios")[0]
    return TensorFiles(out)


def test_means(say, tmp_path, paths):
    inputs = [numbers(TensorFiles(path)[NAME]) for path in paths]
    out = merged(say, tmp_path, *paths, "--method", "uniform-mean")
    np.testing.assert_allclose(out[NAME], np.mean(inputs, axis=0), rtol=2**-23)
    out = merged(say, tmp_path, *paths, "--method", "linear", "--weights", "1,2,1")
    expected = np.average(inputs, axis=0, weights=(1, 2, 1))
    np.testing.assert_allclose(out[NAME], expected, rtol=2**-23, atol=1e-8)
    flags = ("--method", "linear", "--weights", "0.5,0.25,1", "--no-normalize")
    out = merged(say, tmp_path, *paths, *flags)
    expected = 0.5 * inputs[0] + 0.25 * inputs[1] + inputs[2]
    np.testing.assert_allclose(out[NAME], expected, rtol=2**-23, atol=1e-8)


def test_spherical_means(say, tmp_path, paths):
    first, second = (numbers(TensorFiles(path)[NAME]) for path in paths[:2])
    expected = slerp(first, second, 0.25).reshape(first.shape)
    out = merged(say, tmp_path, *paths[:2], "--method", "slerp", "--t", "0.25")
    np.testing.assert_allclose(out[NAME], expected, rtol=1e-5, atol=1e-6)
    out = merged(say, tmp_path, *paths[:2], "--method", "nuslerp", "--weights", "3,1")
    np.testing.assert_allclose(out[NAME], expected, rtol=1e-5, atol=1e-6)
    half = slerp(first / np.linalg.norm(first), second / np.linalg.norm(second), 0.5)
    half = half.reshape(first.shape) * (np.linalg.norm(first) + np.linalg.norm(second)) / 2
    for method in ("multislerp", "karcher"):
        out = merged(say, tmp_path, *paths[:2], "--method", method)
        np.testing.assert_allclose(out[NAME], half, rtol=1e-4, atol=1e-5)


def test_passthrough_copies_or_scales(say, tmp_path, paths):
    model = TensorFiles(paths[1])
    out = merged(say, tmp_path, paths[1], "--method", "passthrough")
    for name in SHAPES:
        np.testing.assert_array_equal(out[name], model[name])
    # With a base too: w0 + (w - w0) would not have the bits of w.
    result = say("merge", *paths[:2], "--method", "passthrough", "--out", tmp_path / "anchored")
    assert result.status == 0, result.err
    for name in SHAPES:
        np.testing.assert_array_equal(TensorFiles(tmp_path / "anchored")[name], model[name])
    out = merged(say, tmp_path, paths[1], "--method", "passthrough", "--scale", "0.5")
    for name in SHAPES:
        np.testing.assert_array_equal(out[name], model[name] / 2)


@pytest.mark.parametrize("method", [m for m in COMMANDS.values() if m.needs_base])
def test_methods_that_need_a_base(say, tmp_path, paths, method):
    flags = [flag for name in method.required for flag in (f"--{name}", "0.5")]
    number = method.max_models or 3
    result = say("merge", "--no-base", *paths[:number], "--out", tmp_path / "out",
                 "--method", method.command, *flags)  # fmt: skip
    assert result.status == 1 and "requires a base" in result.err and "karcher" in result.err
    assert not (tmp_path / "out").exists()


def test_a_recipe_says_itself_whether_there_is_a_base(say, tmp_path):
    result = say("merge", "--no-base", "--recipe", "r.yml", "--out", tmp_path / "out")
    assert result.status == 1 and "--no-base" in result.err and "base_model" in result.err
    result = say("merge", "--no-base", "--out", tmp_path / "out")
    assert result.status == 1 and "M1 M2" in result.err


def test_a_dry_run_and_json(say, tmp_path, paths):
    result = say("merge", "--no-base", *paths, "--method", "karcher", "--dry-run", "--json")
    plan = json.loads(result.out)
    assert plan["base"] is None and len(plan["models"]) == 3
