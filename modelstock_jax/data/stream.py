"""A Grain dataset of batches as an iterator that reads ahead."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.reader import Loading

Batch = dict[str, np.ndarray]
_log = logging.getLogger(__name__)


class Stream(Iterator):
    """Batches, read ahead by one thread, or by processes of which each makes whole batches.

    Attributes:
      unreadable: numbers of the images that were met and could not be decoded.
      close: stops reading; called by itself when the stream is let go or the interpreter ends.
    """

    def __init__(
        self, dataset: grain.MapDataset, image_set: ImageSet, loading: Loading | None = None
    ) -> None:
        """Starts reading.

        Args:
          dataset: random access to batches; an entry 'unreadable' is taken out and reported.
          image_set: that they are made of.
          loading: how far ahead, and by whom.
        """
        loading = loading or Loading()
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
