"""The zero-shot head of a run: progress, cache, and class names and prompts of the user."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from modelstock_jax.data import benchmark, glyphs
from modelstock_jax.data.glyphs import CLASS_NAMES, TEMPLATES
from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io, zero_shot
from modelstock_jax.reporting.tables import make_row
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.classifier import anchor_classifier
from tests.experiment import small_run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_io.load(small_run.save_anchor(tmp_path_factory.mktemp("clip") / "clip"))


@pytest.fixture
def passes(monkeypatch):
    """Shapes of the token ids that went through the text tower."""
    shapes, embed = [], zero_shot._embed

    def spy(config, params, ids, compute):
        shapes.append(ids.shape)
        return embed(config, params, ids, compute)

    monkeypatch.setattr(zero_shot, "_embed", spy)
    return shapes


@pytest.fixture
def data(monkeypatch):
    """Opens the synthetic benchmark without rendering it."""
    sets = SimpleNamespace(train=None, validation=None, test=None, shifts={})
    monkeypatch.setattr(glyphs, "make_sets", lambda **_: sets)
    return lambda config: benchmark.load(config.data)


def test_run_computes_its_head_once(checkpoint, data, passes, tmp_path, capsys):
    config = default.get_config()
    first = anchor_classifier(config, checkpoint, data(config), tmp_path / "heads")
    count = len(CLASS_NAMES) * len(TEMPLATES)
    assert f"zero-shot head  {count}/{count} (100 %)" in capsys.readouterr().out
    before = list(passes)
    second = anchor_classifier(config, checkpoint, data(config), tmp_path / "heads")
    assert capsys.readouterr().out == "" and before and passes == before
    np.testing.assert_array_equal(first.params["head"]["kernel"], second.params["head"]["kernel"])
    # An evaluation has no run directory.
    anchor_classifier(config, checkpoint, data(config))
    assert len(passes) == 2 * len(before)


def test_context_head_is_computed_once(checkpoint, data, passes, tmp_path, capsys):
    config = default.get_config()
    config.objective.name = "car_ft"
    opened = data(config)

    def contexts(heads):
        return anchor_classifier(config, checkpoint, opened, heads).text.contexts

    first, count = contexts(tmp_path), len(CLASS_NAMES) * len(TEMPLATES)
    assert f"context head  {count}/{count} (100 %)" in capsys.readouterr().out
    count_before, files = len(passes), sorted(path.name for path in tmp_path.iterdir())
    assert [name.rpartition("_")[0] for name in files] == ["context_head", "zero_shot_head"]
    second = contexts(tmp_path)
    assert capsys.readouterr().out == "" and len(passes) == count_before
    assert first["kernel"].shape == (8, len(TEMPLATES))
    np.testing.assert_array_equal(first["kernel"], second["kernel"])


def test_merged_flyp_model_is_evaluated_with_the_head_of_its_text_tower(
    checkpoint, data, monkeypatch, tmp_path
):
    config = default.get_config()
    config.objective.name = "flyp"
    config.pretrained = str(checkpoint.directory)
    (tmp_path / "prompts.json").write_text('["{} alone"]')
    config.data.templates = str(tmp_path / "prompts.json")
    anchor = anchor_classifier(config, checkpoint, data(config))
    tuned = jax.tree.map(lambda x: jnp.asarray(x) * 1.1, anchor.initial_params(config))
    with Checkpoints(tmp_path / "merged", keep=1) as merges:
        merges.save(3, tuned)
    evaluated = []

    def row(method, params, **details):
        evaluated.append(params)
        return make_row(method, id=0.0, shifts={})

    evaluator = SimpleNamespace(num_images=1, row=row)
    run = importlib.import_module(
        "modelstock_jax.experiment.run"
    )  # The package also exports a function `run`.
    monkeypatch.setattr(run, "ModelEvaluator", lambda *_: evaluator)
    monkeypatch.setattr(run, "_heads", lambda: None)
    run.evaluate_checkpoint(config, str(tmp_path / "merged/3"))
    (evaluated_params,) = evaluated
    chex.assert_trees_all_equal(evaluated_params, anchor.classify(tuned))


def test_class_names_and_prompts_of_the_user(checkpoint, data, passes, tmp_path):
    config = default.get_config()
    before = anchor_classifier(config, checkpoint, data(config), tmp_path).params["head"]["kernel"]
    names = [f"the {name}" for name in CLASS_NAMES]
    (tmp_path / "names.txt").write_text("\n".join(names))
    (tmp_path / "prompts.json").write_text('["{} alone"]')
    config.data.class_names = str(tmp_path / "names.txt")
    config.data.templates = str(tmp_path / "prompts.json")
    opened = data(config)
    assert opened.class_names == tuple(names) and opened.templates == ("{} alone",)
    after = anchor_classifier(config, checkpoint, opened, tmp_path).params["head"]["kernel"]
    assert after.shape == before.shape and np.abs(after - before).max() > 0.1
    (tmp_path / "names.txt").write_text("\n".join(names[:-1]))
    with pytest.raises(UserError, match="names.txt: 61 .*62 classes"):
        data(config)
