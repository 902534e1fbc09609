"""Batches of encoded images depend only on (seed, replica, epoch, index)."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.loader import (
    LoaderOptions,
    epoch_order,
    eval_batches,
    example_rng,
    train_batches,
)
from modelstock_jax.data.transforms import EvalTransform, TrainTransform
from modelstock_jax.errors import UserError
from tests.data.photographs import small_set

TRANSFORM = TrainTransform(16, (0.3, 1.0), flip=True, randaugment_ops=1, randaugment_magnitude=15)
SET = small_set(23)
LOADER = LoaderOptions(threads=1)


def batches(steps=4, image_set=SET, **options):
    """Return {name: [steps, R, B, ...]} of the first batches."""
    defaults = {
        "batch_size": 4, "seed": 0, "num_replicas": 2, "transform": TRANSFORM, "loader": LOADER
    }  # fmt: skip
    first = list(itertools.islice(train_batches(image_set, **defaults | options), steps))
    return {name: np.stack([batch[name] for batch in first]) for name in first[0]}


def assert_equal(one, other):
    assert set(one) == set(other) == {"image", "label"}
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_each_image_is_transformed_with_its_own_random_numbers():
    first = batches(steps=7)  # Five steps per epoch.
    assert first["image"].shape == (7, 2, 4, 16, 16, 3) and first["image"].dtype == np.uint8
    assert first["label"].shape == (7, 2, 4) and first["label"].dtype == np.int32
    for step, replica in itertools.product(range(7), range(2)):
        epoch, step_in_epoch = divmod(step, 5)
        indices = epoch_order(0, replica, epoch, 23)[4 * step_in_epoch : 4 * step_in_epoch + 4]
        np.testing.assert_array_equal(first["label"][step, replica], indices)
        for position, index in enumerate(indices.tolist()):
            expected = TRANSFORM(SET.images[index], example_rng((0, replica, epoch), index))
            np.testing.assert_array_equal(first["image"][step, replica, position], expected)


def test_each_replica_may_have_its_own_transform():
    plain = TrainTransform(16, (0.3, 1.0), flip=True)
    per_replica, all_plain, all_strong = (
        batches(transform=transform)["image"]
        for transform in ([plain, TRANSFORM], plain, TRANSFORM)
    )
    np.testing.assert_array_equal(per_replica[:, 0], all_plain[:, 0])
    np.testing.assert_array_equal(per_replica[:, 1], all_strong[:, 1])
    assert not np.array_equal(per_replica[:, 1], all_plain[:, 1])
    one_host = batches(transform=[plain, TRANSFORM], replicas=[1])["image"]
    np.testing.assert_array_equal(one_host, per_replica[:, 1:])
    with pytest.raises(UserError, match="2 transforms .*3 replicas"):
        batches(transform=[plain, TRANSFORM], num_replicas=3)


def test_random_numbers_differ_between_seeds_replicas_epochs_and_examples():
    keys = list(itertools.product(range(3), repeat=4))
    first = {example_rng(key[:3], key[3]).random() for key in keys}
    assert len(first) == len(keys)
    # The order of an epoch uses separate random numbers.
    assert np.random.default_rng((0, 0, 0)).random() not in first


def test_random_numbers_equal_recorded_values():
    # A run that resumes with a new version must see the same images.
    assert example_rng((1, 2, 3), 4).random() == pytest.approx(0.6650591, abs=1e-7)


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 12), seed=st.integers(0, 2**40), threads=st.integers(1, 4))
def test_resume_at_any_step_equals_uninterrupted(start, seed, threads):
    uninterrupted = batches(steps=start + 2, seed=seed)
    resumed = batches(steps=2, seed=seed, start_step=start, loader=LoaderOptions(threads=threads))
    assert_equal(resumed, {name: values[start:] for name, values in uninterrupted.items()})


@settings(max_examples=8, deadline=None)
@given(processes=st.sampled_from([1, 2, 4]), start=st.integers(0, 6))
def test_hosts_read_their_parts_of_one_batch(processes, start):
    parts = [
        batches(2, start_step=start, examples=positions)
        for positions in np.array_split(np.arange(4), processes)
    ]
    joined = {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}
    assert_equal(joined, batches(2, start_step=start))


# The imports of each process take seconds.
WITH_WORKERS = pytest.param(2, marks=pytest.mark.slow)


@pytest.mark.parametrize("workers", [0, WITH_WORKERS])
def test_error_names_a_damaged_image(workers):
    iterator = train_batches(
        small_set(8, damaged=(5,)),
        batch_size=8,
        seed=0,
        num_replicas=1,
        transform=TRANSFORM,
        loader=LoaderOptions(workers=workers),
    )
    with pytest.raises(UserError, match="memory/5.JPEG: image 5 "):
        next(iterator)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.slow
def test_worker_processes_change_nothing(workers):
    damaged = small_set(23, damaged=(3,))
    by_threads = batches(9, damaged, loader=LoaderOptions(threads=2, unreadable="skip"))
    for start in (0, 2):
        loader = LoaderOptions(workers=workers, threads=2, unreadable="skip")
        by_workers = batches(9 - start, damaged, start_step=start, loader=loader)
        assert_equal(by_workers, {name: values[start:] for name, values in by_threads.items()})


def test_a_damaged_image_is_replaced_by_the_next_and_reported_once(caplog):
    damaged = small_set(8, damaged=(2, 3, 7))
    options = {"batch_size": 8, "seed": 0, "num_replicas": 2, "transform": TRANSFORM}
    iterator = train_batches(damaged, loader=LoaderOptions(unreadable="skip"), **options)
    with caplog.at_level(logging.WARNING):
        first = [next(iterator) for _ in range(3)]
    replacements = {2: 4, 3: 4, 7: 0}
    for epoch, batch in enumerate(first):
        order = epoch_order(0, 1, epoch, 8).tolist()
        assert batch["label"][1].tolist() == [replacements.get(i, i) for i in order]
    assert iterator.unreadable == {2, 3, 7} and len(caplog.records) == 3
    assert "memory/2.JPEG" in caplog.text and " 3 " in caplog.text
    # The replacement is transformed differently from the same image at its own position.
    images, order = first[0]["image"][1], epoch_order(0, 1, 0, 8).tolist()
    assert not np.array_equal(images[order.index(2)], images[order.index(4)])


def test_a_dataset_without_a_readable_image_is_an_error():
    unreadable = small_set(2, damaged=(0, 1))
    options = {"seed": 0, "transform": TRANSFORM, "loader": LoaderOptions(unreadable="skip")}
    with pytest.raises(UserError, match=" 2 images"):
        next(train_batches(unreadable, batch_size=2, num_replicas=1, **options))


@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 9), parts=st.integers(1, 4), processes=st.integers(1, 3))
def test_evaluation_counts_every_readable_image_once(count, parts, processes):
    image_set = small_set(count, damaged=(1, 4))
    seen, steps = [], set()
    for positions in np.array_split(np.arange(parts * processes), processes):
        read = list(
            eval_batches(
                image_set,
                parts * processes,
                examples=positions,
                transform=EvalTransform(16),
                loader=LoaderOptions(threads=1, unreadable="skip"),
            )
        )
        steps.add(len(read))
        for batch in read:
            assert set(batch) == {"image", "label", "mask"}
            assert batch["image"].shape == (parts, 16, 16, 3)
            assert (batch["image"][~batch["mask"]] == 0).all()
            assert (batch["label"][~batch["mask"]] == 0).all()
            for image, label in zip(
                batch["image"][batch["mask"]], batch["label"][batch["mask"]], strict=True
            ):
                np.testing.assert_array_equal(
                    image, EvalTransform(16)(image_set.images[label], None)
                )
                seen.append(int(label))
    assert sorted(seen) == [number for number in range(count) if number not in (1, 4)]
    assert steps == {-(-count // (parts * processes))}


def test_evaluation_names_a_damaged_image_and_crops_the_border():
    with pytest.raises(UserError, match="memory/1.JPEG: image 1"):
        list(eval_batches(small_set(3, damaged=(1,)), 2, transform=EvalTransform(16)))
    bordered = ImageSet("objects", SET.images, SET.labels, crop_border=2)
    (batch, *_) = eval_batches(bordered, 4, transform=EvalTransform(16))
    np.testing.assert_array_equal(batch["image"][1], EvalTransform(16, 2)(SET.images[1], None))


def test_a_closed_iterator_ends():
    iterator = train_batches(
        SET, batch_size=4, seed=0, num_replicas=1, transform=TRANSFORM, loader=LOADER
    )
    next(iterator)
    iterator.close()
    assert next(iterator, None) is None
    iterator.close()


def test_encoded_images_need_a_size():
    with pytest.raises(UserError, match="small: .*size"):
        train_batches(SET, batch_size=4, seed=0, num_replicas=1)
    with pytest.raises(UserError, match="small: .*size"):
        eval_batches(SET, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": -1}, "threads .*-1"),
        ({"workers": -1}, "workers .*-1"),
        ({"prefetch": 0}, "prefetch .*0"),
        ({"unreadable": "ignore"}, "'ignore': .*error, skip"),
    ],
)
def test_loader_options_reject(change, message):
    with pytest.raises(UserError, match=message):
        LoaderOptions(**change)
