"""Between stored numbers and those that are computed with: exact up, rounded once down."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from modelstock_jax.tensor_files.reader import DTYPES

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Every value of the 8-bit types, by its bits.
_BYTES = {
    DTYPES[code]: np.arange(256, dtype=np.uint8).view(DTYPES[code]).astype(np.float32)
    for code in FLOATS if DTYPES[code].itemsize == 1
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
