"""What a study starts from, by name."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from configs import glyphs
from modelstock_jax.data import benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.studies.work import anchors
from modelstock_jax.studies.work.anchors import opener
from modelstock_jax.studies.work.bench import Bench
from modelstock_jax.studies.work.ledger import Ledger


def config_of(name, data="glyphs"):
    config = glyphs.get_config()
    config.pretrained, config.data.name = name, data
    return config


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tower:resnt", "glyphs", "tower:resnt: the towers are vit, hybrid, resnet, convnext"),
        ("tower:resnet", "imagenet", "towers are pretrained on the glyphs.*needs a CLIP"),
        ("runs/none", "glyphs", "runs/none"),
    ],
)
def test_a_mistake_is_seen_before_data_is_opened(name, data, message):
    with pytest.raises(UserError, match=message):
        opener(config_of(name, data))


def test_an_option_that_a_run_would_refuse_is_refused_first(tmp_path):
    config = config_of("runs/none")
    config.log_every = 0
    with pytest.raises(UserError, match="log_every is 0; it must be at least 1"):
        Bench(config, tmp_path, Ledger(tmp_path / "measured.jsonl"))


@pytest.mark.slow
def test_a_tower_is_pretrained_once(tmp_path, monkeypatch):
    monkeypatch.setattr(anchors, "NUM_IMAGES", 256)
    monkeypatch.setattr(anchors, "RECIPE", anchors.RECIPE | {"epochs": 2, "batch_size": 128})
    config = config_of("tower:hybrid")
    config.data.shifts = ("v2",)
    data = benchmark.load(config.data)
    first = opener(config)(data, tmp_path)
    start = anchors.tower.init("hybrid", 62, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first.params, start)
    assert min(jax.tree.leaves(moved)) > 0
    path = tmp_path / "towers" / "hybrid" / "model.safetensors"
    before = path.stat().st_mtime_ns
    again = opener(config)(replace(data, train=None), tmp_path)
    assert path.stat().st_mtime_ns == before
    assert again.fingerprint == first.fingerprint and first.fingerprint
    images = first.normalize(data.test.images[:4])
    assert np.isfinite(first.apply(first.params, images)).all()
