"""The rounding error of an anchor that is stored in a coarser dtype than its replicas.

If the anchor was rounded after the replicas were trained, its rounding error e is part of every
task vector, and |e|^2 is part of every entry of the Gram matrix. e is not known, its expected
square is: E = sum of (half ulp)^2 / 3. NumPy or JAX arrays, in and out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from modelstock_jax.merging import geometry

LARGE = 4096  # elements: |e|^2 of fewer is too far from its expectation
# A tensor is below its rounding energy if m < (1 - margin) E, margin = max(BIAS, NOISE / sqrt(n)).
# Of normal weights |e|^2 / E is 0.996 in bfloat16, 0.94 to 0.97 in float8_e4m3fn and 0.87 in
# float8_e5m2 (an error at a power of two has half the room below, and weights are not uniform
# within an ulp), with a standard deviation of 1.6 / sqrt(n); 4 / sqrt(n) with tails as Student's t.
BIAS = 0.1
NOISE = 8.0
MOST_MARGIN = 0.75
SHARE = 0.05  # of the elements that may be below: a tensor of ones was not changed by rounding
ALIKE = 1e-6  # relative: Gram entries of equal task vectors
LEAST_FRACTION = 1e-4  # of a squared norm, which remains whatever is subtracted
_EXPONENT = 0x7F800000  # bits of a float32; also infinity


def half_ulp_square(values):
    """(ulp / 2)^2 of each element in its own dtype: the largest squared rounding error.

    Rounding to nearest leaves an error that is uniform in [-ulp / 2, ulp / 2], with mean square
    `half_ulp_square(values) / 3`. The ulp of a subnormal number, and of 0, is the smallest
    subnormal number: also right for a 0 that was rounded to; a 0 that was written (a bias, padding)
    has no error, but that energy is negligible in all dtypes that are wider than float8.

    Args:
      values: [...], NumPy or JAX, any floating dtype of up to 8 bytes.

    Returns:
      [...], float64 for NumPy; float32 for JAX, where less than 1e-38 is 0. NaN and infinity have
      the ulp of 0.

    Example:
      >>> half_ulp_square(np.float16([1.0, 1.5, 2.0, 0.0])).tolist() == [
      ...     2.0**-22, 2.0**-22, 2.0**-20, 2.0**-50]
      True
    """
    if geometry.namespace(values) is not np:
        return half_ulp(values) ** 2
    values = np.asarray(values)
    if values.dtype.itemsize == 1:  # NumPy converts float8 slowly
        return _squares_of_bytes(values.dtype)[values.view(np.uint8)]
    return _half_ulp_square(values)


def half_ulp(values):
    """Half an ulp of each element of a JAX array in its own dtype, [...] float32, 0 below 1e-38.

    From the exponent bits: the result is the same on every backend and has no derivative. Backends
    that flush subnormal bfloat16 to 0 do no harm: 0 has the same ulp.

    Example:
      >>> import jax.numpy as jnp
      >>> half_ulp(jnp.array([1.0, 3.0], jnp.bfloat16)).tolist() == [2.0**-8, 2.0**-7]
      True
    """
    xp = geometry.namespace(values)
    mantissa, least = _format(np.dtype(values.dtype))
    bits = values.astype(xp.float32).view(xp.uint32) & xp.uint32(_EXPONENT)
    binade = xp.where(bits == xp.uint32(_EXPONENT), xp.uint32(0), bits).view(xp.float32)
    return xp.maximum(binade, xp.float32(2.0**least)) * xp.float32(2.0 ** -(mantissa + 1))


def is_coarser(base_dtype: Any, finetuned_dtypes: Iterable[Any]) -> bool:
    """Whether a dtype has fewer mantissa bits than every one of some others.

    Args:
      base_dtype: of the anchor; what `np.dtype` accepts.
      finetuned_dtypes: of the replicas, one or more.

    Returns:
      False, too, where a dtype is not floating.

    Example:
      >>> is_coarser("float16", ["float32", "float64"]), is_coarser("float32", ["float32"])
      (True, False)
    """
    base, others = np.dtype(base_dtype), [np.dtype(dtype) for dtype in finetuned_dtypes]
    if not others or any(d.kind in "iub" for d in (base, *others)):
        return False
    return _format(base)[0] < min(_format(other)[0] for other in others)


def correct_gram(gram, energy):
    """Gram matrix without the rounding error that all task vectors share: G_ij - E.

    - Rows and columns of replicas that did not move are unchanged: they hold no error.
    - Units in which all replicas that moved are equal are unchanged: a tensor that has been frozen
      since before the anchor was rounded. The plain rule gives t = 1 and their weights.
    - A squared norm keeps at least a small fraction of itself, and an off-diagonal entry stays
      within the product of its norms, so that cosines are defined, and in [-1, 1]. An off-diagonal
      entry that is not above E becomes 0 or negative: t = 0 by the plain rule.

    Args:
      gram: [N, N, ...].
      energy: E of each unit, [...]; 0 where the anchor is not coarser.

    Returns:
      [N, N, ...], of the dtype of `gram`.

    Example:
      >>> correct_gram(np.array([[3.0, 2.5], [2.5, 3.0]]), np.array(2.0)).tolist()
      [[1.0, 0.5], [0.5, 1.0]]
    """
    xp = geometry.namespace(gram)
    active = geometry.is_moved(gram)
    both = active[:, None] & active[None]
    most = xp.where(both, gram, -np.inf).max(axis=(0, 1))
    least = xp.where(both, gram, np.inf).min(axis=(0, 1))
    alike = most - least <= ALIKE * most
    energy = xp.where(alike, 0.0, energy).astype(gram.dtype)

    own = geometry.squared_norms(gram)
    floor = xp.maximum(LEAST_FRACTION * own, 2.0 * geometry.MIN_SQUARED_NORM)
    own = xp.minimum(own, xp.maximum(own - energy[None], floor))  # 0 stays 0
    norm = geometry.positive_sqrt(own)
    bound = norm[:, None] * norm[None]
    products = xp.clip(gram - energy[None, None], -bound, bound)
    diagonal = np.eye(len(gram), dtype=bool).reshape(2 * (len(gram),) + (1,) * (gram.ndim - 2))
    corrected = xp.where(diagonal, own[None], products)
    return xp.where((energy > 0)[None, None], corrected, gram)


def started_from_rounded(off_diagonal, energy, count):
    """Whether training started from the rounded anchor, so that there is nothing to correct.

    If the anchor was rounded afterwards, m = signal + |e|^2 in every tensor, and |e|^2 is close to
    E. The answer is True if tensors with more than 5 % of the elements have m < (1 - margin) E,
    margin = max(0.1, 8 / sqrt(count)). It reads tensors of at least 4096 elements; if there are
    none, all tensors count as one. Why not a mean: one tensor that moved far would hide the others.
    Why elements and not tensors: a few vectors of ones or zeros were not changed by rounding, so
    their m is small whatever the origin.

    Simulated with both origins, bfloat16, float16 and float8_e4m3fn, tensors of 64 to 10^6
    elements, cosines 0.1 to 0.9, and squared movements l^2 of 0.1 to 100 E:

    - Training from the rounded anchor was found in every trial with a signal below 0.8 E, if all
      tensors moved alike. A signal above E cannot be told from a rounding error: the answer is
      then False, which is wrong. Between 0.8 and 1 E it is either. Where movements differ between
      tensors (by a factor of e^1.5) around a signal of 0.5 E, it was found in every trial if
      tensors are large, and in 7 to 16 % if none has 4096 elements.
    - Rounding afterwards was found in every trial for normal weights, also if 80 or 100 % of the
      tensors are frozen; with tails as Student's t with 4 degrees of freedom in 97 % of bfloat16
      models of 20 tensors of 4096 elements (87 % in float8_e4m3fn), and in all of larger ones.
      Two exceptions, in which the answer is True: replicas without a common movement (cosine 0)
      that moved far (m / E varies by l^2 / (E sqrt(count))), and float8_e5m2 anchors from which
      the replicas moved little (E is 13 % too large there).

    Args:
      off_diagonal: m, mean of G_ij over pairs of replicas that moved, of each tensor, [T]; 0 where
        fewer than two did (their bits equal the anchor's, which rounding would have changed).
      energy: E of each tensor, [T]; tensors of energy 0 do not count.
      count: elements of each tensor, [T].

    Returns:
      bool, [].

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
    known = xp.isfinite(off_diagonal) & (energy > 0)
    product, energy, count = (xp.where(known, x, 0.0) for x in (off_diagonal, energy, count))
    large = xp.where(count >= LARGE, count, 0.0)
    small = _below(product.sum(), energy.sum(), count.sum()) & known.any()
    several = xp.where(_below(product, energy, count), large, 0.0).sum() > SHARE * large.sum()
    return xp.where(large.sum() > 0, several, small)


def _below(product, energy, count):
    xp = geometry.namespace(product)
    noise = NOISE / xp.sqrt(xp.maximum(count, 1.0))
    return product < (1.0 - xp.clip(noise, BIAS, MOST_MARGIN)) * energy


@functools.cache
def _format(dtype: np.dtype) -> tuple[int, int]:
    """Mantissa bits, and the exponent of the smallest normal number; found by rounding to it.

    NumPy's finfo has no bfloat16 and no float8, and this module does without ml_dtypes and JAX.
    """
    mantissa = 0
    while float(np.float64(1 + 2.0 ** -(mantissa + 1)).astype(dtype)) > 1 and mantissa < 52:
        mantissa += 1
    least = 0
    while float(np.float64(2.0 ** (least - 1)).astype(dtype)) > 0 and least > -1074:
        least -= 1
    return mantissa, least + mantissa


def _half_ulp_square(values: np.ndarray) -> np.ndarray:
    """The exponent bits alone are the binade, a power of two, and a constant times the ulp."""
    mantissa, least = _format(values.dtype)
    wide = np.dtype(np.float64 if values.dtype == np.float64 else np.float32)
    unsigned = np.dtype(f"u{wide.itemsize}")
    bits = values.astype(wide).view(unsigned)
    bits &= np.array(np.inf, wide).view(unsigned)
    binade = bits.view(wide)
    binade[np.isinf(binade)] = 0.0
    square = np.maximum(binade, wide.type(2.0**least), out=binade).astype(np.float64)
    square *= 2.0 ** -(mantissa + 1)
    square *= square
    return square


@functools.cache
def _squares_of_bytes(dtype: np.dtype) -> np.ndarray:
    return _half_ulp_square(np.arange(256, dtype=np.uint8).view(dtype))
