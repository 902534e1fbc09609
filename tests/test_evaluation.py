"""Accuracies against counts by hand: every image once, and the classes that a set holds."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.evaluation import make_evaluator
from modelstock_jax.training.sharding import make_mesh

CLASSES = 6


def apply(params, images):
    """Logits are the first pixels of the image, plus the head's bias."""
    return images[:, 0, :, 0] + params["head"]["bias"][None]


def image_set(count, classes=None, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 1, CLASSES, 3)).astype(np.uint8)
    labels = rng.choice(classes or range(CLASSES), count).astype(np.int32)
    return ImageSet(f"set{count}", pixels, labels, classes)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
@pytest.mark.parametrize("batch_size", [7, 16, 100])
def test_accuracies_equal_counts_by_hand(mesh, batch_size):
    bias = np.linspace(-20, 20, CLASSES, dtype=np.float32)
    params = {"head": {"bias": bias}}
    sets = [image_set(50), image_set(33, (1, 4, 5)), image_set(1)]
    evaluate = make_evaluator(
        apply,
        lambda images: images.astype(jnp.float32),
        make_mesh(*mesh, num_replicas=2, batch_size=8),
        batch_size,
    )
    got = evaluate(params, sets)
    for one in sets:
        logits = one.images[:, 0, :, 0] + bias
        allowed = one.classes or tuple(range(CLASSES))
        choice = np.array(allowed)[logits[:, list(allowed)].argmax(-1)]
        assert got[one.name] == 100 * (choice == one.labels).sum() / len(one)
