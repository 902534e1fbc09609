"""Each notebook runs from top to bottom, with a CLIP of one block and few images."""

from __future__ import annotations

import io
import re
import sys
from functools import partial

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from modelstock_jax.data import glyphs
from modelstock_jax.reporting.style import draw
from tests.experiment.small_run import save_anchor
from tests.notebooks.cells import run

# One mesh and one batch for all notebooks, so that compiled programs are reused.
TINY = {
    "batch_size": 32,
    "epochs": 1,
    "checkpoint.save_every_steps": 100,
    "data.shifts": ("v2", "sketch"),
    "evaluation.batch_size": 64,
    "evaluation.wise_ft_alphas": (0.5,),
    "mesh.replica": 1,
    "mesh.data": 1,
}


@pytest.fixture(autouse=True)
def _restore_process(monkeypatch):
    """Restore the directory and sys.path, and close figures, which a notebook changes."""
    monkeypatch.chdir(".")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    return str(save_anchor(tmp_path_factory.mktemp("anchor") / "clip"))


@pytest.fixture
def _small_benchmark(monkeypatch):
    small = partial(
        glyphs.make_sets, train_size=64, validation_size=62, test_size=62, shift_size=62
    )
    monkeypatch.setattr(glyphs, "make_sets", small)


@pytest.mark.slow  # Compiles a complete run.
@pytest.mark.usefixtures("_small_benchmark")
def test_quickstart(anchor, tmp_path, capsys):
    names = run("quickstart", PRETRAINED=anchor, WORKDIR=str(tmp_path / "run"), OVERRIDES=TINY)
    printed = capsys.readouterr().out
    assert "Model Stock, after training" in printed and "Model Stock, periodic" in printed
    assert {row["method"] for row in names["rows"]} >= {"zero_shot", "single_model", "model_stock"}
    assert len(names["merged"].labels) == 62 and names["logits"].shape == (10, 62)
    assert re.search(r"^seen: .*\ntruth: .*upper", printed, re.MULTILINE)


@pytest.mark.slow  # Compiles a complete run.
@pytest.mark.usefixtures("_small_benchmark")
def test_tpu_vitl14(anchor, tmp_path, capsys):
    """Trains on the synthetic benchmark; without data, it trains nothing."""
    synthetic = TINY | {
        "data.name": "glyphs",
        "data.real_labels": False,
        "merge.unit": "tensor",
        "compute.dtype": "float32",
        "optimizer.warmup_steps": 1,
    }
    small = {"WORKDIR": str(tmp_path / "run"), "PRETRAINED": anchor}
    names = run("tpu_vitl14", **small, TRAIN=True, OVERRIDES=synthetic)
    printed = capsys.readouterr().out
    assert names["missing"] == [] and "peak of a step" in printed
    assert "| Model Stock, periodic" in printed and "head.safetensors" in printed

    missing = str(tmp_path / "nowhere")
    names = run(
        "tpu_vitl14",
        **small | {"WORKDIR": missing},
        DATA=missing,
        OVERRIDES=synthetic | {"data.name": "imagenet"},
    )
    printed = capsys.readouterr().out
    assert "not training: data.root=" in printed and "no results yet" in printed


FIGURES = {"angles", "concentration", "approach", "sweep", "triangles", "ratio"}
DISTANCES = re.compile(r"^(.+?) +predicted +([\d.]+) +measured +([\d.]+)$", re.MULTILINE)


@pytest.mark.slow  # Trains six models; every shape is merged by a separate program.
def test_geometry(anchor, tmp_path, capsys):
    run(
        "geometry",
        PRETRAINED=anchor,
        MODELS=6,
        STEPS=2,
        BATCH=8,
        TRAIN_SIZE=62,
        FIGURES=str(tmp_path),
    )
    assert {path.stem.removeprefix("geometry_") for path in tmp_path.glob("*.png")} == FIGURES
    assert len(DISTANCES.findall(capsys.readouterr().out)) == 4


def drawn_models(names):
    """Return models instead of training: a common update plus noise in three kernels."""
    rng, count = np.random.default_rng(0), names["MODELS"]
    signals = {"fc1": 0.5, "fc2": 1.0, "fc3": 2.0}
    flat = {
        name: (s * rng.standard_normal((96, 96)) + rng.standard_normal((count, 96, 96)))
        for name, s in signals.items()
    }
    models = {name: {"kernel": (0.1 * d).astype(np.float32)} for name, d in flat.items()}
    tree = {"image_tower": {"blocks": {"block_00": {"mlp": models}}}}
    anchor = jax.tree.map(lambda w: np.zeros_like(w[0]), tree)
    return {"jax": jax, "np": np, "models": tree, "anchor": anchor}


def test_geometry_of_models_whose_center_is_known(tmp_path, capsys):
    line = "checkpoint = open_pretrained(PRETRAINED)"
    names = run("geometry", {line: drawn_models}, FIGURES=str(tmp_path))
    printed = capsys.readouterr().out
    assert {path.stem.removeprefix("geometry_") for path in tmp_path.glob("*.png")} == FIGURES
    # cos = s^2 / (s^2 + 1), t = 2 cos / (1 + cos); 9,216 elements give cosines to about 0.01.
    ratios = [names["found"][k]["ratio"] for k in names["chosen"]]
    assert ratios == pytest.approx([8 / 9, 2 / 3, 1 / 3], abs=0.03)
    distances = {name: (float(a), float(b)) for name, a, b in DISTANCES.findall(printed)}
    assert list(distances) == ["one model", "their mean", "Model Stock", "the anchor"]
    for predicted, measured in distances.values():
        assert measured == pytest.approx(predicted, rel=0.03)  # Accuracy of the cosines, as above.
    assert re.search(r"\(ii\) .* (89|90)\.\d+°", printed)


def test_notebook_shows_figures():
    """As the last value of a cell, without pyplot, by IPython's representation methods."""
    shown = draw(lambda figure: figure.subplots().plot([0, 1]), (2, 1), None)._repr_png_()
    assert shown.startswith(b"\x89PNG") and Image.open(io.BytesIO(shown)).size == (200, 100)


def test_merge_your_models(tmp_path, capsys):
    names = run("merge_your_models", OUT=str(tmp_path / "small" / "merged"))
    printed = capsys.readouterr()
    assert names["status"] == 1 and "error: " in printed.err and "Traceback" not in printed.err
    assert "unchanged     model.embed_tokens.weight" in printed.out
    # Both implementations round once to float32, half of 2^-23; ratios of the command line are
    # accurate to 1e-6, and updates are below 0.1 here.
    for name, tensor in names["merged"].items():
        np.testing.assert_allclose(tensor, names["written"][name], rtol=2.0**-23, atol=1e-7)
    single, mean, merged = names["predicted"]
    assert merged < mean < single
