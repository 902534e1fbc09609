"""Statistics of batch norms: never trained, kept by merges, estimated on request."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.models.compute import DEFAULT_COMPUTE
from modelstock_jax.models.model import (
    batch_statistics,
    encode_image,
    image_tower,
    init_image_tower,
)
from modelstock_jax.models.param_mapping import flatten
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.models.resnet import ResNetConfig
from modelstock_jax.training.batch_norm import StatisticsEstimator, check_statistics
from modelstock_jax.training.classifier import make_classifier
from modelstock_jax.training.finetune import make_task
from modelstock_jax.training.state import without_statistics
from modelstock_jax.training.step_fns import StepFunctions, mesh_from_config
from tests.training import tiny

STATISTICS = ("mean", "var")
MODEL = ResNetConfig(embedding_size=4, hidden_sizes=(8, 12), depths=(1, 1), layer_type="basic")


def anchor(config):
    tower = init_image_tower(MODEL, jax.random.key(0))
    rng = np.random.default_rng(0)
    # Statistics that are not the defaults.
    tower = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x + rng.uniform(0.1, 0.2, x.shape).astype(np.float32)
            if path[-1].key in STATISTICS
            else x
        ),
        tower,
    )
    head = {
        "kernel": rng.standard_normal((12, tiny.CLASSES)).astype(np.float32),
        "bias": np.zeros(tiny.CLASSES, np.float32),
    }
    pixels = Preprocessor((0.5,) * 3, (0.25,) * 3, image_size=12)
    return make_classifier(config, MODEL, {"image_tower": tower, "head": head}, pixels)


def data(images) -> Benchmark:
    names = tuple(map(str, range(tiny.CLASSES)))
    return Benchmark(images, images, images, {}, names, ("{}",), lambda key, images: images)


def estimated(config, start, images):
    return StatisticsEstimator(config, start, data(images), mesh_from_config(config))(start.params)


def test_statistics_are_never_trained_and_merges_keep_them():
    config = tiny.config(epochs=1)
    config.optimizer.weight_decay = 0.5
    start, images = anchor(config), tiny.images()
    fns = StepFunctions(config, make_task(config, start, len(images), lambda key, x: x))
    state, batch = fns.init_state(0), next(tiny.batches(config, 0))
    for _ in range(2):
        state, _ = fns.train_step(state, batch, fns.step_constants(fns.anchor))
    state, merged, _ = fns.merge_step[True](fns.anchor, state)
    moved = 0
    for (path, new), (_, old) in zip(
        flatten(jax.device_get(merged)), flatten(start.params), strict=True
    ):
        if path[-1] in STATISTICS:
            np.testing.assert_array_equal(new, old)
        elif path[-1] in ("scale", "kernel"):
            moved += 1
            assert (new != np.asarray(old)).any(), path
    assert moved > 10


def test_a_model_without_batch_norms_trains_every_leaf():
    params = {"image_tower": {"kernel": 0}}
    assert without_statistics(params, None) is None
    only = without_statistics(params | {"norm": {"mean": 0}}, lambda name: "norm" in name)
    assert only is not None and not only("norm.mean") and only("norm.scale")
    assert not only("image_tower.kernel")


def test_statistics_of_a_batch_are_those_of_each_norms_input():
    tower = init_image_tower(MODEL, jax.random.key(1))
    images = np.random.default_rng(0).standard_normal((5, 12, 12, 3)).astype(np.float32)
    found = batch_statistics(MODEL, tower, images)
    module = image_tower(MODEL, tower, images, DEFAULT_COMPUTE)
    x = np.asarray(module.stem(jnp.asarray(images)), np.float64)
    # Float32 sums of 180 values.
    np.testing.assert_allclose(found["stem_norm"]["mean"], x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["stem_norm"]["var"], x.var((0, 1, 2)), rtol=1e-4)


def test_estimated_statistics_normalize_the_training_images():
    config = tiny.config(epochs=1)
    config.merge.batch_norm_statistics = "re_estimate"
    start, images = anchor(config), tiny.images()
    updated = estimated(config, start, images)
    again = estimated(config, start, images)
    jax.tree.map(np.testing.assert_array_equal, updated, again)
    pixels = start.normalize(
        images.pixels[: config.batch_size * (len(images) // config.batch_size)]
    )
    # One batch of all images: the mean of equal batches has this mean, and nearly this variance.
    expected = batch_statistics(MODEL, start.params["image_tower"], pixels)
    stem = updated["image_tower"]["stem_norm"]
    np.testing.assert_allclose(stem["mean"], expected["stem_norm"]["mean"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(stem["var"], expected["stem_norm"]["var"], rtol=0.1)
    for (path, new), (_, old) in zip(flatten(updated), flatten(start.params), strict=True):
        assert (np.asarray(new) != np.asarray(old)).any() == (path[-1] in STATISTICS), path
    before = encode_image(MODEL, start.params["image_tower"], pixels)
    assert np.abs(encode_image(MODEL, updated["image_tower"], pixels) - before).max() > 1e-2


def test_keeping_changes_nothing_and_a_model_without_batch_norms_is_an_error():
    config = tiny.config()
    start, images = anchor(config), tiny.images()
    assert estimated(config, start, images) is start.params
    config.merge.batch_norm_statistics = "re_estimate"
    check_statistics(config, start.params)
    group = dataclasses.replace(MODEL, norm="group", embedding_size=8, hidden_sizes=(8, 16))
    with pytest.raises(UserError, match="no batch norm"):
        check_statistics(config, {"image_tower": init_image_tower(group, jax.random.key(0))})
