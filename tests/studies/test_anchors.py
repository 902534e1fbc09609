"""What a study starts from, by name."""

from __future__ import annotations

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from configs import glyphs
from modelstock_jax.data import benchmark
from modelstock_jax.errors import UserError
from studies import run_store
from studies.bench import StudyContext
from studies.ledger import Ledger
from studies.run_store import opener


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
def test_a_mistake_is_seen_before_data_is_opened(name, data_name, message):
    with pytest.raises(UserError, match=message):
        opener(config_of(name, data_name))


def test_an_option_that_a_run_would_refuse_is_refused_first(tmp_path):
    config = config_of("runs/none")
    config.log_every_steps = 0
    with pytest.raises(UserError, match="log_every .*0"):
        StudyContext(config, tmp_path, Ledger(tmp_path / "measured.jsonl"))


def test_a_tower_is_known_before_it_is_trained(tmp_path, monkeypatch, data):
    """A study whose lines are all there needs its name alone."""
    monkeypatch.setattr(run_store, "_pretrain", pytest.fail)

    def fingerprint(name="tower:resnet", **options):
        config = config_of(name)
        config.update_from_flattened_dict(options)
        return StudyContext(config, tmp_path, Ledger(tmp_path / "measured.jsonl"), data).fingerprint

    plain = fingerprint()
    assert len(plain) == 16 and fingerprint() == plain
    assert fingerprint(seed=3, gradient_accumulation_steps=2) == plain  # It is the same tower.
    others = [fingerprint("tower:convnext"), fingerprint(label_smoothing=0.1)]
    monkeypatch.setattr(run_store, "NUM_IMAGES", 256)
    others.append(fingerprint())
    assert len({plain, *others}) == 4
    assert not (tmp_path / "towers").exists()


@pytest.mark.slow
def test_a_tower_is_pretrained_once(tmp_path, monkeypatch, data):
    monkeypatch.setattr(run_store, "NUM_IMAGES", 256)
    monkeypatch.setattr(run_store, "RECIPE", run_store.RECIPE | {"epochs": 2, "batch_size": 128})
    config = config_of("tower:hybrid")
    anchor = opener(config)(data, tmp_path)
    first = anchor.load()
    assert anchor.load() is first and first.fingerprint == anchor.outline.fingerprint
    chex.assert_trees_all_equal_shapes_and_dtypes(first.params, anchor.outline.params)
    start = run_store.tower.init("hybrid", 62, jax.random.key(0))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first.params, start)
    assert min(jax.tree.leaves(moved)) > 0
    again = opener(config)(replace(data, train=None), tmp_path).load()  # Nothing to train on.
    chex.assert_trees_all_equal(again.params, first.params)
    images = first.normalize(data.test.images[:4])
    assert np.isfinite(first.apply(first.params, images)).all()
