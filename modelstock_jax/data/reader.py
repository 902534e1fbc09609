"""Reading many stored images at once, by threads, as one array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from modelstock_jax.data.decode import Unreadable
from modelstock_jax.data.image_set import EncodedImages
from modelstock_jax.errors import UserError
from modelstock_jax.machine import usable_cores

_PARTS_A_THREAD = 4  # so that a thread with large images does not hold up the others

View = Callable[[bytes | np.ndarray, np.random.Generator], np.ndarray]
Key = tuple[int, int, int]  # (seed, replica, epoch)


@dataclasses.dataclass(frozen=True)
class Loading:
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
        if self.unreadable not in ("error", "skip"):
            raise UserError(f"unreadable={self.unreadable!r}: choose 'error' or 'skip'")

    @property
    def num_threads(self) -> int:
        """Threads of one process."""
        return self.threads or max(1, usable_cores() // max(1, self.workers))


def example_rng(key: Key, index: int) -> np.random.Generator:
    """The random numbers of one example: a function of (seed, replica, epoch, index) alone."""
    return np.random.default_rng(np.random.SeedSequence(key, spawn_key=(index,)))


class Reader:
    """Stored images as a batch of views.

    A copy that is sent to another process starts threads of its own.
    """

    def __init__(
        self, images: EncodedImages, views: Sequence[View], size: int, loading: Loading
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
                        "--config.data.loading.unreadable=skip"
                    ) from error
            else:
                return other % count
        if replace:
            raise UserError(f"none of the {count} images can be decoded")
        return -1
