"""A merge in training equals a merge of the exported files, for every merge unit."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import commands
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.merging import UNITS, model_stock, report
from modelstock_jax.models.checkpoint_io import load, save
from tests.models import small

HEADS = small.config().vision.num_attention_heads


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An anchor and two replicas, as pytrees and as directories in Hugging Face's format."""
    root, config = tmp_path_factory.mktemp("exported"), small.config()
    anchor = small.checkpoint(config)
    common = small.perturbed(config, seed=3)

    def moved(seed):
        own = small.perturbed(config, seed)
        return jax.tree.map(
            lambda w, c, o: (w + 1e-2 * (c - w) + 1e-2 * (o - w)).astype(np.float32),
            anchor.params, common, own,
        )  # fmt: skip

    trees = [anchor.params, moved(1), moved(2)]
    paths = []
    for i, tree in enumerate(trees):
        model = small.checkpoint(config, root / "none")
        model.params.update(tree)
        paths.append(str(save(root / str(i), model)))
    return trees, paths


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def merged_in_training(trees, unit):
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees[1:])
    return model_stock(trees[0], stacked, unit=unit, num_heads=HEADS)


def assert_same_merge(trees, in_training, from_files):
    """Compare two merges of an anchor and two replicas; all five are trees of one structure."""
    in_training, from_files = flat(in_training), flat(from_files)
    anchor, first, second = map(flat, trees)
    assert in_training.keys() == from_files.keys()
    for path in in_training:
        w0 = np.float64(anchor[path])
        mean = np.float64(first[path]) / 2 + np.float64(second[path]) / 2
        # Each merge rounds once to float32, and the ratios differ by at most 1e-6.
        maximum = np.maximum(np.abs(anchor[path]), np.abs(in_training[path]))
        allowed = np.spacing(maximum).astype(np.float64) + 1e-6 * np.abs(mean - w0)
        error = np.abs(np.float64(from_files[path]) - np.float64(in_training[path]))
        assert (error <= allowed).all(), (path, (error - allowed).max())


@pytest.mark.parametrize("unit", [
    "tensor",
    *(pytest.param(unit, marks=pytest.mark.slow) for unit in UNITS if unit != "tensor"),
])  # fmt: skip
def test_training_and_command_line_agree(exported, tmp_path, monkeypatch, unit):
    trees, paths = exported
    monkeypatch.setattr(commands.PlotProcess, "finish", lambda plot: None)
    out = tmp_path / "out"
    assert main(["merge", *paths, "--out", str(out), "--unit", unit]) == 0
    merged, stats = merged_in_training(trees, unit)
    assert_same_merge(trees, jax.device_get(merged), load(out).params)
    rows = json.loads((out / "merge_report.json").read_text())["units"]
    # The names differ, the values do not.
    for key in ("ratio", "cosine"):
        actual, expected = (
            sorted(row[key] for row in table if row[key] is not None)
            for table in (rows, report(stats))
        )
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
