"""Batches for training and evaluation: deterministic, sharded, resumed by a step number.

A batch is one element of a Grain dataset: its images are gathered at once, since Grain's cost
for each element (20 us, images or bare indices) would exceed a small model's training step.
Encoded images are decoded within the batch by the threads of a `BatchDecoder`.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from absl import flags

from modelstock_jax.data.image_set import EncodedImages, ImageSet
from modelstock_jax.data.transforms import EvalTransform, TrainTransform, Unreadable
from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.machine import usable_cores

Batch = dict[str, np.ndarray]
_log = logging.getLogger(__name__)
UNREADABLE = ("error", "skip")
_PARTS_A_THREAD = 4  # so that a thread with large images does not hold up the others

Transform = Callable[[bytes | np.ndarray, np.random.Generator], np.ndarray]
Key = tuple[int, int, int]  # (seed, replica, epoch)


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How encoded images are read; the batches do not depend on the first three.

    Attributes:
      threads: that decode in each process; 0 means one a core, shared out among the processes.
      workers: processes that decode beside this one; 0 decodes in this process. Decoding and
        resizing, nine tenths of the time, let go of Python's lock: processes are for many cores.
      prefetch: batches held ready.
      unreadable: an image that cannot be decoded is an 'error', or 'skip': in training the next
        readable one takes its place, in evaluation it does not count; the log names it.

    Raises:
      UserError: a value out of its range.
    """

    threads: int = 0
    workers: int = 0
    prefetch: int = 2
    unreadable: str = "error"

    def __post_init__(self):
        """Checks the ranges."""
        for name, least in (("threads", 0), ("workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        check_choice("unreadable", self.unreadable, UNREADABLE)

    @property
    def num_threads(self) -> int:
        """Threads of one process."""
        return self.threads or max(1, usable_cores() // max(1, self.workers))


def train_batches(
    image_set: ImageSet,
    *,
    batch_size: int,
    seed: int,
    num_replicas: int,
    start_step: int = 0,
    replicas: Sequence[int] | None = None,
    examples: Sequence[int] | None = None,
    transform: TrainTransform | Sequence[TrainTransform] | None = None,
    loader: LoaderOptions | None = None,
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
      transform: what is seen of an encoded image, by all replicas or by each of the R; arrays are taken
        as they are.
      loader: how encoded images are read.

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
    views = [transform] if isinstance(transform, TrainTransform) else list(transform or ())
    if len(views) not in (0, 1, num_replicas):
        raise UserError(f"{len(views)} views for {num_replicas} replicas; give one, or one each")
    reader = _reader(image_set, views, loader)
    rows = _chosen("replicas", replicas, num_replicas)
    places = _chosen("examples", examples, batch_size)
    batches = _TrainBatches(image_set, batch_size, steps, seed, tuple(rows), places, reader)
    # Worker processes would each need a copy of an array.
    ahead = None if reader is None else loader
    return PrefetchIterator(grain.MapDataset.source(batches)[start_step:], image_set, ahead)


@dataclasses.dataclass(frozen=True)
class _TrainBatches:
    """Random access to the batch of any step."""

    image_set: ImageSet
    batch_size: int
    steps: int
    seed: int
    replicas: tuple[int, ...]
    places: np.ndarray
    reader: BatchDecoder | None
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


def eval_batches(
    image_set: ImageSet,
    batch_size: int,
    *,
    examples: Sequence[int] | None = None,
    image_size: int | None = None,
    loader: LoaderOptions | None = None,
) -> Iterator[Batch]:
    """Every image once, in order, in batches of one shape.

    Args:
      image_set: M images.
      batch_size: B, over all processes.
      examples: b of a batch's B places that this process draws; None draws all.
      image_size: side of the model's input, for encoded images: `transforms.EvalTransform`.
      loader: how encoded images are read.

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
    views = [] if image_size is None else [EvalTransform(image_size, image_set.crop_border)]
    reader = _reader(image_set, views, loader)
    batches = _EvalBatches(image_set, batch_size, places, reader)
    if reader is None:
        return (batches[number] for number in range(len(batches)))
    return PrefetchIterator(grain.MapDataset.source(batches), image_set, loader)


@dataclasses.dataclass(frozen=True)
class _EvalBatches:
    """Random access to the batches of a set, the last one padded."""

    image_set: ImageSet
    batch_size: int
    places: np.ndarray
    reader: BatchDecoder | None

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
    image_set: ImageSet,
    views: Sequence[TrainTransform | EvalTransform],
    loading: LoaderOptions | None,
) -> BatchDecoder | None:
    if not isinstance(image_set.images, EncodedImages):
        return None
    if not views:
        raise UserError(f"{image_set.name}: encoded images need a size; give view or image_size")
    return BatchDecoder(image_set.images, views, views[0].size, loading or LoaderOptions())


def _chosen(name: str, chosen: Sequence[int] | None, count: int) -> np.ndarray:
    numbers = np.arange(count) if chosen is None else np.array(chosen, int)
    inside = len(numbers) and numbers.min() >= 0 and numbers.max() < count
    if not inside or (np.diff(numbers) < 1).any():
        raise UserError(f"{name}={chosen}: give numbers from 0 to {count - 1}, ascending")
    return numbers


# Reading many stored images at once, by threads, as one array.


def example_rng(key: Key, index: int) -> np.random.Generator:
    """The random numbers of one example: a function of (seed, replica, epoch, index) alone."""
    return np.random.default_rng(np.random.SeedSequence(key, spawn_key=(index,)))


class BatchDecoder:
    """Stored images as a batch of views.

    A copy that is sent to another process starts threads of its own.
    """

    def __init__(
        self, images: EncodedImages, views: Sequence[Transform], size: int, loading: LoaderOptions
    ) -> None:
        """Opens nothing.

        Args:
          images: M stored images; a set that is already decoded gives uint8 [H, W, 3].
          views: (stored image, rng) -> uint8 [size, size, 3], one for all replicas or one each.
          size: S, pixels.
          loading: threads, and what happens to unreadable images.
        """
        self._images, self._views, self._size, self._loading = images, views, size, loading
        self._pool = None

    def __getstate__(self):
        return self.__dict__ | {"_pool": None}

    def __call__(
        self, indices: np.ndarray, keys: Sequence[Key], *, replace: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The views of some images.

        Args:
          indices: int [N].
          keys: N of what their random numbers depend on beside the index.
          replace: whether, with `unreadable='skip'`, another image stands in for an unreadable one.

        Returns:
          uint8 [N, S, S, 3], and int64 [N]: the images that they are views of, in place of an
          unreadable one the next readable, or -1 and zeros without `replace`.

        Raises:
          UserError: an image that cannot be read, named; or none that can.
        """
        out = np.zeros((len(indices), self._size, self._size, 3), np.uint8)
        shown = np.array(indices, np.int64)

        def fill(places: range) -> None:
            for place in places:
                index = int(indices[place])
                shown[place] = self._one(out[place], index, keys[place], replace)

        threads = self._loading.num_threads
        step = max(1, len(indices) // (threads * _PARTS_A_THREAD))
        parts = [
            range(start, min(start + step, len(indices))) for start in range(0, len(indices), step)
        ]
        if threads == 1:
            for part in parts:
                fill(part)
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
            for _ in self._pool.map(fill, parts):
                pass  # Raises what a thread has raised.
        return out, shown

    def _one(self, out: np.ndarray, index: int, key: Key, replace: bool) -> int:
        count, view = len(self._images), self._views[key[1] % len(self._views)]
        for other in range(index, index + (count if replace else 1)):
            try:
                # The numbers of the image asked for: its stand-in looks unlike its own view.
                out[...] = view(self._images[other % count], example_rng(key, index))
            except Unreadable as error:
                if self._loading.unreadable == "error":
                    raise UserError(
                        f"{self._images.name(other % count)}: image {other % count} cannot be "
                        f"decoded ({error}); replace it, remove it, or leave such images out with "
                        "--config.data.loader.unreadable=skip"
                    ) from error
            else:
                return other % count
        if replace:
            raise UserError(f"none of the {count} images can be decoded")
        return -1


# A Grain dataset of batches as an iterator that reads ahead.


class PrefetchIterator(Iterator):
    """Batches, read ahead by one thread, or by processes of which each makes whole batches.

    Attributes:
      unreadable: numbers of the images that were met and could not be decoded.
      close: stops reading; called by itself when the stream is let go or the interpreter ends.
    """

    def __init__(
        self, dataset: grain.MapDataset, image_set: ImageSet, loading: LoaderOptions | None = None
    ) -> None:
        """Starts reading.

        Args:
          dataset: random access to batches; an entry 'unreadable' is taken out and reported.
          image_set: that they are made of.
          loading: how far ahead, and by whom.
        """
        loading = loading or LoaderOptions()
        self.unreadable: set[int] = set()
        self._image_set = image_set
        self._workers = loading.workers
        prefetch = 1 if self._workers else loading.prefetch
        reading = dataset.to_iter_dataset(grain.ReadOptions(1, prefetch))
        if self._workers:
            # Grain hands the command line's flags to its processes; a notebook or a test has none.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            held = -(-loading.prefetch // self._workers)
            reading = reading.mp_prefetch(grain.MultiprocessingOptions(self._workers, held))
        # Closed and dropped before the interpreter takes its modules apart: Grain's threads and
        # processes would else end with a trace each.
        self._batches = [iter(reading)]
        self.close = weakref.finalize(self, lambda batches: batches.pop().close(), self._batches)

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          StopIteration: at the end, or after `close`.
        """
        if not self._batches:
            raise StopIteration
        batch = next(self._batches[0])
        if self._workers:  # Shared memory, which must not outlive the processes.
            batch = {name: np.array(values) for name, values in batch.items()}
        for index in batch.pop("unreadable", np.zeros(0, int)).tolist():
            if index not in self.unreadable:
                self.unreadable.add(index)
                _log.warning(
                    "%s: left out, since it cannot be decoded (image %d of %s, %d such so far)",
                    self._image_set.encoded.name(index),
                    index,
                    self._image_set.name,
                    len(self.unreadable),
                )
        return batch
