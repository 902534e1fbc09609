"""TIES-Merging (2306.01708): trim, elect signs, mean of those that agree; in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

Reduce = Callable[[Callable[[np.ndarray, np.ndarray], np.ndarray]], np.ndarray]

_HALF = 2**16


@dataclasses.dataclass(frozen=True)
class Trim:
    """What TIES keeps of a unit, and how it weighs it.

    Attributes:
        least: Bits of the least magnitude that is kept of each task vector, [N] uint32.
        weights: [N].
        scale: Lambda.
        normalize: Whether to divide by the weights of those that agree.
    """

    least: np.ndarray
    weights: np.ndarray
    scale: float
    normalize: bool

    def merge(self, deltas: np.ndarray) -> np.ndarray:
        """Lambda sum_i c_i d_i / sum_i c_i, over the kept d_i whose sign is the sum's; [N, n]."""
        kept = np.zeros(deltas.shape, deltas.dtype)
        for row, delta, least, weight in zip(kept, deltas, self.least, self.weights, strict=True):
            np.multiply(delta, deltas.dtype.type(weight), out=row, where=magnitude(delta) >= least)
        agree = np.where(kept.sum(axis=0) >= 0, kept > 0, kept < 0)
        merged = np.where(agree, kept, 0).sum(axis=0)
        if self.normalize:
            weights = self.weights.astype(deltas.dtype)[:, None]
            divisor = np.where(agree, weights, 0).sum(axis=0)
            merged /= np.where(np.abs(divisor) < 1e-8, 1, divisor)
        merged *= deltas.dtype.type(self.scale)
        return merged


def magnitude(delta: np.ndarray) -> np.ndarray:
    """Bits of |d| as float32: whole numbers in the order of the magnitudes.

    Example:
        >>> magnitude(np.array([-2.0, 1.0, 0.0])).argsort().tolist()
        [2, 1, 0]
    """
    return delta.astype(np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)


def measure_trim(
    reduce: Reduce,
    count: int,
    density: Sequence[float] | np.ndarray,
    weights: np.ndarray,
    scale: float,
    normalize: bool,
) -> Trim:
    """Finds the magnitude of the k-th largest number of each task vector, k = density * count.

    Exact, by two histograms of the magnitudes' bits (upper half, then lower half within the bin
    that holds the k-th). Numbers as large as the k-th are all kept.

    Args:
        reduce: Sums a function of (w0 [n], deltas [N, n]) over the unit's pieces.
        count: Numbers in the unit.
        density: In (0, 1], one a task vector.
        weights: [N].
        scale: Lambda.
        normalize: See `Trim`.
    """
    least = np.zeros(len(weights), np.uint32)
    if min(density) < 1:
        ranks = np.maximum(1, (np.asarray(density) * count).astype(np.int64))
        upper, left = _select(reduce(lambda _, d: _histogram(magnitude(d) >> 16)), ranks)

        def within(_, deltas):
            bits = magnitude(deltas)
            return np.stack([_counts(b[b >> 16 == u] & 0xFFFF)
                             for b, u in zip(bits, upper, strict=True)])

        lower, _ = _select(reduce(within), left)
        least = (upper << 16 | lower).astype(np.uint32)
        least[np.asarray(density) >= 1] = 0
    return Trim(least, weights, scale, normalize)


def _histogram(halves: np.ndarray) -> np.ndarray:
    return np.stack([_counts(row) for row in halves])


def _counts(halves: np.ndarray) -> np.ndarray:
    return np.bincount(halves, minlength=_HALF)


def _select(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bin of the k-th largest, [N], and its rank among the numbers of that bin."""
    above = counts[:, ::-1].cumsum(axis=1)
    place = (above >= ranks[:, None]).argmax(axis=1)
    before = np.where(place > 0, above[np.arange(len(place)), place - 1], 0)
    return (counts.shape[1] - 1 - place).astype(np.uint32), ranks - before
