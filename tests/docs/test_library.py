"""The code blocks of docs/library.md run; its table lists every function."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import modelstock_jax
from modelstock_jax.registry import FUNCTIONS
from tests.docs.blocks import ROOT, run_blocks

PAGE = ROOT / "docs/library.md"


@pytest.mark.slow  # some thirty merges of four tensors, compiled one by one
def test_every_block_runs_and_shows_what_the_text_says(capsys):
    ran = run_blocks(PAGE)
    printed = capsys.readouterr().out
    assert re.search(r"^head\.kernel \d+\.\d+ 0\.\d+ interpolated$", printed, re.MULTILINE)
    assert re.search(r"^\('head', 'head', 'hidden', 'hidden'\)$", printed, re.MULTILINE)
    assert re.search(r"^\(3,\)\n\(\)$", printed, re.MULTILINE)
    assert re.search(r"^\(2,\)\nDistances\(replica=\d", printed, re.MULTILINE)
    anchor = ran["pretrained"]
    for name in (
        "merged",
        "mean",
        "halfway",
        "added",
        "trimmed",
        "along_the_arc",
        "by_filter",
        "by_hand",
        "on_mesh",
        "next_start",
        "averaged",
        "dense",
        "random",
        "corner",
    ):
        assert jax.tree.structure(ran[name]) == jax.tree.structure(anchor), name
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(ran[name])), name
    jax.tree.map(np.testing.assert_array_equal, ran["on_mesh"], ran["merged"])
    assert ran["soup"].score >= max(t.own_score for t in ran["soup"].trials)
    assert ran["accuracy"](ran["merged"]) > ran["accuracy"](anchor) + 0.2
    trained = [
        ran["loss"](ran["twa_params"](ran["span"], c), ran["images"], ran["labels"])
        for c in (ran["twa_init"](ran["span"]), ran["coordinates"])
    ]
    assert trained[1] < trained[0]


def test_the_table_names_every_merge_of_the_package():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    named = set(re.findall(r"\| `(\w+)` \|$", "\n".join(rows), re.MULTILINE))
    assert all(callable(getattr(modelstock_jax, name)) for name in named)
    # A search and averages along one run, which are not merges of replicas.
    others = {"greedy_soup", "ema", "swa", "swad", "twa_span", "weighted_average"}
    assert named == others | FUNCTIONS.keys()
