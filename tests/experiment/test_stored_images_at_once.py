"""The choice of the learning rate and --mode=eval on stored images, in this process."""

from __future__ import annotations

import json

import pytest

from configs import folder
from modelstock_jax.experiment import evaluate_checkpoint
from modelstock_jax.experiment.run import choose_learning_rate
from modelstock_jax.reporting.timeline import Timeline
from tests.data.made_images import write_folders
from tests.experiment import small_run


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A dataset of three classes with eight images each, and one shift."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in ("train", "val", "test"):
        write_folders(tmp_path / "mine" / split, ["a", "b", "c"], 8)
    write_folders(tmp_path / "mine/shifts/sketch", ["a", "c"], 3)
    config = folder.get_config()
    config.pretrained = str(small_run.save_anchor(tmp_path / "clip"))
    config.data.root = str(tmp_path / "mine")
    config.batch_size, config.epochs, config.evaluation.batch_size = 8, 1, 8
    config.compare = False
    return config


@pytest.mark.slow
def test_learning_rate_is_chosen_on_stored_images(config, tmp_path, capsys):
    config.search.learning_rates = (1e-5,)
    assert choose_learning_rate(config, tmp_path / "run", Timeline(None)) == 1e-5
    document = json.loads((tmp_path / "run/learning_rate.json").read_text())
    (row,) = document["rows"]
    assert document["best"] == row["learning_rate"] == 1e-5
    # 24 validation images, each counted once.
    assert [round(x * 24 / 100, 9) % 1 for x in row["validation"]] == [0, 0]
    assert "<- best" in capsys.readouterr().out


def test_images_resized_on_the_device_have_the_same_accuracy(config):
    host = evaluate_checkpoint(config, config.pretrained)
    config.data.resize_on = "device"
    device = evaluate_checkpoint(config, config.pretrained)
    # 1 gray level may change the class of one image: 24 test images, 6 shifted ones.
    assert abs(device["id"] - host["id"]) <= 100 / 24 + 1e-9
    assert abs(device["shifts"]["sketch"] - host["shifts"]["sketch"]) <= 100 / 6 + 1e-9


def test_eval_caches_the_head_and_shows_progress(config, tmp_path, capsys):
    row = evaluate_checkpoint(config, config.pretrained)
    first = capsys.readouterr().out
    assert "zero-shot head" in first and "evaluate  30/30 (100 %)" in first
    (head,) = (tmp_path / "cache/modelstock_jax/heads").glob("*.safetensors")
    assert evaluate_checkpoint(config, config.pretrained) == row
    again = capsys.readouterr().out
    assert "zero-shot head" not in again and "evaluate  30/30 (100 %)" in again
    assert row["shifts"].keys() == {"sketch"} and row["distance_to_anchor"] is None
    assert head.exists()
