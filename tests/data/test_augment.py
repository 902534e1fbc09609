"""Augmentation is in range, has the stated strength, and depends only on its key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from modelstock_jax.data.augment import MAX_SHIFT, mixup, shift_and_jitter
from modelstock_jax.data.glyphs import sets
from modelstock_jax.training.finetune import Classifier, make_task
from modelstock_jax.training.losses import cross_entropy

COUNT = 512  # One shape for all tests: each shape costs a compilation.
augment = jax.jit(shift_and_jitter)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(sets.training_set(size=COUNT).images)


def test_deterministic_in_the_key(images):
    key = jax.random.key(0)
    first = augment(key, images)
    np.testing.assert_array_equal(first, augment(key, images))
    assert not np.array_equal(first, augment(jax.random.key(1), images))
    assert first.shape == images.shape and first.dtype == jnp.uint8


def test_replicas_are_augmented_independently(images):
    keys = jax.random.split(jax.random.key(0), 2)
    both = jax.jit(jax.vmap(shift_and_jitter, (0, None)))(keys, images)
    np.testing.assert_array_equal(both[1], augment(keys[1], images))
    assert not np.array_equal(both[0], both[1])


def test_stays_in_range_for_extreme_images():
    extreme = np.zeros((COUNT, 24, 24, 3), np.uint8)
    extreme[:, ::2] = 255
    result = np.asarray(augment(jax.random.key(2), jnp.asarray(extreme)))
    # Clipped values stay at the end of the range: none may wrap around from 255 to 0.
    dark, light = np.sort(result.reshape(COUNT, -1), axis=1)[:, [0, -1]].T
    assert (dark < 60).all() and (light > 195).all()
    assert (dark == 0).any() and (light == 255).any()


def test_shifts_are_at_most_two_pixels_and_independent_per_image():
    dots = np.zeros((COUNT, 24, 24, 3), np.uint8)
    dots[:, 12, 12] = 255
    result = np.asarray(augment(jax.random.key(3), jnp.asarray(dots)))[..., 0]
    offsets = np.array(np.unravel_index(result.reshape(COUNT, -1).argmax(axis=1), (24, 24))).T - 12
    # 25 equally likely offsets: 512 draws miss one of them with probability 2e-8.
    assert {tuple(offset) for offset in offsets.tolist()} == {
        (row, column)
        for row in range(-MAX_SHIFT, MAX_SHIFT + 1)
        for column in range(-MAX_SHIFT, MAX_SHIFT + 1)
    }


def test_edges_are_repeated():
    steps = np.zeros((COUNT, 24, 24, 3), np.uint8)
    steps[:, :, 12:] = 200
    result = np.asarray(augment(jax.random.key(4), jnp.asarray(steps))).astype(int)
    assert (result[:, :, 0] == result[:, :, 5]).all()
    assert (result[:, :, -1] == result[:, :, -5]).all()


def test_brightness_and_contrast_have_the_stated_size():
    halves = np.full((COUNT, 24, 24, 3), 100, np.uint8)
    halves[:, :12] = 150
    result = np.asarray(augment(jax.random.key(5), jnp.asarray(halves))).astype(float)
    low, high = result[:, 0, 0, 0], result[:, -1, 0, 0]
    contrast = (low - high) / 50
    assert 0.78 < contrast.min() < 0.83 and 1.17 < contrast.max() < 1.22  # 0.8 to 1.2, rounded.
    brightness = result.mean(axis=(1, 2, 3)) - 125
    # 0.1 of 255, and up to two of 24 rows shifted from one half to the other (4.2 * 1.2).
    assert brightness.min() < -22 and brightness.max() > 22 and abs(brightness).max() < 26 + 5.1


LABELS = jnp.arange(8, dtype=jnp.int32)


@pytest.fixture(scope="module")
def mixed(images):
    """Return the corners of eight images for 4,000 keys: one compilation for all mixup tests."""
    batch = {"image": images[:8, :2, :2], "label": LABELS}
    many = jax.jit(jax.vmap(lambda key: mixup(key, batch, 0.4)))
    drawn = many(jax.random.split(jax.random.key(1), 4000))
    return batch, {name: np.asarray(values) for name, values in drawn.items()}


def test_mixup_blends_neighbors_and_returns_the_fraction(mixed):
    batch, drawn = mixed
    share = drawn["share"][:, :1]
    assert (share >= 0.5).all() and (share <= 1).all() and (drawn["share"] == share).all()
    assert (drawn["label"] == np.arange(8)).all()
    assert (drawn["other_label"] == [7, *range(7)]).all()
    x, share = np.asarray(batch["image"], np.float64), share[:, :, None, None, None]
    expected = share * x + (1 - share) * x[[7, *range(7)]]
    # Float32 sums of values up to 255.
    np.testing.assert_allclose(drawn["image"], expected, atol=255 * 2e-7)


def test_mixup_fraction_is_the_larger_part_of_a_beta(mixed):
    # E[max(u, 1 - u)] of Beta(0.4, 0.4) by quadrature; 4,000 draws have a standard error of 0.0024.
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    weight = (u * (1 - u)) ** -0.6
    expected = (np.maximum(u, 1 - u) * weight).sum() / weight.sum()
    assert abs(mixed[1]["share"][:, 0].mean() - expected) < 0.01


def test_the_loss_of_a_mixed_batch_is_the_mixed_loss(mixed):
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(8, 8)), jnp.float32)
    loss_fn = jax.jit(cross_entropy(lambda params, x: params, lambda x: x, label_smoothing=0.1))
    batch = {name: jnp.asarray(values[0]) for name, values in mixed[1].items()}
    share = float(batch["share"][0])
    own, other = (
        loss_fn(logits, {"image": batch["image"], "label": batch[name]})[0]
        for name in ("label", "other_label")
    )
    loss, metrics = loss_fn(logits, batch)
    # Float32 means of eight values near 3.
    np.testing.assert_allclose(loss, share * own + (1 - share) * other, rtol=1e-6)
    assert metrics["accuracy"] == 100 * np.mean(np.argmax(logits, -1) == np.arange(8))


def test_mixup_is_applied_after_the_benchmarks_augmentation():
    config = default.get_config()
    config.data.augment.mixup = 0.4
    anchor = Classifier(params={}, apply=None, normalize=None, num_heads=1)
    batch = {"image": jnp.arange(24.0).reshape(2, 2, 2, 3), "label": jnp.arange(2)}
    task = make_task(config, anchor, 1000, lambda key, images: images + 1)
    drawn = task.augment(jax.random.key(0), batch)
    _, key = jax.random.split(jax.random.key(0))
    expected = mixup(key, batch | {"image": batch["image"] + 1}, 0.4)
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)
    config.data.augment.mixup = 0.0
    task = make_task(config, anchor, 1000, lambda key, images: images + 1)
    assert set(task.augment(jax.random.key(0), batch)) == {"image", "label"}
