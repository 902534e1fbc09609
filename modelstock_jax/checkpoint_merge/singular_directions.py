"""MonoSoup on files: the singular directions of an update, from passes over pieces of its matrix.

The matrix D [m, n] is never in memory. The eigenvectors of D^T D, or of D D^T if m < n, are those
directions, and their eigenvalues the squares of the singular values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from modelstock_jax.checkpoint_merge.elementwise import Place
from modelstock_jax.merging.update_scaling import UNMOVED, monosoup_factors, singular_values

# Calls function(w0, task vectors, place) with every piece, in order; pieces have complete rows.
EachPiece = Callable[[Callable[..., Any]], Iterator[Any]]

_PANEL = 64 * 2**20  # Bytes of rows that are multiplied with all rows in one pass.
_BLOCK = 512  # Rows of a product that is added at a time.


@dataclasses.dataclass(frozen=True)
class SingularDirections:
    """w0 + all * D + some * (the part of D in some directions), D the mean task vector.

    These directions are the first k or the others, whichever are fewer.

    Attributes:
      factors: the factors `all` and `some`
      vectors: the directions, [n, j]; if m < n, [m, j]
      projected: [j, n] if m < n: the part of D is vectors @ projected, else D @ vectors @ vectors^T
    """

    factors: tuple[float, float] = (1.0, 0.0)
    vectors: np.ndarray | None = None
    projected: np.ndarray | None = None

    def __call__(self, w0: np.ndarray, deltas: np.ndarray, place: Place) -> np.ndarray:
        """Return the merged weights of a piece, [n]."""
        d = _mean(w0, deltas, place)
        merged = self.factors[0] * d
        if self.vectors is not None and self.projected is not None:
            first = place.start // place.row
            part = self.vectors[first : first + len(d)] @ self.projected
        elif self.vectors is not None:
            part = d @ self.vectors @ self.vectors.T
        else:
            return w0 + merged.reshape(-1)
        merged += self.factors[1] * part
        return w0 + merged.reshape(-1)


def measure(each_piece: EachPiece, shape: Sequence[int]) -> SingularDirections:
    """Measure the directions and factors of a tensor in `num_passes` passes.

    Args:
      each_piece: calls a function with every piece of the tensor
      shape: shape of the tensor; tensors of one axis are merged as they are
    """
    if not num_passes(shape):
        return SingularDirections()
    m, n = len_rows(shape)
    gram, length, full_length = (_row_gram if m < n else _column_gram)(each_piece, m, n)
    if not length or length < UNMOVED * full_length:
        for _ in range(num_passes(shape) - _gram_passes(m, n)):
            _exhaust(each_piece)
        return SingularDirections()
    eigenvalues, vectors = np.linalg.eigh(gram)
    del gram
    is_high, high, low = monosoup_factors(singular_values(eigenvalues))
    few_are_high = 2 * is_high.sum() <= len(is_high)
    chosen = vectors[:, is_high if few_are_high else ~is_high]
    del vectors
    all_, some = (low, high - low) if few_are_high else (high, low - high)
    factors = float(all_), float(some)
    if m >= n:
        return SingularDirections(factors, chosen)
    projected = np.zeros((chosen.shape[1], n))
    for first, d in each_piece(_rows):
        projected += chosen[first : first + len(d)].T @ d
    return SingularDirections(factors, chosen, projected)


def len_rows(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of a tensor as a matrix, [out, in * height * width].

    Example:
      >>> len_rows((8, 4, 3, 3)), len_rows((5,))
      ((8, 36), (5, 1))
    """
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def num_passes(shape: Sequence[int]) -> int:
    """Return the number of times that `measure` reads a tensor."""
    m, n = len_rows(shape)
    if len(shape) < 2 or not m * n:
        return 0
    return _gram_passes(m, n) + (m < n)


def memory(shape: Sequence[int]) -> int:
    """Return the bytes that `measure` needs at most.

    These are 5 arrays [min(m, n)]^2 in float64, 4 of them in LAPACK; if m < n, also 64 MiB of rows,
    and half of D in float64.

    Example:
      >>> memory((4096, 4096)) // 10**6, memory((4096, 14336)) // 10**6
      (671, 973)
    """
    if not num_passes(shape):
        return 0
    m, n = len_rows(shape)
    return 40 * min(m, n) ** 2 + (_PANEL + 4 * m * n if m < n else 0)


def _gram_passes(m: int, n: int) -> int:
    return -(-m // _panel_rows(n)) if m < n else 1


def _panel_rows(n: int) -> int:
    return max(_PANEL // (8 * n), 1)


def _mean(w0: np.ndarray, deltas: np.ndarray, place: Place) -> np.ndarray:
    """Return the mean task vector of a piece as rows, [rows, n]."""
    return deltas.mean(axis=0).reshape(-1, place.row)


def _rows(w0: np.ndarray, deltas: np.ndarray, place: Place) -> Any:
    return place.start // place.row, _mean(w0, deltas, place)


def _rows_and_squares(w0: np.ndarray, deltas: np.ndarray, place: Place) -> Any:
    first, d = _rows(w0, deltas, place)
    return first, d, np.array([np.vdot(d, d), np.vdot(w0, w0)])


def _exhaust(each_piece: EachPiece) -> None:
    for _ in each_piece(lambda *_: None):
        pass


def _column_gram(each_piece: EachPiece, m: int, n: int) -> tuple[np.ndarray, float, float]:
    """Return D^T D, |D| and |w0|, from one pass."""
    gram, squares = np.zeros((n, n)), np.zeros(2)
    for _, d, of_piece in each_piece(_rows_and_squares):
        squares += of_piece
        for k in range(0, n, _BLOCK):
            gram[k : k + _BLOCK] += d[:, k : k + _BLOCK].T @ d
    return (gram, *np.sqrt(squares))


def _row_gram(each_piece: EachPiece, m: int, n: int) -> tuple[np.ndarray, float, float]:
    """Return D D^T, |D| and |w0|.

    Each pass keeps a panel of rows, and multiplies it with the rows after it.
    """
    gram, squares, height = np.zeros((m, m)), np.zeros(2), _panel_rows(n)
    panel = np.empty((min(height, m), n))
    for start in range(0, m, height):
        stop = min(start + height, m)
        rows = panel[: stop - start]
        squares[:] = 0  # Those of the last pass.
        for first, d, of_piece in each_piece(_rows_and_squares):
            squares += of_piece
            last = first + len(d)
            inside = slice(max(first, start), min(last, stop))
            if inside.start < inside.stop:
                rows[inside.start - start : inside.stop - start] = d[
                    inside.start - first : inside.stop - first
                ]
            if last > stop:  # The panel is complete.
                after = max(first, stop)
                gram[after:last, start:stop] = d[after - first :] @ rows.T
        gram[start:stop, start:stop] = rows @ rows.T
        gram[start:stop, stop:] = gram[stop:, start:stop].T
    return (gram, *np.sqrt(squares))
