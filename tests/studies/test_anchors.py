"""The anchors of a study, by name."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from configs import glyphs
from modelstock_jax.data import benchmark
from modelstock_jax.errors import UserError
from studies import image_runs
from studies.image_context import ImageContext
from studies.image_runs import anchor_opener
from studies.ledger import Ledger


def config_of(name, data="glyphs"):
    config = glyphs.get_config()
    config.pretrained, config.data.name = name, data
    return config


@pytest.fixture(scope="module")
def data():
    config = glyphs.get_config().data
    config.shifts = ("v2",)
    return benchmark.load(config)


@pytest.mark.parametrize(
    ("name", "data_name", "message"),
    [
        ("tower:resnt", "glyphs", "tower:resnt: .*vit, hybrid, resnet, convnext"),
        ("tower:resnet", "imagenet", "glyphs.*CLIP"),
        ("runs/none", "glyphs", "runs/none"),
    ],
)
def test_a_wrong_anchor_is_an_error_before_data_is_opened(name, data_name, message):
    with pytest.raises(UserError, match=message):
        anchor_opener(config_of(name, data_name))


def test_a_wrong_option_is_an_error_before_anything_runs(tmp_path):
    config = config_of("runs/none")
    config.log_every_steps = 0
    with pytest.raises(UserError, match="log_every_steps .*0"):
        ImageContext(config, tmp_path, Ledger(tmp_path / "measured.jsonl"))


def test_the_checksum_of_a_tower_needs_no_training(tmp_path, monkeypatch, data):
    """A study whose measurements are all in the ledger does not train its tower."""
    monkeypatch.setattr(image_runs, "_pretrain", pytest.fail)

    def checksum(name="tower:resnet", **options):
        config = config_of(name)
        config.update_from_flattened_dict(options)
        return ImageContext(config, tmp_path, Ledger(tmp_path / "measured.jsonl"), data).checksum

    plain = checksum()
    assert len(plain) == 16 and checksum() == plain
    assert checksum(seed=3, gradient_accumulation_steps=2) == plain, "the tower is the same"
    others = [checksum("tower:convnext"), checksum(label_smoothing=0.1)]
    monkeypatch.setattr(image_runs, "NUM_IMAGES", 256)
    others.append(checksum())
    assert len({plain, *others}) == 4
    assert not (tmp_path / "towers").exists()


@pytest.mark.slow
def test_a_tower_is_pretrained_once(tmp_path, monkeypatch, data):
    monkeypatch.setattr(image_runs, "NUM_IMAGES", 256)
    monkeypatch.setattr(image_runs, "RECIPE", image_runs.RECIPE | {"epochs": 2, "batch_size": 128})
    config = config_of("tower:hybrid")
    anchor = anchor_opener(config)(data, tmp_path)
    first = anchor.load()
    assert anchor.load() is first and first.checksum == anchor.outline.checksum
    chex.assert_trees_all_equal_shapes_and_dtypes(first.params, anchor.outline.params)
    start = image_runs.towers.init("hybrid", 62, jax.random.key(0))
    changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first.params, start)
    assert min(jax.tree.leaves(changes)) > 0
    # Without training data, the tower is read from its file.
    again = anchor_opener(config)(replace(data, train=None), tmp_path).load()
    chex.assert_trees_all_equal(again.params, first.params)
    images = first.normalize(data.test.images[:4])
    assert np.isfinite(first.apply(first.params, images)).all()
