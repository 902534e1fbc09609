"""Pieces of a tensor: where they begin, which merge units they touch, their products and sums."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np

from modelstock_jax.merging.units import Part

# Numbers of a tensor that one model gives at once.
PIECE = 2**18
# Bytes that a thread's pieces of all models take: few enough for the caches, and so many that
# Python, whose threads take turns, costs little beside the sums.
WORKING_SET = 10 * 2**20
# Numbers that one BLAS dot sums; the sums of dots are float64. 512 keep a float32 dot exact to
# 16 terms a lane; 8192 keep BLAS from starting threads of its own.
_DOT = {np.dtype(np.float32): 512, np.dtype(np.float64): 8192}
_SHORT = 32  # rows this short are not worth a dot each


class Layout(NamedTuple):
    """How a flattened tensor lies in its units: unit of element e = (e // run) % units."""

    units: int
    run: int
    count: int  # numbers of the tensor

    @classmethod
    def of(cls, part: Part) -> Layout:
        """From a part, which keeps one axis of its view at most."""
        kept = [axis for axis in range(len(part.view)) if axis not in part.axes]
        if not kept:
            return cls(1, math.prod(part.view), math.prod(part.view))
        (axis,) = kept
        return cls(part.view[axis], math.prod(part.view[axis + 1 :]), math.prod(part.view))

    def cut(self, most: int = PIECE) -> list[tuple[int, int]]:
        """Ranges [start, stop): whole cycles of the units, else whole runs, else within a run.

        Example:
            >>> Layout(2, 3, 12).cut(7), Layout(4, 3, 12).cut(7), Layout(2, 10, 20).cut(7)
            ([(0, 6), (6, 12)], [(0, 6), (6, 12)], [(0, 7), (7, 10), (10, 17), (17, 20)])
        """
        cycle = self.units * self.run
        if self.units == 1 or self.run > most:
            return [(a, min(a + most, first + self.run))
                    for first in range(0, self.count, self.run)
                    for a in range(first, first + self.run, most)]
        step = most // cycle * cycle or most // self.run * self.run
        return [(a, min(a + step, self.count)) for a in range(0, self.count, step)]

    def touched(self, start: int, stop: int) -> tuple[slice | np.ndarray, int, int]:
        """Units of a range in the order of its rows, the number of rows, and of cycles."""
        if self.units == 1:
            return slice(0, 1), 1, 1
        rows = max(1, (stop - start) // self.run)
        cycles = max(1, rows // self.units)
        return (start // self.run + np.arange(rows // cycles)) % self.units, rows, cycles

    def spread(self, values: np.ndarray, start: int, stop: int) -> np.ndarray | np.generic:
        """Values [units] as they fall on the numbers of a range: a scalar, or [stop - start]."""
        units, rows, cycles = self.touched(start, stop)
        if isinstance(units, slice):
            return values[0]
        if rows == 1:
            return values[units[0]]
        return np.tile(np.repeat(values[units], (stop - start) // rows), cycles)


def piece_length(models: int, bits: int) -> int:
    """Numbers of a piece, a power of two: stored and computed with, they fill `WORKING_SET`.

    Args:
        models: That are read together.
        bits: Of a stored number; 16 are computed with as float32, more as float64.

    Example:
        >>> piece_length(3, 16) == 2**19, piece_length(3, 32) == 2**18, piece_length(500, 32)
        (True, True, 65536)
    """
    each = bits // 8 + (4 if bits <= 16 else 8)
    return max(2**16, 2 ** (WORKING_SET // (models * each)).bit_length() // 2)


def products(vectors: np.ndarray, layout: Layout, start: int, stop: int) -> np.ndarray:
    """Products of each two vectors, summed in float64 for each unit that a range touches.

    Args:
        vectors: [N, stop - start], float32 or float64.
        layout: Of the tensor.
        start: Of the range.
        stop: Of the range.

    Returns:
        [N, N, units touched], float64.
    """
    units, rows, cycles = layout.touched(start, stop)
    cut = vectors.reshape(len(vectors), rows, -1)
    touched = 1 if isinstance(units, slice) else len(units)
    gram = np.empty((len(vectors), len(vectors), touched))
    for i in range(len(vectors)):
        for j in range(i + 1):
            sums = _row_dots(cut[i], cut[j]).reshape(cycles, touched).sum(axis=0)
            gram[i, j] = gram[j, i] = sums
    return gram


def _row_dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row, [rows, n] and [rows, n] -> [rows] float64."""
    rows, length = x.shape
    if length < _SHORT:
        return np.multiply(x, y, dtype=np.float64).sum(axis=1)
    width = _DOT[x.dtype]
    whole = length - length % width
    blocks = (rows, whole // width, width)
    sums = np.vecdot(x[:, :whole].reshape(blocks), y[:, :whole].reshape(blocks))
    rest = np.vecdot(x[:, whole:], y[:, whole:])
    return sums.sum(axis=1, dtype=np.float64) + rest


class Scratch(threading.local):
    """Arrays that a thread uses again for every piece: fresh memory costs as much as the sums."""

    def __init__(self):
        self._arrays: dict[tuple, np.ndarray] = {}

    def take(self, use: str, length: int, dtype: np.dtype | type) -> np.ndarray:
        """An array [length] with anything in it, until the same use is asked for again."""
        array = self._arrays.get((use, dtype))
        if array is None or array.size < length:
            array = self._arrays[use, dtype] = np.empty(length, dtype)
        return array[:length]
