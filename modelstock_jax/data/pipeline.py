"""Batches for training and evaluation: deterministic, sharded, resumed by a step number.

A batch is one element of a Grain dataset: its images are gathered at once, since Grain's cost
for each element (20 us, images or bare indices) would exceed a small model's training step.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import grain
import numpy as np

from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.errors import UserError

Batch = dict[str, np.ndarray]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Full batches in an epoch; the rest of the shuffled examples waits for the next epoch.

    Args:
      num_examples: M.
      batch_size: examples that a replica sees in a step, over all devices.

    Returns:
      M // batch_size.

    Raises:
      UserError: a batch that is empty, or larger than the set.

    >>> steps_per_epoch(4096, 128)
    32
    """
    if not 1 <= batch_size <= num_examples:
        raise UserError(
            f"batch_size is {batch_size}: it must lie between 1 and the {num_examples} examples "
            "of the training set"
        )
    return num_examples // batch_size


def epoch_order(seed: int, replica: int, epoch: int, num_examples: int) -> np.ndarray:
    """The order in which a replica sees the examples of an epoch: a permutation, int64 [M]."""
    return np.random.default_rng((seed, replica, epoch)).permutation(num_examples)


def train_batches(
    image_set: ImageSet,
    *,
    batch_size: int,
    seed: int,
    num_replicas: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches, each replica's in an order of its own.

    Every epoch is a fresh permutation that depends on (seed, replica, epoch) alone. A step's
    batch does not depend on the number of processes: process p gets its p-th part.

    Args:
      image_set: M images.
      batch_size: B, examples that a replica sees in a step, over all devices and processes.
      seed: of all permutations, >= 0.
      num_replicas: R.
      start_step: how many batches to leave out; the rest is as if they had been drawn.
      process_index: of this process.
      process_count: P, a divisor of B.

    Returns:
      Iterator of {"image": uint8 [R, B / P, H, W, 3], "label": int32 [R, B / P]}.

    Raises:
      UserError: sizes that do not fit together.

    >>> from modelstock_jax.data.glyphs.sets import training_set
    >>> batch = next(train_batches(training_set(size=8), batch_size=4, seed=0, num_replicas=2))
    >>> batch["image"].shape, batch["label"].shape
    ((2, 4, 24, 24, 3), (2, 4))
    """
    steps = steps_per_epoch(len(image_set), batch_size)
    part = _part(batch_size, process_index, process_count)
    for name, value, least in (
        ("seed", seed, 0),
        ("num_replicas", num_replicas, 1),
        ("start_step", start_step, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
    batches = _TrainBatches(image_set, batch_size, steps, seed, num_replicas, part)
    # One thread keeps two batches ahead of the device.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(batches)[start_step:].to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class _TrainBatches:
    """Random access to the batch of any step."""

    image_set: ImageSet
    batch_size: int
    steps: int
    seed: int
    num_replicas: int
    part: slice
    _orders: dict[int, tuple[int, np.ndarray]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        epoch, within = divmod(step, self.steps)
        start = within * self.batch_size
        indices = np.stack([
            self._order(replica, epoch)[start : start + self.batch_size][self.part]
            for replica in range(self.num_replicas)
        ])  # fmt: skip
        return {"image": self.image_set.images[indices], "label": self.image_set.labels[indices]}

    def _order(self, replica: int, epoch: int) -> np.ndarray:
        held = self._orders.get(replica)
        if held is None or held[0] != epoch:
            held = epoch, epoch_order(self.seed, replica, epoch, len(self.image_set))
            self._orders[replica] = held
        return held[1]


def eval_batches(
    image_set: ImageSet, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every image once, in order, in batches of one shape.

    Args:
      image_set: M images.
      batch_size: B, over all processes.
      process_index: of this process.
      process_count: P, a divisor of B; every process gets the same number of batches.

    Returns:
      Iterator of ceil(M / B) of {"image": uint8 [B / P, H, W, 3], "label": int32 [B / P],
      "mask": bool [B / P]}; the mask is False where the last batch is padded with zeros.

    Raises:
      UserError: sizes that do not fit together.

    >>> from modelstock_jax.data.glyphs.sets import training_set
    >>> [batch["mask"].tolist() for batch in eval_batches(training_set(size=3), 2)]
    [[True, True], [True, False]]
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    part = _part(batch_size, process_index, process_count)
    return _eval_batches(image_set, batch_size, part)


def _eval_batches(image_set: ImageSet, batch_size: int, part: slice) -> Iterator[Batch]:
    for start in range(0, len(image_set), batch_size):
        indices = np.arange(start, start + batch_size)[part]
        mask = indices < len(image_set)
        batch = {"image": image_set.images, "label": image_set.labels}
        for name, values in batch.items():
            batch[name] = np.zeros((len(indices), *values.shape[1:]), values.dtype)
            batch[name][mask] = values[indices[mask]]
        yield batch | {"mask": mask}


def _part(batch_size: int, process_index: int, process_count: int) -> slice:
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} is not one of {process_count} processes")
    if batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} cannot be shared evenly by {process_count} processes"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
