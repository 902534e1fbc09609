"""A short pretraining, and the bundled models of the full pretraining."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modelstock_jax.data import glyphs
from modelstock_jax.errors import UserError
from modelstock_jax.evaluation import make_evaluator
from modelstock_jax.experiment.setup import BUNDLED, open_pretrained
from modelstock_jax.models.model import classifier
from modelstock_jax.models.zero_shot import zero_shot_head
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.training.sharding import make_mesh
from tests.experiment import small_run

BUNDLED_CLIP = BUNDLED["glyph-clip"]


def pretrain(directory, num_steps, **more):
    """Pretrain for a few steps; return the losses and the model directory."""
    code, output = small_run.finish(
        "--config=configs/glyph_pretrain.py",
        f"--workdir={directory}",
        f"--config.pretrain.num_steps={num_steps}",
        "--config.batch_size=64",
        f"--config.optimizer.warmup_steps={min(20, num_steps // 2)}",
        "--config.log_every_steps=1",
        **more,
    )
    assert code == 0, output
    lines = (directory / "runs/seed_0/pretrain/metrics.jsonl").read_text().splitlines()
    loss = np.array([json.loads(line)["train/loss/replica_0"] for line in lines])
    assert len(loss) == num_steps
    return loss, directory / "model"


@pytest.mark.slow
def test_short_pretraining_learns(tmp_path):
    # The steps take longer than their compilation.
    loss, _ = pretrain(tmp_path, 96, environment={"XLA_FLAGS": ""})
    # Chance is ln 64 = 4.16; the loss of a batch varies by about 0.1.
    assert loss[:5].mean() > 4.0
    assert loss[-10:].mean() < loss[:5].mean() - 0.4


def test_pretraining_saves_the_same_files(tmp_path):
    loss, directory = pretrain(tmp_path, 4)
    assert ((3 < loss) & (loss < 6)).all()  # Chance is ln 64 = 4.16.
    assert {p.name for p in directory.iterdir()} == {p.name for p in BUNDLED_CLIP.iterdir()}
    files, bundled = TensorFiles(directory), TensorFiles(BUNDLED_CLIP)
    assert {n: (files.shape(n), files.dtype(n)) for n in files} == {
        n: (bundled.shape(n), bundled.dtype(n)) for n in bundled
    }
    config = [json.loads((d / "config.json").read_text()) for d in (directory, BUNDLED_CLIP)]
    assert config[0] == config[1]


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_model_is_small_and_accurate(name):
    assert (BUNDLED[name] / "model.safetensors").stat().st_size <= 3e6
    checkpoint = open_pretrained(name)
    head = zero_shot_head(checkpoint, glyphs.CLASS_NAMES, glyphs.TEMPLATES)
    evaluate = make_evaluator(
        classifier(checkpoint.config),
        checkpoint.preprocessor,
        make_mesh(1, 1, num_replicas=1, batch_size=500),
        500,
    )
    sets = glyphs.make_sets(train_size=62, validation_size=1000, test_size=62, shift_size=62)
    params = {"image_tower": checkpoint.params["image_tower"], "head": head}
    accuracy = evaluate(params, [sets.validation])["validation"]
    assert accuracy > 60, accuracy  # Chance is 1.6; the prototype of the benchmark reached 60.


def test_error_for_an_unknown_name():
    with pytest.raises(UserError, match="glyph-klip"):
        open_pretrained("glyph-klip")
