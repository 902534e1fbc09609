"""Batches for training and evaluation: deterministic, sharded, resumed by a step number.

A batch is one element of a Grain dataset: its images are gathered at once, since Grain's cost
for each element (20 us, images or bare indices) would exceed a small model's training step.
Encoded images are decoded within the batch by the threads of a `Reader`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from modelstock_jax.data.image_set import EncodedImages, ImageSet
from modelstock_jax.data.reader import Loading, Reader
from modelstock_jax.data.stream import Batch, Stream
from modelstock_jax.data.views import EvalView, TrainView
from modelstock_jax.errors import UserError


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
    replicas: Sequence[int] | None = None,
    examples: Sequence[int] | None = None,
    view: TrainView | Sequence[TrainView] | None = None,
    loading: Loading | None = None,
) -> Iterator[Batch]:
    """Endless shuffled batches, each replica's in an order of its own.

    Every epoch is a fresh permutation that depends on (seed, replica, epoch) alone, and a view of
    an image depends on those and its index. A step's batch does not depend on the number of
    processes (each draws what its devices hold of it), of worker processes or of threads.

    Args:
      image_set: M images.
      batch_size: B, examples that a replica sees in a step, over all devices and processes.
      seed: of all permutations and views, >= 0.
      num_replicas: R.
      start_step: how many batches to leave out; the rest is as if they had been drawn.
      replicas: r of the R that this process draws for; None draws for all.
      examples: b of a batch's B places that this process draws; None draws all.
      view: what is seen of an encoded image, by all replicas or by each of the R; arrays are taken
        as they are.
      loading: how encoded images are read.

    Returns:
      Iterator of {"image": uint8 [r, b, H, W, 3], "label": int32 [r, b]}; of encoded images
      H = W = view.size.

    Raises:
      UserError: sizes that do not fit together; from the iterator, an image that cannot be read.

    >>> from modelstock_jax.data.glyphs.sets import training_set
    >>> batch = next(train_batches(training_set(size=8), batch_size=4, seed=0, num_replicas=2))
    >>> batch["image"].shape, batch["label"].shape
    ((2, 4, 24, 24, 3), (2, 4))
    """
    steps = steps_per_epoch(len(image_set), batch_size)
    for name, value, least in (
        ("seed", seed, 0),
        ("num_replicas", num_replicas, 1),
        ("start_step", start_step, 0),
    ):
        if value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")
    views = [view] if isinstance(view, TrainView) else list(view or ())
    if len(views) not in (0, 1, num_replicas):
        raise UserError(f"{len(views)} views for {num_replicas} replicas; give one, or one each")
    reader = _reader(image_set, views, loading)
    rows = _chosen("replicas", replicas, num_replicas)
    places = _chosen("examples", examples, batch_size)
    batches = _TrainBatches(image_set, batch_size, steps, seed, tuple(rows), places, reader)
    # Worker processes would each need a copy of an array.
    ahead = None if reader is None else loading
    return Stream(grain.MapDataset.source(batches)[start_step:], image_set, ahead)


@dataclasses.dataclass(frozen=True)
class _TrainBatches:
    """Random access to the batch of any step."""

    image_set: ImageSet
    batch_size: int
    steps: int
    seed: int
    replicas: tuple[int, ...]
    places: np.ndarray
    reader: Reader | None
    _orders: dict[int, tuple[int, np.ndarray]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        epoch, within = divmod(index, self.steps)
        start = within * self.batch_size
        indices = np.stack([
            self._order(replica, epoch)[start + self.places] for replica in self.replicas
        ])  # fmt: skip
        labels = self.image_set.labels
        if self.reader is None:
            return {"image": self.image_set.pixels[indices], "label": labels[indices]}
        keys = [
            (self.seed, replica, epoch)
            for replica in self.replicas
            for _ in range(indices.shape[1])
        ]
        images, shown = self.reader(indices.reshape(-1), keys, replace=True)
        return {
            "image": images.reshape(*indices.shape, *images.shape[1:]),
            "label": labels[shown.reshape(indices.shape)],
            "unreadable": indices[shown.reshape(indices.shape) != indices],
        }

    def _order(self, replica: int, epoch: int) -> np.ndarray:
        held = self._orders.get(replica)
        if held is None or held[0] != epoch:
            held = epoch, epoch_order(self.seed, replica, epoch, len(self.image_set))
            self._orders[replica] = held
        return held[1]


def eval_batches(
    image_set: ImageSet,
    batch_size: int,
    *,
    examples: Sequence[int] | None = None,
    image_size: int | None = None,
    loading: Loading | None = None,
) -> Iterator[Batch]:
    """Every image once, in order, in batches of one shape.

    Args:
      image_set: M images.
      batch_size: B, over all processes.
      examples: b of a batch's B places that this process draws; None draws all.
      image_size: side of the model's input, for encoded images: `views.EvalView`.
      loading: how encoded images are read.

    Returns:
      Iterator of ceil(M / B), on every process, of {"image": uint8 [b, H, W, 3],
      "label": int32 [b], "mask": bool [b]}; the mask is False where the last batch is padded with
      zeros, and where an unreadable image is left out.

    Raises:
      UserError: sizes that do not fit together; from the iterator, an image that cannot be read.

    >>> from modelstock_jax.data.glyphs.sets import training_set
    >>> [batch["mask"].tolist() for batch in eval_batches(training_set(size=3), 2)]
    [[True, True], [True, False]]
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    places = _chosen("examples", examples, batch_size)
    views = [] if image_size is None else [EvalView(image_size, image_set.crop_border)]
    reader = _reader(image_set, views, loading)
    batches = _EvalBatches(image_set, batch_size, places, reader)
    if reader is None:
        return (batches[number] for number in range(len(batches)))
    return Stream(grain.MapDataset.source(batches), image_set, loading)


@dataclasses.dataclass(frozen=True)
class _EvalBatches:
    """Random access to the batches of a set, the last one padded."""

    image_set: ImageSet
    batch_size: int
    places: np.ndarray
    reader: Reader | None

    def __len__(self) -> int:
        return -(-len(self.image_set) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        indices = index * self.batch_size + self.places
        mask = indices < len(self.image_set)
        batch, unreadable = {"label": self.image_set.labels[indices[mask]]}, {}
        if self.reader is None:
            batch["image"] = self.image_set.pixels[indices[mask]]
        else:
            there = indices[mask]
            batch["image"], shown = self.reader(there, [(0, 0, 0)] * len(there), replace=False)
            batch["label"] = np.where(shown < 0, 0, batch["label"])
            unreadable = {"unreadable": there[shown < 0]}
            mask[: len(there)] = shown >= 0
        for name, values in batch.items():
            padding = np.zeros((len(indices) - len(values), *values.shape[1:]), values.dtype)
            batch[name] = np.concatenate([values, padding]) if len(padding) else values
        return batch | {"mask": mask} | unreadable


def _reader(
    image_set: ImageSet, views: Sequence[TrainView | EvalView], loading: Loading | None
) -> Reader | None:
    if not isinstance(image_set.images, EncodedImages):
        return None
    if not views:
        raise UserError(f"{image_set.name}: encoded images need a size; give view or image_size")
    return Reader(image_set.images, views, views[0].size, loading or Loading())


def _chosen(name: str, chosen: Sequence[int] | None, count: int) -> np.ndarray:
    numbers = np.arange(count) if chosen is None else np.array(chosen, int)
    inside = len(numbers) and numbers.min() >= 0 and numbers.max() < count
    if not inside or (np.diff(numbers) < 1).any():
        raise UserError(f"{name}={chosen}: give numbers from 0 to {count - 1}, ascending")
    return numbers
