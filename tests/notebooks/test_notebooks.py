"""Each notebook runs from top to bottom: here on a CLIP of one block and a world of few images."""

from __future__ import annotations

import re
import sys
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest

from modelstock_jax.data import glyphs
from tests.experiment.small_run import save_anchor
from tests.notebooks.cells import run

# One mesh and one batch for all: a program that one notebook compiled serves the others.
TINY = {
    "batch_size": 32,
    "epochs": 1,
    "checkpoint.every": 100,
    "data.shifts": ("v2", "sketch"),
    "evaluation.batch_size": 64,
    "evaluation.wise_ft_alphas": (0.5,),
    "mesh.replica": 1,
    "mesh.data": 1,
}


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """A notebook goes to the repository's root, and draws."""
    monkeypatch.chdir(".")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    return str(save_anchor(tmp_path_factory.mktemp("anchor") / "clip"))


@pytest.fixture
def _small_world(monkeypatch):
    small = partial(glyphs.world, train_size=64, validation_size=62, test_size=62, shift_size=62)
    monkeypatch.setattr(glyphs, "world", small)


@pytest.mark.usefixtures("_small_world")
def test_quickstart(anchor, tmp_path, capsys):
    names = run("quickstart", PRETRAINED=anchor, WORKDIR=str(tmp_path / "run"), OVERRIDES=TINY)
    printed = capsys.readouterr().out
    assert "Model Stock, after training" in printed and "Model Stock, periodic" in printed
    assert {row["method"] for row in names["rows"]} >= {"zero_shot", "replica", "model_stock"}
    assert len(names["merged"].labels) == 62 and names["logits"].shape == (10, 62)
    assert re.search(r"^seen: .*\ntruth: .*upper", printed, re.MULTILINE)


@pytest.mark.usefixtures("_small_world")
def test_tpu_vitl14(anchor, tmp_path, capsys):
    """First as it stands: nothing to train on, and nothing is trained. Then on the glyphs."""
    glyph_world = TINY | {"data.name": "glyphs", "data.real": False, "merge.unit": "tensor",
                          "compute.dtype": "float32", "optimizer.warmup_steps": 1}
    small = {"WORKDIR": str(tmp_path / "run"), "PRETRAINED": anchor}
    names = run("tpu_vitl14", **small, TRAIN=True, OVERRIDES=glyph_world)
    printed = capsys.readouterr().out
    assert names["missing"] == [] and "peak of a step" in printed
    assert "| Model Stock, periodic" in printed and "head.safetensors" in printed

    where = str(tmp_path / "nowhere")
    names = run("tpu_vitl14", **small | {"WORKDIR": where}, DATA=where,
                OVERRIDES=glyph_world | {"data.name": "imagenet"})
    printed = capsys.readouterr().out
    assert "not training: data.root=" in printed and "no results yet" in printed


def test_geometry(anchor, tmp_path, capsys):
    names = run("geometry", PRETRAINED=anchor, MODELS=6, STEPS=2, BATCH=8, TRAIN_SIZE=62,
                FIGURES=str(tmp_path))
    printed = capsys.readouterr().out
    pictures = {path.stem.removeprefix("geometry_") for path in tmp_path.glob("*.png")}
    assert pictures == {"angles", "concentration", "approach", "sweep", "triangles", "ratio"}
    assert re.search(r"^Model Stock +predicted +\d+\.\d+ +measured +\d+\.\d+$", printed, re.M)
    # Equation 3 of the two-model report is what the sweep's stars stand at.
    row = names["found"][names["chosen"][0]]
    assert row["ratio"] == pytest.approx(names["ratio"](np.array(row["cosine"]), 2), rel=1e-6)


def test_merge_your_models(tmp_path, capsys):
    names = run("merge_your_models", OUT=str(tmp_path / "small" / "merged"))
    printed = capsys.readouterr()
    assert names["status"] == 1 and "error: " in printed.err and "Traceback" not in printed.err
    assert "undefined     model.embed_tokens.weight" in printed.out
    # Both doors round once to float32.
    for name, tensor in names["merged"].items():
        np.testing.assert_array_max_ulp(np.asarray(tensor), names["written"][name], 1)
    one, mean, stock = names["predicted"]
    assert stock < mean < one
