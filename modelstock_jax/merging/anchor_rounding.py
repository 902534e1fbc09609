"""The rounding error of an anchor that is stored in a coarser dtype than its replicas.

If the anchor was rounded after the replicas were trained, its rounding error e is part of every
task vector, and |e|^2 is part of every entry of the Gram matrix. e is unknown, but its expected
energy is known: E = sum of (half ulp)^2 / 3. Section 6 of docs/method.md describes the correction.
Inputs and outputs are NumPy or JAX arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from modelstock_jax.merging import geometry

# Minimum number of elements: for fewer, |e|^2 is too far from its expectation.
MIN_ELEMENTS = 4096
# A tensor of n elements is below its rounding energy E if m < (1 - margin) E, with
# margin = max(BIAS, NOISE / sqrt(n)), at most MAX_MARGIN. For normal weights, |e|^2 / E is 0.996 in
# bfloat16, 0.94 to 0.97 in float8_e4m3fn and 0.87 in float8_e5m2: errors at a power of two have
# half the range below it, and weights are not uniform within an ulp. The standard deviation of
# |e|^2 / E is 1.6 / sqrt(n), or 4 / sqrt(n) with tails as in Student's t.
BIAS = 0.1
NOISE = 8.0
MAX_MARGIN = 0.75
# Maximum fraction of the elements that may be below: rounding does not change a tensor of ones.
MAX_BELOW_FRACTION = 0.05
EQUAL_RTOL = 1e-6  # relative tolerance of the Gram entries of equal task vectors
MIN_REMAINDER = 1e-4  # fraction of a squared norm that always remains
_EXPONENT = 0x7F800000  # exponent bits of a float32; alone they are infinity


def half_ulp_square(values):
    """Return (ulp / 2)^2 of each element in its own dtype: the maximum squared rounding error.

    The error of rounding to nearest is uniform in [-ulp / 2, ulp / 2]; its mean square is
    `half_ulp_square(values) / 3`. The ulp of 0 and of subnormal values is the smallest subnormal
    value. This is also correct for a 0 that results from rounding. A 0 that was set (a bias,
    padding) has no error, but its computed energy is negligible in all dtypes wider than
    float8.

    Args:
      values: [...], NumPy or JAX, any floating dtype of up to 8 bytes

    Returns:
      [...], float64 for NumPy; float32 for JAX, where results below 1e-38 are 0. NaN and infinity
      have the ulp of 0.

    Example:
      >>> half_ulp_square(np.float16([1.0, 1.5, 2.0, 0.0])).tolist() == [
      ...     2.0**-22, 2.0**-22, 2.0**-20, 2.0**-50]
      True
    """
    if geometry.namespace(values) is not np:
        return half_ulp(values) ** 2
    values = np.asarray(values)
    if values.dtype.itemsize == 1:  # NumPy converts float8 slowly
        return _float8_table(values.dtype)[values.view(np.uint8)]
    return _half_ulp_square(values)


def half_ulp(values):
    """Return half an ulp of each element of a JAX array in its own dtype; 0 below 1e-38.

    The result is computed from the exponent bits, so it is the same on every backend and has no
    derivative. It does not matter if a backend flushes subnormal bfloat16 to 0: 0 has the same ulp.

    Args:
      values: [...], a JAX array of any floating dtype

    Returns:
      [...] float32

    Example:
      >>> import jax.numpy as jnp
      >>> half_ulp(jnp.array([1.0, 3.0], jnp.bfloat16)).tolist() == [2.0**-8, 2.0**-7]
      True
    """
    xp = geometry.namespace(values)
    mantissa, min_exponent = _format(np.dtype(values.dtype))
    bits = values.astype(xp.float32).view(xp.uint32) & xp.uint32(_EXPONENT)
    binade = xp.where(bits == xp.uint32(_EXPONENT), xp.uint32(0), bits).view(xp.float32)
    return xp.maximum(binade, xp.float32(2.0**min_exponent)) * xp.float32(2.0 ** -(mantissa + 1))


def is_coarser(base_dtype: Any, finetuned_dtypes: Iterable[Any]) -> bool:
    """Return whether the anchor's dtype has fewer mantissa bits than every dtype of the replicas.

    Args:
      base_dtype: dtype of the anchor; anything that `np.dtype` accepts
      finetuned_dtypes: dtypes of the replicas, one or more

    Returns:
      a bool; False if any dtype is not floating

    Example:
      >>> is_coarser("float16", ["float32", "float64"]), is_coarser("float32", ["float32"])
      (True, False)
    """
    base, others = np.dtype(base_dtype), [np.dtype(dtype) for dtype in finetuned_dtypes]
    if not others or any(d.kind in "iub" for d in (base, *others)):
        return False
    return _format(base)[0] < min(_format(other)[0] for other in others)


def correct_gram(gram, energy):
    """Return the Gram matrix without the rounding error that all task vectors share: G_ij - E.

    - Rows and columns of replicas that did not change stay as they are: they contain no error.
    - Units in which all changed replicas are equal stay as they are: the tensor was frozen before
      the anchor was rounded. Equation 3 then gives t = 1, the weights of the replicas.
    - At least `MIN_REMAINDER` of a squared norm remains, and an off-diagonal entry stays within the
      product of its norms. Cosines are therefore defined, and in [-1, 1]. An off-diagonal entry
      that is not above E becomes 0 or negative; equation 3 then gives t = 0.

    Args:
      gram: [N, N, ...]
      energy: E of each unit, [...]; 0 if the anchor is not coarser

    Returns:
      [N, N, ...], of the dtype of `gram`

    Example:
      >>> correct_gram(np.array([[3.0, 2.5], [2.5, 3.0]]), np.array(2.0)).tolist()
      [[1.0, 0.5], [0.5, 1.0]]
    """
    xp = geometry.namespace(gram)
    active = geometry.is_moved(gram)
    both_active = active[:, None] & active[None]
    max_entry = xp.where(both_active, gram, -np.inf).max(axis=(0, 1))
    min_entry = xp.where(both_active, gram, np.inf).min(axis=(0, 1))
    all_equal = max_entry - min_entry <= EQUAL_RTOL * max_entry
    energy = xp.where(all_equal, 0.0, energy).astype(gram.dtype)

    squares = geometry.squared_norms(gram)
    min_squares = xp.maximum(MIN_REMAINDER * squares, 2.0 * geometry.MIN_SQUARED_NORM)
    # The outer minimum keeps 0 at 0.
    squares = xp.minimum(squares, xp.maximum(squares - energy[None], min_squares))
    norm = geometry.positive_sqrt(squares)
    bound = norm[:, None] * norm[None]
    products = xp.clip(gram - energy[None, None], -bound, bound)
    diagonal = np.eye(len(gram), dtype=bool).reshape(2 * (len(gram),) + (1,) * (gram.ndim - 2))
    corrected = xp.where(diagonal, squares[None], products)
    return xp.where((energy > 0)[None, None], corrected, gram)


def started_from_rounded(off_diagonal, energy, count):
    """Return whether training started from the rounded anchor: then there is nothing to correct.

    If the anchor was rounded after training, m = signal + |e|^2 in every tensor, and |e|^2 is close
    to E. The function returns True if tensors with more than 5 % of the elements have
    m < (1 - margin) E, with margin = max(0.1, 8 / sqrt(count)). It checks the tensors of at least
    4096 elements; if there are none, all tensors together count as one.

    A mean over tensors would not work: one tensor with a large update would hide the others. The
    fraction counts elements, not tensors, because rounding does not change vectors of ones or
    zeros: their m is small in either case.

    Both cases were simulated with bfloat16, float16 and float8_e4m3fn anchors, tensors of 64 to
    10^6 elements, cosines of 0.1 to 0.9, and squared norms l^2 of the updates of 0.1 to 100 E.

    Training from the rounded anchor (True is correct):

    - Equal updates in all tensors, signal below 0.8 E: detected in every trial.
    - Signal between 0.8 and 1 E: either result.
    - Signal above E: cannot be distinguished from a rounding error; the result False is wrong.
    - Updates that differ between tensors (by a factor of e^1.5) around a signal of 0.5 E: detected
      in every trial if tensors are large, in 7 to 16 % of the trials if none has 4096 elements.

    Rounding after training (False is correct):

    - Normal weights: detected in every trial, even if 80 or 100 % of the tensors are frozen.
    - Tails as in Student's t with 4 degrees of freedom: detected in 97 % of bfloat16 models of 20
      tensors of 4096 elements (87 % in float8_e4m3fn), and in all models with larger tensors.
    - Replicas without a common update (cosine 0) and with large updates: the result True is wrong,
      because m / E varies by l^2 / (E sqrt(count)).
    - float8_e5m2 anchors with small updates: the result True is wrong, because E is 13 % too large.

    Args:
      off_diagonal: m, the mean of G_ij over pairs of changed replicas, of each tensor, [T]; 0 if
        fewer than two changed (their bits equal the anchor's, which rounding would have changed).
      energy: E of each tensor, [T]; tensors of energy 0 do not count
      count: number of elements of each tensor, [T]

    Returns:
      bool, []

    Example:
      >>> count = np.array([10_000, 10_000])
      >>> bool(started_from_rounded(np.array([0.1, 9.0]), np.array([1.0, 1.0]), count))
      True
      >>> bool(started_from_rounded(np.array([1.01, 9.0]), np.array([1.0, 1.0]), count))
      False
    """
    xp = geometry.namespace(off_diagonal)
    off_diagonal, energy = xp.asarray(off_diagonal), xp.asarray(energy)
    count = xp.asarray(count, off_diagonal.dtype)
    valid = xp.isfinite(off_diagonal) & (energy > 0)
    product, energy, count = (xp.where(valid, x, 0.0) for x in (off_diagonal, energy, count))
    large = xp.where(count >= MIN_ELEMENTS, count, 0.0)
    below_in_total = _below(product.sum(), energy.sum(), count.sum()) & valid.any()
    num_below = xp.where(_below(product, energy, count), large, 0.0).sum()
    below_in_large = num_below > MAX_BELOW_FRACTION * large.sum()
    return xp.where(large.sum() > 0, below_in_large, below_in_total)


def _below(product, energy, count):
    xp = geometry.namespace(product)
    noise = NOISE / xp.sqrt(xp.maximum(count, 1.0))
    return product < (1.0 - xp.clip(noise, BIAS, MAX_MARGIN)) * energy


@functools.cache
def _format(dtype: np.dtype) -> tuple[int, int]:
    """Return the number of mantissa bits and the exponent of the smallest normal value.

    Both are found by rounding to the dtype: NumPy's finfo does not support bfloat16 and float8, and
    this module imports neither ml_dtypes nor JAX.
    """
    mantissa = 0
    while float(np.float64(1 + 2.0 ** -(mantissa + 1)).astype(dtype)) > 1 and mantissa < 52:
        mantissa += 1
    exponent = 0
    while float(np.float64(2.0 ** (exponent - 1)).astype(dtype)) > 0 and exponent > -1074:
        exponent -= 1
    return mantissa, exponent + mantissa


def _half_ulp_square(values: np.ndarray) -> np.ndarray:
    """Mask the exponent bits: they are the binade, a power of two that is a multiple of the ulp."""
    mantissa, min_exponent = _format(values.dtype)
    wide = np.dtype(np.float64 if values.dtype == np.float64 else np.float32)
    unsigned = np.dtype(f"u{wide.itemsize}")
    bits = values.astype(wide).view(unsigned)
    bits &= np.array(np.inf, wide).view(unsigned)
    binade = bits.view(wide)
    binade[np.isinf(binade)] = 0.0
    square = np.maximum(binade, wide.type(2.0**min_exponent), out=binade).astype(np.float64)
    square *= 2.0 ** -(mantissa + 1)
    square *= square
    return square


@functools.cache
def _float8_table(dtype: np.dtype) -> np.ndarray:
    return _half_ulp_square(np.arange(256, dtype=np.uint8).view(dtype))
