"""Operations on pieces of a tensor: merge units, products and sums, casts, checks for NaN."""

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

# Elements of a tensor that are read from one model at a time.
PIECE = 2**18
# Bytes of the pieces of all models per thread: small enough for the caches, and large enough that
# Python, whose threads run one at a time, costs little compared with the sums.
WORKING_SET = 10 * 2**20
# Elements that one BLAS dot product sums; the dot products are summed in float64. 512 keep a
# float32 dot product exact to 16 terms per lane; 8192 keep BLAS from starting threads.
_DOT = {np.dtype(np.float32): 512, np.dtype(np.float64): 8192}
_MIN_DOT = 32  # A dot product per row does not pay off for shorter rows.


class UnitLayout(NamedTuple):
    """Layout of the merge units in a flattened tensor: element e is in unit (e // run) % units.

    Attributes:
      units: number of units
      run: number of consecutive elements in the same unit
      count: number of elements of the tensor
    """

    units: int
    run: int
    count: int

    @classmethod
    def of(cls, unit_view: UnitView) -> UnitLayout:
        """Return the layout of a view, in which at most one axis is not reduced."""
        count = math.prod(unit_view.view)
        axes = [axis for axis in range(len(unit_view.view)) if axis not in unit_view.axes]
        if not axes:
            return cls(1, count, count)
        (axis,) = axes
        return cls(unit_view.view[axis], math.prod(unit_view.view[axis + 1 :]), count)

    def cut(self, max_length: int = PIECE, row: int = 1) -> list[tuple[int, int]]:
        """Return ranges [start, stop) of at most `max_length` elements.

        A range contains complete cycles of the units if a cycle fits, otherwise complete runs,
        otherwise a part of one run.

        Args:
          max_length: maximum number of elements
          row: ranges of a single unit contain complete rows of this many elements, at least one

        Example:
          >>> UnitLayout(2, 3, 12).cut(7), UnitLayout(4, 3, 12).cut(7)
          ([(0, 6), (6, 12)], [(0, 6), (6, 12)])
          >>> UnitLayout(2, 10, 20).cut(7)
          [(0, 7), (7, 10), (10, 17), (17, 20)]
        """
        cycle = self.units * self.run
        max_length = max(max_length // row, 1) * row
        if self.units == 1 or self.run > max_length:
            return [
                (a, min(a + max_length, first + self.run))
                for first in range(0, self.count, self.run)
                for a in range(first, first + self.run, max_length)
            ]
        step = max_length // cycle * cycle or max_length // self.run * self.run
        return [(a, min(a + step, self.count)) for a in range(0, self.count, step)]

    def touched(self, start: int, stop: int) -> tuple[slice | np.ndarray, int, int]:
        """Return the units of a range in the order of its rows, the number of rows, and of cycles.

        Args:
          start: first element of the range
          stop: end of the range
        """
        if self.units == 1:
            return slice(0, 1), 1, 1
        rows = max(1, (stop - start) // self.run)
        cycles = max(1, rows // self.units)
        return (start // self.run + np.arange(rows // cycles)) % self.units, rows, cycles

    def spread(self, values: np.ndarray, start: int, stop: int) -> np.ndarray | np.generic:
        """Return the value of each element's unit: a scalar, or [stop - start].

        Args:
          values: [units]
          start: first element of the range
          stop: end of the range
        """
        units, rows, cycles = self.touched(start, stop)
        if isinstance(units, slice):
            return values[0]
        if rows == 1:
            return values[units[0]]
        return np.tile(np.repeat(values[units], (stop - start) // rows), cycles)


def piece_length(models: int, bits: int) -> int:
    """Return the number of elements per piece, a power of two that fills `WORKING_SET`.

    The working set contains the stored and the widened values of all models.

    Args:
      models: number of models that are read together
      bits: bits of a stored value; up to 16 bits are widened to float32, more to float64

    Example:
      >>> piece_length(3, 16) == 2**19, piece_length(3, 32) == 2**18, piece_length(500, 32)
      (True, True, 65536)
    """
    element_bytes = bits // 8 + (4 if bits <= 16 else 8)
    return max(2**16, 2 ** (WORKING_SET // (models * element_bytes)).bit_length() // 2)


def products(vectors: np.ndarray, layout: UnitLayout, start: int, stop: int) -> np.ndarray:
    """Return the products of each pair of vectors, summed in float64 per unit of a range.

    Args:
      vectors: [N, stop - start], float32 or float64
      layout: layout of the tensor
      start: first element of the range
      stop: end of the range

    Returns:
      [N, N, units touched], float64.
    """
    units, rows, cycles = layout.touched(start, stop)
    by_row = vectors.reshape(len(vectors), rows, -1)
    touched = 1 if isinstance(units, slice) else len(units)
    gram = np.empty((len(vectors), len(vectors), touched))
    for i in range(len(vectors)):
        for j in range(i + 1):
            sums = _row_dots(by_row[i], by_row[j]).reshape(cycles, touched).sum(axis=0)
            gram[i, j] = gram[j, i] = sums
    return gram


def _row_dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the dot product of each row of [rows, n] and [rows, n], [rows] float64."""
    rows, length = x.shape
    if length < _MIN_DOT:
        return np.multiply(x, y, dtype=np.float64).sum(axis=1)
    width = _DOT[x.dtype]
    end = length - length % width
    blocks = (rows, end // width, width)
    sums = np.vecdot(x[:, :end].reshape(blocks), y[:, :end].reshape(blocks))
    rest = np.vecdot(x[:, end:], y[:, end:])
    return sums.sum(axis=1, dtype=np.float64) + rest


class Scratch(threading.local):
    """Arrays that a thread reuses for every piece: new memory costs as much time as the sums."""

    def __init__(self):
        self._arrays: dict[tuple, np.ndarray] = {}

    def take(self, use: str, length: int, dtype: np.dtype | type) -> np.ndarray:
        """Return an array [length] with arbitrary content, valid until the next call for its use.

        Args:
          use: name of the use
          length: number of elements
          dtype: dtype of the array
        """
        array = self._arrays.get((use, dtype))
        if array is None or array.size < length:
            array = self._arrays[use, dtype] = np.empty(length, dtype)
        return array[:length]


FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Values of the 8-bit dtypes by their bits.
_TABLES = {
    DTYPES[code]: np.arange(256, dtype=np.uint8).view(DTYPES[code]).astype(np.float32)
    for code in FLOATS
    if DTYPES[code].itemsize == 1
}


Allocate = Callable[[str, int, np.dtype], np.ndarray]


def _new_array(use: str, length: int, dtype: np.dtype) -> np.ndarray:
    return np.empty(length, dtype)


def widen(values: np.ndarray, out: np.ndarray) -> None:
    """Copy stored values [n] of any dtype of `FLOATS` to float32 or float64, exactly.

    Args:
      values: [n], stored values
      out: [n], float32 or float64

    Example:
      >>> wide = np.empty(2, np.float32)
      >>> widen(np.array([1.5, -2], ml_dtypes.bfloat16), wide)
      >>> wide.tolist()
      [1.5, -2.0]
    """
    if values.dtype in _TABLES:
        out[...] = _TABLES[values.dtype][values.view(np.uint8)]
    else:
        np.copyto(out, values)


def narrow(
    values: np.ndarray, code: str, *, saturate: bool = True, allocate: Allocate = _new_array
) -> np.ndarray:
    """Round values once to a stored dtype, to nearest with ties to even.

    Args:
      values: [n], float32 or float64
      code: one of `FLOATS`
      saturate: replace values beyond the range of the dtype by its largest value, since an overflow
        would be a non-finite weight; False if no value can be beyond it
      allocate: returns an array for a use, a length and a dtype; reused memory is faster

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
        values = _round_without_ties(values)
    out = allocate("narrowed", len(values), dtype)
    np.copyto(out, values, casting="same_kind" if dtype.itemsize > 1 else "unsafe")
    return out


def _round_without_ties(values: np.ndarray) -> np.ndarray:
    """Round float64 to float32, but never onto a tie of bfloat16, which would be rounded twice."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    ties = np.flatnonzero(bits & 0xFFFF == 0x8000)
    exact, rounded = np.abs(values[ties]), np.abs(single[ties]).astype(np.float64)
    bits[ties] += (exact > rounded).astype(np.uint32) - (exact < rounded).astype(np.uint32)
    return single


def recode(values: np.ndarray, code: str) -> np.ndarray:
    """Return stored values in another dtype; the same array if they already have it."""
    if values.dtype == DTYPES[code]:
        return values
    wide = np.empty(len(values), np.float64 if values.itemsize > 4 else np.float32)
    widen(values, wide)
    return narrow(wide, code)


def first_non_finite(values: np.ndarray) -> int | None:
    """Return the index of the first NaN or infinity in stored values [n], or None.

    Example:
      >>> first_non_finite(np.array([1, np.inf], ml_dtypes.bfloat16))
      1
    """
    if values.dtype == _BFLOAT16:
        bad = np.bitwise_and(values.view(np.uint16), 0x7F80) == 0x7F80
    elif values.dtype in _TABLES:
        bad = ~np.isfinite(_TABLES[values.dtype])[values.view(np.uint8)]
    else:
        bad = ~np.isfinite(values)
    return int(bad.argmax()) if bad.any() else None


class Tensor(Protocol):
    """Attributes of a tensor that an error message contains."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def escaped(name: str) -> str:
    """Return a shell pattern that matches only this name.

    Example:
      >>> escaped("head[0].weight"), escaped("q.weight")
      ('head[[]0].weight', 'q.weight')
    """
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def check_finite(label: str, model: int, tensor: Tensor, values: np.ndarray, start: int) -> None:
    """Raise an error if stored values contain NaN or infinity.

    Args:
      label: label of the model
      model: index of the model, 0 for the base
      tensor: the tensor
      values: [n], stored values
      start: index of the first value in the tensor

    Raises:
      NonFiniteError: with the model, the tensor and the element
    """
    if (offset := first_non_finite(values)) is None:
        return
    index = start + offset
    shape = tensor.shape if math.prod(tensor.shape) > index else (index + 1,)
    position = [int(i) for i in np.unravel_index(index, shape)]
    # If the base is not finite, the excluded tensor must come from the fine-tunes.
    source = "mean" if model == 0 else "base"
    raise NonFiniteError(
        f"{label}: tensor {tensor.name!r} contains NaN or infinity, first at {position}; fix "
        f"the model, or pass --exclude {escaped(tensor.name)!r} --unmerged-from {source}",
        "pretrained" if model == 0 else model - 1,
        tensor.name,
    )
