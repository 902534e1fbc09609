"""Accuracies against counts by hand: every image once, by the rule of its set."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.errors import UserError
from modelstock_jax.evaluation import (
    candidate_classes,
    count_correct,
    make_evaluator,
    scored_batches,
)
from modelstock_jax.training.sharding import make_mesh

CLASSES = 6


def apply(params, images):
    """Logits are the first pixels of the image, plus the head's bias."""
    return images[:, 0, :, 0] + params["head"]["bias"][None]


def evaluator(mesh, batch_size):
    return make_evaluator(
        apply,
        lambda images: images.astype(jnp.float32),
        make_mesh(*mesh, num_replicas=2, batch_size=8),
        batch_size,
    )


def images_of(logits) -> np.ndarray:
    """Images whose logits under `apply` are these numbers, 0 to 255."""
    return np.repeat(np.array(logits, np.uint8)[:, None, :, None], 3, axis=-1)


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
    got = evaluator(mesh, batch_size)(params, sets)
    for one in sets:
        logits = one.images[:, 0, :, 0] + bias
        allowed = one.classes or tuple(range(CLASSES))
        choice = np.array(allowed)[logits[:, list(allowed)].argmax(-1)]
        assert got[one.name] == 100 * (choice == one.labels).sum() / len(one)


# Logits of six classes, and what each rule makes of them, worked out by hand.
LOGITS = [
    [90, 10, 20, 30, 40, 50],
    [10, 90, 80, 70, 60, 50],
    [50, 10, 20, 30, 40, 90],
    [10, 20, 30, 90, 80, 70],
]


@pytest.mark.parametrize(
    ("rule", "labels", "right", "counted"),
    [
        # Best of all six: 0, 1, 5, 3.
        ({}, [0, 2, 5, 3], 3, 4),
        # R and A: among 2, 4 and 5 alone the best are 5, 2, 5, 4.
        ({"classes": (2, 4, 5)}, [5, 2, 4, 4], 3, 4),
        # ObjectNet: the best logits of the objects (3), (1, 2), (4, 5) are 30 20 50, 70 90 60,
        # 30 20 90, 90 30 80: class 0 maps to no object, so its 90 in the first row counts nothing.
        ({"groups": ((3,), (1, 2), (4, 5))}, [2, 1, 2, 2], 3, 4),
        # ReaL: best of all six 0, 1, 5, 3 against sets of labels; the third image has none.
        ({"label_sets": ((4, 0), (2,), (), (1, 2, 3))}, [0, 0, 0, 0], 2, 3),
    ],
    ids=["all classes", "R and A", "ObjectNet", "ReaL"],
)
@pytest.mark.parametrize("batch_size", [3, 8])
def test_the_rules_of_the_sets(rule, labels, right, counted, batch_size):
    one = ImageSet("one", images_of(LOGITS), np.array(labels, np.int32), **rule)
    params = {"head": {"bias": np.zeros(CLASSES, np.float32)}}
    assert evaluator((1, 1), batch_size)(params, [one]) == {"one": 100 * right / counted}


@pytest.mark.parametrize("size", [1, 5, 8, 13])
@pytest.mark.parametrize(("batch_size", "processes"), [(4, 1), (4, 2), (8, 4), (12, 3), (16, 8)])
def test_counts_are_exact_for_any_number_of_hosts(size, batch_size, processes):
    """Each process counts its part of each batch; all take part in the same number of batches."""
    rng = np.random.default_rng(size)
    sets = tuple(tuple(rng.choice(CLASSES, n, replace=False).tolist()) for n in range(5))
    whole = image_set(size)
    for one in (
        whole,
        image_set(size, (0, 3, 4)),
        ImageSet("objects", whole.images, whole.labels % 2, groups=((0, 4, 5), (2,))),
        ImageSet("real", whole.images, whole.labels, label_sets=(sets * 3)[:size]),
    ):
        candidate, total, lengths = candidate_classes(one, CLASSES), np.zeros(2, int), []
        for places in np.array_split(np.arange(batch_size), processes):
            batches = list(scored_batches(one, batch_size, examples=places))
            lengths.append(len(batches))
            for batch in batches:
                logits = batch["image"][:, 0, :, 0].astype(np.float32)
                total += count_correct(logits, batch["target"], candidate)
        assert set(lengths) == {-(-size // batch_size)}
        assert total.tolist() == by_hand(one)


def by_hand(one: ImageSet) -> list[int]:
    """Right and counted, image by image."""
    right = counted = 0
    for place, row in enumerate(one.images[:, 0, :, 0].tolist()):
        if one.label_sets is not None:
            counted += bool(one.label_sets[place])
            right += row.index(max(row)) in one.label_sets[place]
            continue
        options = one.groups or [(k,) for k in one.classes or range(CLASSES)]
        scores = [max(row[k] for k in option) for option in options]
        label = one.labels[place]
        wanted = label if one.groups else (one.classes or tuple(range(CLASSES))).index(label)
        counted += 1
        right += scores.index(max(scores)) == wanted
    return [right, counted]


def test_a_class_without_a_logit_is_named():
    one = ImageSet("a", images_of(LOGITS), np.full(4, 9, np.int32), (2, 9))
    with pytest.raises(UserError, match="a: .*class 9.* 6"):
        candidate_classes(one, CLASSES)


def test_a_set_with_nothing_to_count_is_named():
    one = ImageSet("real", images_of(LOGITS), np.zeros(4, np.int32), label_sets=((),) * 4)
    params = {"head": {"bias": np.zeros(CLASSES, np.float32)}}
    with pytest.raises(UserError, match="real: .*image"):
        evaluator((1, 1), 4)(params, [one])
