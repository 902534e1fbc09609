"""Merge methods that treat each element by itself: sparse task vectors, elected signs, swaps.

A method is a `Combination`: the merged weights of a piece from the weights of all models. What it
must know of the complete merge unit (a threshold, a count) is measured first, in bounded memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from modelstock_jax.merging import philox


class Place(NamedTuple):
    """Position of a piece.

    Attributes:
      name: name of the tensor
      start: index of its first element in the tensor
      row: number of elements of a row, which is along the last axis of the tensor
    """

    name: str
    start: int
    row: int


# The weights of a piece: (w0 [n], task vectors [N, n], place), both in float64.
OfPiece = Callable[[np.ndarray, np.ndarray, Place], np.ndarray]
Reduce = Callable[[OfPiece], np.ndarray]


class Combination(Protocol):
    """Merged weights of a piece, [n] float64."""

    def __call__(self, w0: np.ndarray, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the merged weights from w0 [n] and the task vectors [N, n], both float64."""


class Sparsifier(Protocol):
    """Task vectors of a piece with most elements set to 0, [N, n]."""

    def __call__(self, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the sparse task vectors; `deltas` are not changed."""


@dataclasses.dataclass(frozen=True)
class SparseSum:
    """w0 + lambda sum_i c_i s_i, where s_i are sparse task vectors.

    Attributes:
      sparsify: returns the s_i
      weights: c_i, [N]
      scale: lambda
      elect: add only the elements that have the sign of sum_i c_i s_i (TIES, arXiv 2306.01708)
      normalize: divide by the sum of the weights, with `elect` of those that agree in sign
    """

    sparsify: Sparsifier
    weights: np.ndarray
    scale: float = 1.0
    elect: bool = False
    normalize: bool = False

    def __call__(self, w0: np.ndarray, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the merged weights of a piece, [n]."""
        terms = self.sparsify(deltas, place)
        for term, weight in zip(terms, self.weights, strict=True):
            term *= weight
        if self.elect:
            merged, divisor = elected_sum(terms, self.weights if self.normalize else None)
        else:
            merged, divisor = terms.sum(axis=0), self.weights.sum()
        if self.normalize and divisor is not None:
            is_zero = np.abs(divisor) < 1e-8
            merged /= divisor * ~is_zero + is_zero
        merged *= self.scale
        return np.add(w0, merged, out=merged)


# Products with masks below: `np.where` with random masks takes ten times as long.
def elected_sum(
    terms: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the sum of the elements that have the sign of the sum of all, TIES' elected sign.

    Args:
      terms: [N, n]; the sign of a sum of 0 is positive
      weights: [N]

    Returns:
      [n], and the sum of the weights of the terms that agree, [n]; None without weights.

    Example:
      >>> elected_sum(np.array([[2.0, -1.0], [1.0, 3.0], [-1.0, -4.0]]), np.ones(3))
      (array([ 3., -5.]), array([2., 2.]))
    """
    positive, negative = np.maximum(terms[0], 0), np.minimum(terms[0], 0)
    for term in terms[1:]:
        positive += np.maximum(term, 0)
        negative += np.minimum(term, 0)
    up = positive + negative >= 0
    divisor = None
    if weights is not None:
        divisor = np.zeros_like(positive)
        for term, weight in zip(terms, weights, strict=True):
            divisor += weight * ((term > 0) & up | (term < 0) & ~up)
    positive *= up
    negative *= ~up
    positive += negative
    return positive, divisor


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """The elements whose magnitude is in a range (TIES, Model Breadcrumbs).

    Attributes:
      lower: bits of the smallest magnitude that remains in each task vector, [N] int64
      upper: bits of the largest, [N] int64
      factor: what the remaining elements are multiplied by, [N]
    """

    lower: np.ndarray
    upper: np.ndarray
    factor: np.ndarray

    def __call__(self, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the sparse task vectors of a piece, [N, n]."""
        sparse = np.empty_like(deltas)
        for row, delta, lower, upper, factor in zip(
            sparse, deltas, self.lower, self.upper, self.factor, strict=True
        ):
            bits = magnitude(delta)
            np.multiply(delta, (bits >= lower) & (bits <= upper), out=row)
            if factor != 1:
                row *= factor
        return sparse


@dataclasses.dataclass(frozen=True)
class RandomElements:
    """Random elements (DARE, arXiv 2311.03099; DELLA, arXiv 2406.11617).

    An element remains with probability p, and is then divided by p. DARE has one p for all
    elements. DELLA ranks the magnitudes of each row, and p grows with the rank, linearly from
    density - epsilon to density + epsilon.

    Attributes:
      seed: seed of the merge
      density: mean p of each task vector, [N]
      rescale: divide by p, so that the expected task vector is the complete one
      epsilon: of each task vector, [N]; None for DARE
    """

    seed: int
    density: np.ndarray
    rescale: bool
    epsilon: np.ndarray | None = None

    def __call__(self, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the sparse task vectors of a piece, [N, n]; with epsilon it has complete rows."""
        sparse = np.empty_like(deltas)
        for i, (row, delta, density) in enumerate(zip(sparse, deltas, self.density, strict=True)):
            p = np.float64(density)
            if self.epsilon is not None and 0 < density < 1:
                p = p + self.epsilon[i] * (2 * relative_ranks(delta, place.row) - 1)
            key = philox.key(self.seed, i, place.name)
            words = philox.range_of_words(place.start, place.start + len(delta), key)
            np.multiply(delta, words < philox.below(p), out=row)
            if self.rescale and density > 0:
                row /= p
        return sparse


def relative_ranks(values: np.ndarray, row: int) -> np.ndarray:
    """Return the rank of each magnitude in its row, from 0 (smallest) to 1, [n].

    Equal magnitudes are ranked in the order of their elements; the only element of a row has 1/2.

    Args:
      values: [n]
      row: number of elements of a row

    Example:
      >>> relative_ranks(np.array([3.0, -1.0, 2.0, 5.0, 0.0, -7.0]), 3).tolist()
      [1.0, 0.0, 0.5, 0.5, 0.0, 1.0]
    """
    if row < 2:
        return np.full(len(values), 0.5)
    order = np.abs(values).reshape(-1, row).argsort(axis=1, kind="stable")
    ranks = np.empty(order.shape)
    np.put_along_axis(ranks, order, np.arange(row) / (row - 1), axis=1)
    return ranks.reshape(-1)


def everything(number: int) -> Magnitudes:
    """Return the sparsifier that keeps all elements of N task vectors."""
    upper = np.full(number, np.iinfo(np.int64).max)
    return Magnitudes(np.zeros(number, np.int64), upper, np.ones(number))


def magnitude_range(
    reduce: Reduce, smallest: Sequence[int], largest: Sequence[int], *, rescale: bool
) -> Magnitudes:
    """Measure the range of the magnitudes from one rank to another of each task vector.

    Args:
      reduce: sums a function of the pieces over the unit
      smallest: rank of the smallest magnitude that remains, counted from 1 for the largest; 0 if
        no element remains
      largest: rank of the largest that remains
      rescale: multiply so that the sum of magnitudes does not change
    """
    number, ranks = len(smallest), [max(rank, 1) for rank in (*smallest, *largest)]
    if max(largest) > 1:
        bits = kth_largest(reduce, lambda _, deltas, __: np.tile(deltas, (2, 1)), ranks)
        lower, upper = bits[:number], bits[number:]
    else:
        lower = kth_largest(reduce, lambda _, deltas, __: deltas, ranks[:number])
        upper = np.full(number, np.iinfo(np.int64).max)
    lower = np.where(np.array(smallest) > 0, lower, np.iinfo(np.int64).max)
    chosen = Magnitudes(lower, upper, np.ones(number))
    if not rescale:
        return chosen
    before, after = reduce(
        lambda _, deltas, place: np.abs([deltas, chosen(deltas, place)]).sum(axis=-1)
    )
    is_empty = (before < 1e-7) | (after < 1e-7)
    factor = np.where(is_empty, 1, before / np.where(is_empty, 1, after))
    return dataclasses.replace(chosen, factor=factor)


@dataclasses.dataclass(frozen=True)
class SelectCalculateErase:
    """SCE (arXiv 2408.07990): select elements, calculate weights, erase the minority's signs.

    Attributes:
      min_variance: smallest variance over the models of an element that is merged
      weights: shares of the squared task vectors, [N]
    """

    min_variance: float
    weights: np.ndarray

    @classmethod
    def measure(cls, reduce: Reduce, fraction: float) -> SelectCalculateErase:
        """Measure the threshold and the weights.

        Args:
          reduce: sums a function of the pieces over the unit
          fraction: fraction of the elements with nonzero variance that is merged
        """
        threshold = 0.0
        if fraction < 1:
            changed = reduce(lambda _, deltas, __: np.array(np.count_nonzero(_variance(deltas))))
            rank = int(int(changed) * fraction)
            (bits,) = kth_largest(
                reduce, lambda _, deltas, __: _variance(deltas)[None], [max(rank, 1)]
            )
            threshold = float(bits.view(np.float64)) if rank else np.inf
        squares = reduce(lambda _, deltas, __: (_selected(deltas, threshold) ** 2).sum(axis=1))
        total = squares.sum()
        number = len(squares)
        return cls(threshold, squares / total if total > 0 else np.full(number, 1 / number))

    def __call__(self, w0: np.ndarray, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the merged weights of a piece, [n]."""
        terms = _selected(deltas, self.min_variance)
        total = terms.sum(axis=0)
        merged, divisor = np.zeros_like(w0), np.zeros_like(w0)
        for term, weight in zip(terms, self.weights, strict=True):
            agrees = (term > 0) & (total >= 0) | (term < 0) & (total < 0)
            merged += weight * term * agrees
            divisor += weight * agrees
        return w0 + merged / np.maximum(divisor, 1e-6)


def _variance(deltas: np.ndarray) -> np.ndarray:
    return deltas.var(axis=0)


def _selected(deltas: np.ndarray, min_variance: float) -> np.ndarray:
    return deltas if min_variance == 0 else deltas * (_variance(deltas) >= min_variance)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """RAM (arXiv 2601.13572): elements that one model changed, and the mean of those several did.

    Attributes:
      epsilon: a model changed the elements with |d| above it
      factor: what the elements that only one model changed are multiplied by, [N]
    """

    epsilon: float
    factor: np.ndarray

    @classmethod
    def measure(cls, reduce: Reduce, epsilon: float, rate: float, limit: float) -> Overlap:
        """Measure the factors of RAM+: 1 + rate min(shared / unique, limit), in counts per model.

        Args:
          reduce: sums a function of the pieces over the unit
          epsilon: a model changed the elements with |d| above it
          rate: r of the paper
          limit: alpha of the paper
        """

        def counts(_: np.ndarray, deltas: np.ndarray, __: Place) -> np.ndarray:
            changed = np.abs(deltas) > epsilon
            unique = changed & (changed.sum(axis=0) == 1)
            return np.array([changed.sum(axis=1), unique.sum(axis=1)])

        changed, unique = reduce(counts)
        ratio = (changed - unique) / np.maximum(unique, epsilon)
        return cls(epsilon, 1 + rate * np.minimum(ratio, limit))

    def __call__(self, w0: np.ndarray, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the merged weights of a piece, [n]."""
        changed = np.abs(deltas) > self.epsilon
        count = changed.sum(axis=0)
        factor = np.where(count == 1, self.factor[:, None], 1 / np.maximum(count, 1))
        return w0 + np.where(changed, deltas * factor, 0).sum(axis=0)


@dataclasses.dataclass(frozen=True)
class NearSwap:
    """Elements of the fine-tune, at most t away from those of the base: w0 + clip(d, -t, t).

    Attributes:
      t: largest change of an element
    """

    t: float

    def __call__(self, w0: np.ndarray, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the merged weights of a piece, [n]."""
        return w0 + np.clip(deltas[0], -self.t, self.t)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """Arcee Fusion: the elements of the fine-tune whose importance is high, else the base's.

    The importance is |d| times the Kullback-Leibler divergence of the softmax of the row.

    Attributes:
      threshold: median + 1.5 (third quartile - first quartile) of the importances
    """

    threshold: float

    @classmethod
    def measure(cls, reduce: Reduce, count: int) -> Fusion:
        """Measure the threshold.

        Args:
          reduce: sums a function of the pieces, which have complete rows, over the unit
          count: number of elements of the unit
        """
        ranks = [count - int(q * (count - 1)) for q in (0.25, 0.5, 0.75)]

        def three(*piece) -> np.ndarray:
            return np.broadcast_to(importance(*piece), (3, len(piece[0])))

        first, median, third = kth_largest(reduce, three, ranks).view(np.float64)
        return cls(float(median + 1.5 * (third - first)))

    def __call__(self, w0: np.ndarray, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the merged weights of a piece, [n]."""
        chosen = importance(w0, deltas, place) >= self.threshold
        return np.where(chosen, w0 + deltas[0], w0)


def importance(w0: np.ndarray, deltas: np.ndarray, place: Place) -> np.ndarray:
    """Return |d| sum_j p_j log(p_j / q_j), p and q the softmax of a row of w and of w0, [n].

    Args:
      w0: [n], complete rows
      deltas: [1, n]
      place: position of the piece
    """
    p, q = (_softmax(x.reshape(-1, place.row)) + 1e-8 for x in (w0 + deltas[0], w0))
    divergence = np.maximum((p * np.log(p / q)).sum(axis=1, keepdims=True), 0)
    return (np.abs(deltas[0]).reshape(p.shape) * divergence).reshape(-1)


def _softmax(rows: np.ndarray) -> np.ndarray:
    values = np.exp(rows - rows.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True)


_DIGIT = 16  # Bits of a magnitude that one pass determines.
PASSES_OF_RANKS = 64 // _DIGIT


def magnitude(values: np.ndarray) -> np.ndarray:
    """Return the bits of |x| in float64: int64 in the order of the magnitudes.

    Example:
      >>> magnitude(np.array([-2.0, 1.0, 0.0])).argsort().tolist()
      [2, 1, 0]
    """
    return np.abs(values).view(np.int64)


def kth_largest(reduce: Reduce, values: OfPiece, ranks: Sequence[int]) -> np.ndarray:
    """Return the bits of the k-th largest magnitude of several sequences of values, [M] int64.

    The result is exact: each pass determines 16 bits of the k-th, from a histogram of these bits
    over the magnitudes that agree with the bits before.

    Args:
      reduce: sums a function of the pieces over the unit
      values: the sequences, [M, n] float64
      ranks: k of each sequence, counted from 1
    """
    threshold, remaining = np.zeros(len(ranks), np.int64), np.array(ranks)
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = reduce(partial(_histogram, values, threshold, shift))
        digit, remaining = _select(counts, remaining)
        threshold |= digit << shift
    return threshold


def _histogram(values: OfPiece, threshold: np.ndarray, shift: int, *piece) -> np.ndarray:
    """Return the counts of a digit over the magnitudes whose higher digits are the threshold's."""
    counts = np.empty((len(threshold), 2**_DIGIT), np.int64)
    position = shift // _DIGIT
    for row, sequence, found in zip(counts, values(*piece), threshold, strict=True):
        bits = magnitude(sequence)
        digits = bits.view(f"<u{_DIGIT // 8}").reshape(len(bits), -1)[:, position]
        if position < PASSES_OF_RANKS - 1:  # The first digit has no higher ones.
            digits = digits[bits >> shift + _DIGIT == found >> shift + _DIGIT]
        row[:] = np.bincount(digits, minlength=2**_DIGIT)
    return counts


def _select(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bin of the k-th largest element, [M], and its rank within the bin."""
    cumulative = counts[:, ::-1].cumsum(axis=1)
    index = (cumulative >= ranks[:, None]).argmax(axis=1)
    before = np.where(index > 0, cumulative[np.arange(len(index)), index - 1], 0)
    return counts.shape[1] - 1 - index, ranks - before
