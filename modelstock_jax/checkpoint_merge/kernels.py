"""Pieces of a tensor: their merge units, products and sums, casts, and checks for NaN."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from modelstock_jax.merging.rules import NonFiniteError
from modelstock_jax.merging.units import UnitView
from modelstock_jax.tensor_files.reader import DTYPES

# Numbers of a tensor that one model gives at once.
PIECE = 2**18
# Bytes that a thread's pieces of all models take: few enough for the caches, and so many that
# Python, whose threads take turns, costs little beside the sums.
WORKING_SET = 10 * 2**20
# Numbers that one BLAS dot sums; the sums of dots are float64. 512 keep a float32 dot exact to
# 16 terms a lane; 8192 keep BLAS from starting threads of its own.
_DOT = {np.dtype(np.float32): 512, np.dtype(np.float64): 8192}
_SHORT = 32  # rows this short are not worth a dot each


class UnitLayout(NamedTuple):
    """How a flattened tensor lies in its units: unit of element e = (e // run) % units."""

    units: int
    run: int
    count: int  # numbers of the tensor

    @classmethod
    def of(cls, unit_view: UnitView) -> UnitLayout:
        """From a part, which keeps one axis of its view at most."""
        kept = [axis for axis in range(len(unit_view.view)) if axis not in unit_view.axes]
        if not kept:
            return cls(1, math.prod(unit_view.view), math.prod(unit_view.view))
        (axis,) = kept
        return cls(
            unit_view.view[axis], math.prod(unit_view.view[axis + 1 :]), math.prod(unit_view.view)
        )

    def cut(self, max_length: int = PIECE) -> list[tuple[int, int]]:
        """Ranges [start, stop): whole cycles of the units, else whole runs, else within a run.

        Example:
            >>> UnitLayout(2, 3, 12).cut(7), UnitLayout(4, 3, 12).cut(7), UnitLayout(2, 10, 20).cut(7)
            ([(0, 6), (6, 12)], [(0, 6), (6, 12)], [(0, 7), (7, 10), (10, 17), (17, 20)])
        """
        cycle = self.units * self.run
        if self.units == 1 or self.run > max_length:
            return [
                (a, min(a + max_length, first + self.run))
                for first in range(0, self.count, self.run)
                for a in range(first, first + self.run, max_length)
            ]
        step = max_length // cycle * cycle or max_length // self.run * self.run
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


def products(vectors: np.ndarray, layout: UnitLayout, start: int, stop: int) -> np.ndarray:
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


# Between stored numbers and those that are computed with: exact up, rounded once down.


FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Every value of the 8-bit types, by its bits.
_BYTES = {
    DTYPES[code]: np.arange(256, dtype=np.uint8).view(DTYPES[code]).astype(np.float32)
    for code in FLOATS
    if DTYPES[code].itemsize == 1
}


Room = Callable[[str, int, np.dtype], np.ndarray]


def _fresh(use: str, length: int, dtype: np.dtype) -> np.ndarray:
    return np.empty(length, dtype)


def widen(values: np.ndarray, out: np.ndarray) -> None:
    """Copies stored numbers [n] of any dtype of `FLOATS` into float32 or float64, exactly.

    Example:
        >>> wide = np.empty(2, np.float32)
        >>> widen(np.array([1.5, -2], ml_dtypes.bfloat16), wide)
        >>> wide.tolist()
        [1.5, -2.0]
    """
    if values.dtype in _BYTES:
        out[...] = _BYTES[values.dtype][values.view(np.uint8)]
    else:
        np.copyto(out, values)


def narrow(
    values: np.ndarray, code: str, *, saturate: bool = True, room: Room = _fresh
) -> np.ndarray:
    """Numbers [n], float32 or float64, rounded once to nearest, ties to even, to a stored dtype.

    Args:
        values: [n].
        code: One of `FLOATS`.
        saturate: Take the largest number of a dtype of smaller range where a value is beyond it:
            an overflow would be a non-finite weight. False where none can be.
        room: Gives arrays by use, length and dtype: memory that was used before costs less.

    Example:
        >>> narrow(np.array([1.00390625, 1e39]), "BF16").astype(float).tolist()
        [1.0, 3.3895313892515355e+38]
    """
    dtype = DTYPES[code]
    if values.dtype == dtype:
        return values
    if saturate and dtype != np.float64:
        limits = ml_dtypes.finfo(dtype)
        if float(limits.max) < float(np.finfo(values.dtype).max):
            values = np.clip(values, float(limits.min), float(limits.max))
    if dtype == _BFLOAT16 and values.dtype == np.float64:
        values = _halfway_kept(values)
    out = room("narrowed", len(values), dtype)
    np.copyto(out, values, casting="same_kind" if dtype.itemsize > 1 else "unsafe")
    return out


def _halfway_kept(values: np.ndarray) -> np.ndarray:
    """Float32 of float64, but never rounded onto a tie of bfloat16: a tie would round twice."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    ties = np.flatnonzero(bits & 0xFFFF == 0x8000)
    exact, rounded = np.abs(values[ties]), np.abs(single[ties]).astype(np.float64)
    bits[ties] += (exact > rounded).astype(np.uint32) - (exact < rounded).astype(np.uint32)
    return single


def recode(values: np.ndarray, code: str) -> np.ndarray:
    """Stored numbers in another dtype; the same numbers where it is their own."""
    if values.dtype == DTYPES[code]:
        return values
    wide = np.empty(len(values), np.float64 if values.itemsize > 4 else np.float32)
    widen(values, wide)
    return narrow(wide, code)


def first_non_finite(values: np.ndarray) -> int | None:
    """Index of the first NaN or infinity of stored numbers [n], or None.

    Example:
        >>> first_non_finite(np.array([1, np.inf], ml_dtypes.bfloat16))
        1
    """
    if values.dtype == _BFLOAT16:
        bad = np.bitwise_and(values.view(np.uint16), 0x7F80) == 0x7F80
    elif values.dtype in _BYTES:
        bad = ~np.isfinite(_BYTES[values.dtype])[values.view(np.uint8)]
    else:
        bad = ~np.isfinite(values)
    return int(bad.argmax()) if bad.any() else None


# NaN and infinity in a model: refused with its name, the tensor's and the place.


class Tensor(Protocol):
    """What a message says of a tensor."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def escaped(name: str) -> str:
    """A name as a shell pattern that fits it alone.

    Example:
        >>> escaped("head[0].weight"), escaped("q.weight")
        ('head[[]0].weight', 'q.weight')
    """
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def refuse_non_finite(
    label: str, model: int, tensor: Tensor, values: np.ndarray, start: int
) -> None:
    """Raises where stored numbers are not finite, with the model, the tensor and the element."""
    if (found := first_non_finite(values)) is None:
        return
    shape = tensor.shape if math.prod(tensor.shape) > start + found else (start + found + 1,)
    place = [int(n) for n in np.unravel_index(start + found, shape)]
    # What is left out is taken from models that are finite.
    instead = "mean" if model == 0 else "base"
    raise NonFiniteError(
        f"{label}: tensor {tensor.name!r} holds NaN or infinity, first at {place}; mend the model, "
        f"or leave the tensor out with --exclude {escaped(tensor.name)!r} --excluded {instead}",
        "pretrained" if model == 0 else model - 1,
        tensor.name,
    )
