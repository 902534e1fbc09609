"""Batches: every example once per epoch, in orders that a step number restores."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.loader import epoch_order, eval_batches, steps_per_epoch, train_batches
from modelstock_jax.errors import UserError


def numbered(count: int) -> ImageSet:
    """Return images whose pixels and labels both equal their index."""
    numbers = np.arange(count, dtype=np.int32)
    images = np.zeros((count, 2, 2, 3), np.uint8)
    images[:] = (numbers % 251)[:, None, None, None]
    return ImageSet("numbered", images, numbers)


def part(index: int, processes: int, batch_size: int = 8) -> range:
    """Return the positions of one of several processes in a batch."""
    size = batch_size // processes
    return range(index * size, (index + 1) * size)


def labels(count=24, steps=6, **options) -> np.ndarray:
    """Return int [steps, R, B], the examples of the first batches."""
    options = {"batch_size": 8, "seed": 0, "num_replicas": 2} | options
    batches = itertools.islice(train_batches(numbered(count), **options), steps)
    return np.stack([batch["label"] for batch in batches])


def test_shapes_and_images_match_their_labels():
    batch = next(train_batches(numbered(24), batch_size=8, seed=1, num_replicas=3))
    assert batch["image"].shape == (3, 8, 2, 2, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (3, 8) and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][..., 0, 0, 0], batch["label"])


def test_every_epoch_contains_every_example_once_in_a_new_order_per_replica():
    epochs = labels(steps=12).reshape(4, 3, 2, 8).swapaxes(1, 2).reshape(4, 2, 24)
    assert (np.sort(epochs) == np.arange(24)).all()
    assert len({order.tobytes() for order in epochs.reshape(8, 24)}) == 8


def test_remaining_examples_are_left_out_and_differ_between_epochs():
    epochs = labels(count=23, steps=6, num_replicas=1).reshape(3, 16)
    left_out = [frozenset(range(23)) - set(order.tolist()) for order in epochs]
    assert all(len(examples) == 7 for examples in left_out) and len(set(left_out)) == 3


def test_orders_depend_only_on_seed_replica_and_epoch():
    two, three = labels(num_replicas=2), labels(num_replicas=3)
    np.testing.assert_array_equal(two, three[:, :2])
    np.testing.assert_array_equal(two, labels(num_replicas=2))
    assert not np.array_equal(two, labels(num_replicas=2, seed=1))
    # Seed 1 of replica 0 must differ from seed 0 of replica 1 and from later epochs of seed 0.
    orders = {
        epoch_order(seed, replica, epoch, 50).tobytes()
        for seed, replica, epoch in itertools.product(range(3), repeat=3)
    }
    assert len(orders) == 27


def test_orders_equal_recorded_values():
    # If a new version shuffled differently, a saved step number would not restore the batches.
    assert epoch_order(0, 1, 2, 8).tolist() == [7, 5, 1, 4, 0, 3, 6, 2]
    order = epoch_order(3, 1, 2, 100_000)
    assert order[[0, 1, 50_000, 99_999]].tolist() == [69655, 17328, 10938, 52057]
    assert order.dtype == np.int32, "int64 would need 10 MB per replica and process for ImageNet"


@settings(max_examples=20, deadline=None)
@given(start=st.integers(0, 30), count=st.integers(8, 40), batch_size=st.integers(1, 8))
def test_resume_at_any_step_equals_uninterrupted(start, count, batch_size):
    options = {"count": count, "batch_size": batch_size}
    uninterrupted = labels(steps=start + 4, **options)
    resumed = labels(steps=4, start_step=start, **options)
    np.testing.assert_array_equal(resumed, uninterrupted[start:])


@settings(max_examples=20, deadline=None)
@given(processes=st.sampled_from([1, 2, 4, 8]), count=st.integers(8, 40))
def test_shards_are_disjoint_and_their_union_is_the_epoch(processes, count):
    steps = steps_per_epoch(count, 8)
    shards = [
        labels(count=count, steps=steps, examples=part(index, processes))
        for index in range(processes)
    ]
    assert shards[0].shape == (steps, 2, 8 // processes)
    # In order, so that a global array of the shards equals the batch of a single process.
    np.testing.assert_array_equal(np.concatenate(shards, axis=-1), labels(count, steps))
    for replica in range(2):
        assert len(np.unique([shard[:, replica] for shard in shards])) == steps * 8


@settings(max_examples=20, deadline=None)
@given(
    replicas=st.sets(st.integers(0, 3), min_size=1).map(sorted),
    examples=st.sets(st.integers(0, 7), min_size=1).map(sorted),
    start=st.integers(0, 7),
)
def test_a_process_reads_any_replicas_and_positions_of_the_batch(replicas, examples, start):
    options = {"num_replicas": 4, "start_step": start}
    selected = labels(replicas=replicas, examples=examples, **options)
    np.testing.assert_array_equal(selected, labels(**options)[:, replicas][:, :, examples])


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 40), parts=st.integers(1, 10), processes=st.integers(1, 4))
def test_evaluation_counts_every_image_once(count, parts, processes):
    batch_size = parts * processes
    seen, num_batches = [], set()
    for index in range(processes):
        positions = part(index, processes, batch_size)
        batches = list(eval_batches(numbered(count), batch_size, examples=positions))
        num_batches.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (parts, 2, 2, 3) and batch["mask"].dtype == bool
            assert (batch["image"][~batch["mask"]] == 0).all()
            seen += batch["label"][batch["mask"]].tolist()
    assert sorted(seen) == list(range(count))
    assert num_batches == {-(-count // batch_size)}


def test_evaluation_preserves_the_order():
    batches = list(eval_batches(numbered(5), 2))
    assert [batch["label"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 0]]
    assert batches[-1]["mask"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 25}, "batch_size .*25.*24 examples"),
        ({"batch_size": 0}, "batch_size .*0"),
        ({"seed": -1}, "seed .*-1"),
        ({"num_replicas": 0}, "num_replicas .*0"),
        ({"start_step": -1}, "start_step .*-1"),
        ({"examples": [0, 8]}, r"examples=\[0, 8\]: .* 0 .*7"),
        ({"examples": []}, "examples"),
        ({"replicas": [1, 0]}, "replicas.* 0 .*1"),
    ],
)
def test_training_rejects(change, message):
    with pytest.raises(UserError, match=message):
        labels(**change)


def test_evaluation_raises_before_the_first_batch():
    with pytest.raises(UserError, match="batch_size .*0"):
        eval_batches(numbered(4), 0)
    with pytest.raises(UserError, match="examples=.* 0 .*2,"):
        eval_batches(numbered(4), 3, examples=range(2, 4))
