"""Batches for training and evaluation: deterministic, sharded, resumable from a step number.

A batch is one element of a Grain dataset: all its images are gathered at once, because Grain's
overhead per element (20 us, for images and for bare indices) would exceed a small model's training
step. Encoded images are decoded within the batch by the threads of a `BatchDecoder`.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from absl import flags

from modelstock_jax.data.image_set import EncodedImages, ImageSet
from modelstock_jax.data.randaugment import ENCODED
from modelstock_jax.data.transforms import EvalTransform, TrainTransform, Unreadable
from modelstock_jax.data.views import GEOMETRY
from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.machine import usable_cores

Batch = dict[str, np.ndarray]
_log = logging.getLogger(__name__)
UNREADABLE = ("error", "skip")
_CHUNKS_PER_THREAD = 4  # Balances the load: one thread with large images does not delay the batch.

Key = tuple[int, int, int]  # (seed, replica, epoch)


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How encoded images are read; the batches do not depend on the first three options.

    Attributes:
      threads: decoding threads per process; 0 uses one per core, divided among the processes
      workers: worker processes that decode; 0 decodes in the main process. Decoding and resizing,
        nine tenths of the time, release the GIL, so worker processes help only with many cores.
      prefetch: batches to prefetch
      unreadable: what to do if an image cannot be decoded: 'error', or 'skip'. With 'skip', the
        next readable image replaces it in training, and evaluation does not count it; the log
        names it.

    Raises:
      UserError: a value is out of range
    """

    threads: int = 0
    workers: int = 0
    prefetch: int = 2
    unreadable: str = "error"

    def __post_init__(self):
        """Check the ranges."""
        for name, minimum in (("threads", 0), ("workers", 0), ("prefetch", 1)):
            if getattr(self, name) < minimum:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {minimum}")
        check_choice("unreadable", self.unreadable, UNREADABLE)

    @property
    def num_threads(self) -> int:
        """The number of decoding threads per process."""
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
    """Return an endless iterator over shuffled batches, in a separate order for each replica.

    The order of each epoch is a permutation that depends only on (seed, replica, epoch). The crop
    and augmentation of an image depend only on (seed, replica, epoch, index). The batch of a step
    does not depend on the number of processes (each process reads the part of its devices), worker
    processes or threads.

    Args:
      image_set: M images
      batch_size: B, examples per replica and step, over all devices and processes
      seed: seed of all permutations and transforms, >= 0
      num_replicas: R
      start_step: number of batches to skip; the following batches do not depend on it
      replicas: the r of R replicas that this process reads; None reads all
      examples: the b of B positions in a batch that this process reads; None reads all
      transform: transform of encoded images, one for all replicas or one for each of the R;
        image arrays are not transformed
      loader: how encoded images are read

    Returns:
      Iterator of {"image": uint8 [r, b, H, W, 3], "label": int32 [r, b]}; for encoded images,
      H = W = transform.size. With `transform.resize_on='device'`, the images are canvases that
      contain a `View`; "geometry" float32 [r, b, 12] and, if any transform has RandAugment,
      "operations" int32 [r, b, n, 8] are added (`device_resize.resize_batch`).

    Raises:
      UserError: sizes do not match, or (from the iterator) an image cannot be read

    >>> from modelstock_jax.data.glyphs.sets import training_set
    >>> batch = next(train_batches(training_set(size=8), batch_size=4, seed=0, num_replicas=2))
    >>> batch["image"].shape, batch["label"].shape
    ((2, 4, 24, 24, 3), (2, 4))
    """
    steps = steps_per_epoch(len(image_set), batch_size)
    for name, value, minimum in (
        ("seed", seed, 0),
        ("num_replicas", num_replicas, 1),
        ("start_step", start_step, 0),
    ):
        if value < minimum:
            raise UserError(f"{name} is {value}: it must be at least {minimum}")
    transforms = [transform] if isinstance(transform, TrainTransform) else list(transform or ())
    if len(transforms) not in (0, 1, num_replicas):
        raise UserError(
            f"{len(transforms)} transforms for {num_replicas} replicas; give one, or one for each"
        )
    decoder = _make_decoder(image_set, transforms, loader)
    rows = _check_indices("replicas", replicas, num_replicas)
    positions = _check_indices("examples", examples, batch_size)
    batches = _TrainBatches(image_set, batch_size, steps, seed, tuple(rows), positions, decoder)
    # An image array is read without worker processes: each of them would need a copy.
    loader = None if decoder is None else loader
    return PrefetchIterator(grain.MapDataset.source(batches)[start_step:], image_set, loader)


@dataclasses.dataclass(frozen=True)
class _TrainBatches:
    """Random access to the batch of any step."""

    image_set: ImageSet
    batch_size: int
    steps: int
    seed: int
    replicas: tuple[int, ...]
    positions: np.ndarray
    decoder: BatchDecoder | None
    _orders: dict[int, tuple[int, np.ndarray]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        epoch, step_in_epoch = divmod(index, self.steps)
        start = step_in_epoch * self.batch_size
        indices = np.stack([
            self._order(replica, epoch)[start + self.positions] for replica in self.replicas
        ])  # fmt: skip
        labels = self.image_set.labels
        if self.decoder is None:
            return {"image": self.image_set.pixels[indices], "label": labels[indices]}
        keys = [
            (self.seed, replica, epoch)
            for replica in self.replicas
            for _ in range(indices.shape[1])
        ]
        arrays, decoded = self.decoder(indices.reshape(-1), keys, replace=True)
        return {
            **{name: x.reshape(*indices.shape, *x.shape[1:]) for name, x in arrays.items()},
            "label": labels[decoded.reshape(indices.shape)],
            "unreadable": indices[decoded.reshape(indices.shape) != indices],
        }

    def _order(self, replica: int, epoch: int) -> np.ndarray:
        cached = self._orders.get(replica)
        if cached is None or cached[0] != epoch:
            cached = epoch, epoch_order(self.seed, replica, epoch, len(self.image_set))
            self._orders[replica] = cached
        return cached[1]


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Return the number of full batches per epoch; an epoch leaves out the remaining examples.

    Args:
      num_examples: M
      batch_size: examples per replica and step, over all devices

    Returns:
      M // batch_size.

    Raises:
      UserError: the batch is empty or larger than the dataset

    >>> steps_per_epoch(4096, 128)
    32
    """
    if not 1 <= batch_size <= num_examples:
        raise UserError(
            f"batch_size is {batch_size}: it must be between 1 and the {num_examples} examples "
            "of the training set"
        )
    return num_examples // batch_size


def epoch_order(seed: int, replica: int, epoch: int, num_examples: int) -> np.ndarray:
    """Return the order of a replica's examples in an epoch: a permutation, int32 [M].

    Each process stores it for each of its replicas: 5 MB for ImageNet.
    """
    rng = np.random.default_rng((seed, replica, epoch))
    return rng.permutation(num_examples).astype(np.int32)


def eval_batches(
    image_set: ImageSet,
    batch_size: int,
    *,
    examples: Sequence[int] | None = None,
    transform: EvalTransform | None = None,
    loader: LoaderOptions | None = None,
) -> Iterator[Batch]:
    """Return an iterator over every image once, in order, in batches of one shape.

    Args:
      image_set: M images
      batch_size: B, over all processes
      examples: the b of B positions in a batch that this process reads; None reads all
      transform: transform of encoded images, after the set's border is cropped; image arrays are
        not transformed
      loader: how encoded images are read

    Returns:
      Iterator of ceil(M / B) batches on every process: {"image": uint8 [b, H, W, 3],
      "label": int32 [b], "mask": bool [b]}; for encoded images, H = W = transform.size, or
      canvases and "geometry" as in `train_batches`. The mask is False for the zero padding of the
      last batch and for unreadable images that are left out.

    Raises:
      UserError: sizes do not match, or (from the iterator) an image cannot be read

    >>> from modelstock_jax.data.glyphs.sets import training_set
    >>> [batch["mask"].tolist() for batch in eval_batches(training_set(size=3), 2)]
    [[True, True], [True, False]]
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    positions = _check_indices("examples", examples, batch_size)
    transforms: list[EvalTransform] = []
    if transform is not None:
        transforms = [dataclasses.replace(transform, border=image_set.crop_border)]
    decoder = _make_decoder(image_set, transforms, loader)
    batches = _EvalBatches(image_set, batch_size, positions, decoder)
    if decoder is None:
        return (batches[number] for number in range(len(batches)))
    return PrefetchIterator(grain.MapDataset.source(batches), image_set, loader)


@dataclasses.dataclass(frozen=True)
class _EvalBatches:
    """Random access to the batches of a dataset; the last one is padded."""

    image_set: ImageSet
    batch_size: int
    positions: np.ndarray
    decoder: BatchDecoder | None

    def __len__(self) -> int:
        return -(-len(self.image_set) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        indices = index * self.batch_size + self.positions
        mask = indices < len(self.image_set)
        valid = indices[mask]
        batch, unreadable = {"label": self.image_set.labels[valid]}, {}
        if self.decoder is None:
            batch["image"] = self.image_set.pixels[valid]
        else:
            keys = [(0, 0, 0)] * len(valid)
            arrays, decoded = self.decoder(valid, keys, replace=False)
            batch |= arrays
            batch["label"] = np.where(decoded < 0, 0, batch["label"])
            unreadable = {"unreadable": valid[decoded < 0]}
            mask[: len(valid)] = decoded >= 0
        for name, values in batch.items():
            padding = np.zeros((len(indices) - len(values), *values.shape[1:]), values.dtype)
            batch[name] = np.concatenate([values, padding]) if len(padding) else values
        return batch | {"mask": mask} | unreadable


def _make_decoder(
    image_set: ImageSet,
    transforms: Sequence[TrainTransform | EvalTransform],
    loader: LoaderOptions | None,
) -> BatchDecoder | None:
    if not isinstance(image_set.images, EncodedImages):
        return None
    if not transforms:
        raise UserError(f"{image_set.name}: encoded images need a size; give transform")
    return BatchDecoder(image_set.images, transforms, loader or LoaderOptions())


def _check_indices(name: str, values: Sequence[int] | None, count: int) -> np.ndarray:
    indices = np.arange(count) if values is None else np.array(values, int)
    in_range = len(indices) and indices.min() >= 0 and indices.max() < count
    if not in_range or (np.diff(indices) < 1).any():
        raise UserError(f"{name}={values}: give integers from 0 to {count - 1}, ascending")
    return indices


def example_rng(key: Key, index: int) -> np.random.Generator:
    """Return the random generator of one example, a function of (seed, replica, epoch, index)."""
    return np.random.default_rng(np.random.SeedSequence(key, spawn_key=(index,)))


class BatchDecoder:
    """Decodes and transforms batches of stored images in parallel threads.

    A copy that is sent to another process starts its own threads.
    """

    def __init__(
        self,
        images: EncodedImages,
        transforms: Sequence[TrainTransform | EvalTransform],
        loader: LoaderOptions,
    ) -> None:
        """Store the arguments; open no file and start no thread.

        Args:
          images: M stored images: bytes, or uint8 [H, W, 3] if they are already decoded
          transforms: one for all replicas or one per replica, of the same size
          loader: number of threads, and what to do with unreadable images
        """
        self._images, self._transforms = images, transforms
        self._loader = loader
        self._pool: ThreadPoolExecutor | None = None
        first = transforms[0]
        self._canvas = None
        if first.resize_on == "device":
            self._canvas = first.canvas_side(images.sizes())
        self._side = self._canvas or first.size
        self._operations = max(transform.randaugment_ops for transform in transforms)

    def __getstate__(self) -> dict[str, object]:
        """Return the state without the threads."""
        return self.__dict__ | {"_pool": None}

    def __call__(
        self, indices: np.ndarray, keys: Sequence[Key], *, replace: bool
    ) -> tuple[Batch, np.ndarray]:
        """Return the transformed images of a batch, or their views for the device.

        Args:
          indices: int [N]
          keys: N keys, which together with the index seed the random transforms
          replace: whether, with `unreadable='skip'`, another image replaces an unreadable one

        Returns:
          {"image": uint8 [N, S, S, 3]}, or canvases uint8 [N, C, C, 3] and the other arrays of
          `View.store`; and int64 [N], the indices of the decoded images. For an unreadable image
          this is the index of the next readable one, or, without `replace`, -1 (its pixels are
          zeros).

        Raises:
          UserError: an image cannot be read (the message names it), or no image can
        """
        arrays: Batch = {"image": np.zeros((len(indices), self._side, self._side, 3), np.uint8)}
        if self._canvas:
            arrays["geometry"] = np.zeros((len(indices), GEOMETRY), np.float32)
        if self._canvas and self._operations:
            shape = (len(indices), self._operations, ENCODED)
            arrays["operations"] = np.zeros(shape, np.int32)
        decoded = np.array(indices, np.int64)

        def fill(positions: range) -> None:
            for position in positions:
                index = int(indices[position])
                out = {name: array[position] for name, array in arrays.items()}
                decoded[position] = self._decode(out, index, keys[position], replace)

        threads = self._loader.num_threads
        step = max(1, len(indices) // (threads * _CHUNKS_PER_THREAD))
        chunks = [
            range(start, min(start + step, len(indices))) for start in range(0, len(indices), step)
        ]
        if threads == 1:
            for chunk in chunks:
                fill(chunk)
        else:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
            for _ in self._pool.map(fill, chunks):
                pass  # Reraises the exception of a thread.
        return arrays, decoded

    def _decode(self, out: Batch, index: int, key: Key, replace: bool) -> int:
        count, transform = len(self._images), self._transforms[key[1] % len(self._transforms)]
        for other in range(index, index + (count if replace else 1)):
            try:
                # Uses the random numbers of `index`, so that a replacement differs from the
                # replacing image's own example.
                stored, rng = self._images[other % count], example_rng(key, index)
                if self._canvas:
                    transform.view(stored, rng, self._canvas).store(out, transform.size)
                else:
                    out["image"][...] = transform(stored, rng)
            except Unreadable as error:
                if self._loader.unreadable == "error":
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


class PrefetchIterator(Iterator):
    """Batches, prefetched by one thread, or by worker processes that each build complete batches.

    Attributes:
      unreadable: indices of the images read so far that could not be decoded
      close: stops reading; also called when the iterator is garbage collected or Python exits
    """

    def __init__(
        self, dataset: grain.MapDataset, image_set: ImageSet, loader: LoaderOptions | None = None
    ) -> None:
        """Start reading.

        Args:
          dataset: random access to batches; an entry 'unreadable' is removed and logged
          image_set: the source of the batches
          loader: number of worker processes and of batches to prefetch
        """
        loader = loader or LoaderOptions()
        self.unreadable: set[int] = set()
        self._image_set = image_set
        self._workers = loader.workers
        prefetch = 1 if self._workers else loader.prefetch
        batches = dataset.to_iter_dataset(grain.ReadOptions(1, prefetch))
        if self._workers:
            # Grain passes absl flags to its processes; notebooks and tests have not parsed any.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            per_worker = -(-loader.prefetch // self._workers)
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(self._workers, per_worker))
        # Closed before Python shuts down: otherwise each of Grain's threads and processes prints a
        # traceback.
        self._batches = [iter(batches)]
        self.close = weakref.finalize(self, lambda batches: batches.pop().close(), self._batches)

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
          StopIteration: at the end, or after `close`
        """
        if not self._batches:
            raise StopIteration
        batch = next(self._batches[0])
        if self._workers:  # Copied, because the shared memory must not outlive the processes.
            batch = {name: np.array(values) for name, values in batch.items()}
        for index in batch.pop("unreadable", np.zeros(0, int)).tolist():
            if index not in self.unreadable:
                self.unreadable.add(index)
                _log.warning(
                    "%s: left out because it cannot be decoded (image %d of %s; %d so far)",
                    self._image_set.encoded.name(index),
                    index,
                    self._image_set.name,
                    len(self.unreadable),
                )
        return batch
