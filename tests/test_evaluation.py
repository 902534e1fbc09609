"""Accuracies equal counts by hand: every image counts once, by the rule of its set."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.errors import UserError
from modelstock_jax.evaluation import (
    candidate_classes,
    classifier_evaluator,
    count_correct,
    make_evaluator,
    scored_batches,
)
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.training.classifier import Classifier
from modelstock_jax.training.finetune import make_trainer
from modelstock_jax.training.sharding import make_mesh
from tests.data.photographs import InMemory, encode
from tests.training import tiny

CLASSES = 6


def apply(params, images):
    """Return the first pixels of the image plus the head's bias as logits."""
    return images[:, 0, :, 0] + params["head"]["bias"][None]


def evaluator(mesh, batch_size):
    return make_evaluator(
        apply,
        lambda images: images.astype(jnp.float32),
        make_mesh(*mesh, num_replicas=2, batch_size=8),
        batch_size,
    )


def images_of(logits) -> np.ndarray:
    """Return images whose logits under `apply` are these values, 0 to 255."""
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
    for images in sets:
        logits = images.images[:, 0, :, 0] + bias
        allowed = images.classes or tuple(range(CLASSES))
        choice = np.array(allowed)[logits[:, list(allowed)].argmax(-1)]
        assert got[images.name] == 100 * (choice == images.labels).sum() / len(images)


# Logits of six classes; the result of each rule is computed by hand.
LOGITS = [
    [90, 10, 20, 30, 40, 50],
    [10, 90, 80, 70, 60, 50],
    [50, 10, 20, 30, 40, 90],
    [10, 20, 30, 90, 80, 70],
]


@pytest.mark.parametrize(
    ("rule", "labels", "correct", "counted"),
    [
        # Best of all six: 0, 1, 5, 3.
        ({}, [0, 2, 5, 3], 3, 4),
        # R and A: of only 2, 4 and 5 the best are 5, 2, 5, 4.
        ({"classes": (2, 4, 5)}, [5, 2, 4, 4], 3, 4),
        # ObjectNet: the best logits of the objects (3), (1, 2), (4, 5) are 30 20 50, 70 90 60,
        # 30 20 90, 90 30 80: class 0 belongs to no object, so its 90 in the first row is ignored.
        ({"groups": ((3,), (1, 2), (4, 5))}, [2, 1, 2, 2], 3, 4),
        # ReaL: best of all six 0, 1, 5, 3 against sets of labels; the third image has none.
        ({"label_sets": ((4, 0), (2,), (), (1, 2, 3))}, [0, 0, 0, 0], 2, 3),
    ],
    ids=["all classes", "R and A", "ObjectNet", "ReaL"],
)
@pytest.mark.parametrize("batch_size", [3, 8])
def test_rules_of_the_sets(rule, labels, correct, counted, batch_size):
    images = ImageSet("name", images_of(LOGITS), np.array(labels, np.int32), **rule)
    params = {"head": {"bias": np.zeros(CLASSES, np.float32)}}
    assert evaluator((1, 1), batch_size)(params, [images]) == {"name": 100 * correct / counted}


@pytest.mark.parametrize("size", [1, 5, 8, 13])
@pytest.mark.parametrize(("batch_size", "processes"), [(4, 1), (4, 2), (8, 4), (12, 3), (16, 8)])
def test_counts_are_exact_for_any_number_of_hosts(size, batch_size, processes):
    """Each process counts its part of each batch; all process the same number of batches."""
    rng = np.random.default_rng(size)
    sets = tuple(tuple(rng.choice(CLASSES, n, replace=False).tolist()) for n in range(5))
    plain = image_set(size)
    for images in (
        plain,
        image_set(size, (0, 3, 4)),
        ImageSet("objects", plain.images, plain.labels % 2, groups=((0, 4, 5), (2,))),
        ImageSet("real", plain.images, plain.labels, label_sets=(sets * 3)[:size]),
    ):
        candidate, total, lengths = candidate_classes(images, CLASSES), np.zeros(2, int), []
        for examples in np.array_split(np.arange(batch_size), processes):
            batches = list(scored_batches(images, batch_size, examples=examples))
            lengths.append(len(batches))
            for batch in batches:
                logits = batch["image"][:, 0, :, 0].astype(np.float32)
                total += count_correct(logits, batch["target"], candidate)
        assert set(lengths) == {-(-size // batch_size)}
        assert total.tolist() == by_hand(images)


def by_hand(images: ImageSet) -> list[int]:
    """Return the numbers of correct and counted images, image by image."""
    correct = counted = 0
    for index, row in enumerate(images.images[:, 0, :, 0].tolist()):
        if images.label_sets is not None:
            counted += bool(images.label_sets[index])
            correct += row.index(max(row)) in images.label_sets[index]
            continue
        options = images.groups or [(k,) for k in images.classes or range(CLASSES)]
        scores = [max(row[k] for k in option) for option in options]
        label = images.labels[index]
        target = label if images.groups else (images.classes or tuple(range(CLASSES))).index(label)
        counted += 1
        correct += scores.index(max(scores)) == target
    return [correct, counted]


def test_error_names_a_class_without_a_logit():
    images = ImageSet("a", images_of(LOGITS), np.full(4, 9, np.int32), (2, 9))
    with pytest.raises(UserError, match="a: .*class 9.* 6"):
        candidate_classes(images, CLASSES)


def test_error_names_a_set_with_nothing_to_count():
    images = ImageSet("real", images_of(LOGITS), np.zeros(4, np.int32), label_sets=((),) * 4)
    params = {"head": {"bias": np.zeros(CLASSES, np.float32)}}
    with pytest.raises(UserError, match="real: .*image"):
        evaluator((1, 1), 4)(params, [images])


def stored_with_sides(colors) -> ImageSet:
    """Return gray images of 20 x 60 pixels whose left and right thirds have another color."""
    stored = []
    for color in colors:
        pixels = np.full((20, 60, 3), 100, np.uint8)
        pixels[:, :20] = pixels[:, 40:] = color
        stored.append(encode(Image.fromarray(pixels), "PNG"))
    return ImageSet("sides", InMemory(stored), np.arange(len(stored), dtype=np.int32))


def mean_color(params, images):
    """Return the mean of each channel as logits."""
    return images.mean((1, 2)) + params["head"]["bias"][None]


def anchor_with(preprocessor) -> Classifier:
    return Classifier({"head": {"bias": np.zeros(3)}}, mean_color, preprocessor, num_heads=1)


def test_stored_images_are_resized_as_the_checkpoint_states():
    """The center crop of CLIP sees gray only; SigLIP's resize without a crop sees the color."""
    images = stored_with_sides([(130, 100, 100), (100, 130, 100), (100, 100, 130)])
    mesh = make_mesh(1, 1, num_replicas=2, batch_size=8)
    # Nearest neighbor mixes no colors at the edge of the crop.
    clip = Preprocessor((0.5,) * 3, (0.5,) * 3, 8, resample=0)
    for preprocessor, expected in (
        (clip, 100 / 3),  # All logits are equal, and the first class is chosen.
        (dataclasses.replace(clip, short_side=None), 100),
        (dataclasses.replace(clip, short_side=None, square_side=24), 100 / 3),
    ):
        anchor = anchor_with(preprocessor)
        evaluate = classifier_evaluator(tiny.config(), anchor, mesh)
        assert evaluate(anchor.params, [images])["sides"] == pytest.approx(expected)


def test_training_crops_are_resized_by_the_filter_of_the_checkpoint(tmp_path):
    images = stored_with_sides([(130, 30, 200), (100, 230, 10)])
    data = SimpleNamespace(train=images, augment=lambda key, images: images)
    config = tiny.config(batch_size=2, num_replicas=2, data__augment__crop_area=(1.0, 1.0))
    clip = Preprocessor((0.5,) * 3, (0.5,) * 3, 8)
    colors = {}
    for resample in (0, 3):  # nearest neighbor, bicubic
        anchor = anchor_with(dataclasses.replace(clip, resample=resample))
        trainer = make_trainer(config, anchor, data, tmp_path / str(resample), "run")
        batch = next(trainer.batches(0))
        colors[resample] = len(np.unique(batch["image"].reshape(-1, 3), axis=0))
    assert colors[0] == 3 < colors[3], "only a filter with a support mixes colors"
