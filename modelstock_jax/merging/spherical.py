"""Means on a sphere: coefficients of the vectors of a merge unit from their Gram matrix.

The vectors are the weights, or the task vectors if there is a base. Their directions are merged on
the unit sphere; the result is multiplied by a mean of their norms.
"""

from __future__ import annotations

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry
from modelstock_jax.merging.rules import slerp_coefficients

# Above this |cosine|, an arc and its chord differ by less than the rounding of float64.
_STRAIGHT = 1 - 1e-14


def nuslerp(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the coefficients of two vectors on the arc between them, [2, ...].

        t = c_2 / (c_1 + c_2),    a_1 = sin((1 - t) Omega) / sin(Omega),
        a_2 = sin(t Omega) / sin(Omega)

    Args:
      gram: [2, 2, ...]
      weights: c, [2]; t is 1/2 if their sum is 0

    Example:
      >>> nuslerp(np.eye(2)[..., None], np.array([1.0, 1.0])).round(4).ravel().tolist()
      [0.7071, 0.7071]
    """
    total = weights.sum()
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    return np.stack(slerp_coefficients(gram[0, 0], gram[1, 1], gram[0, 1], t, _STRAIGHT))


def multislerp(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the coefficients of the weighted mean direction times the weighted mean norm.

        u_i = v_i / |v_i|,    m = sum_i c_i u_i,    merged = (sum_i c_i |v_i|) m / |m|

    The published method also interpolates in the tangent space at m. It adds nothing: the weighted
    sum of the tangent vectors at m is zero.

    Args:
      gram: [N, N, ...]
      weights: c, [N]

    Returns:
      [N, ...]. Vectors of length zero have no direction and are left out. If m is zero, two vectors
      are interpolated linearly.

    Raises:
      UserError: m is zero for more than two vectors

    Example:
      >>> multislerp(np.eye(2)[..., None], np.array([0.5, 0.5])).round(4).ravel().tolist()
      [0.7071, 0.7071]
    """
    weights = weights.reshape((-1,) + (1,) * (gram.ndim - 2))
    norms, directions = _directions(gram)
    factors = weights * directions
    length = _length(factors, gram)
    opposed = (length < 1e-8) & (norms > 0).any(axis=0)
    if opposed.any() and len(gram) > 2:
        raise UserError(
            "the weighted directions of the models sum to zero, so multislerp is not defined; "
            "change --weights"
        )
    mean = factors * (weights * norms).sum(axis=0) / np.where(length > 0, length, 1)
    return np.where(opposed, np.broadcast_to(weights, mean.shape), mean)


def karcher_mean(gram: np.ndarray, max_iter: int = 10, tol: float = 1e-5) -> np.ndarray:
    """Return the coefficients of the Karcher mean of the directions times the mean norm, [N, ...].

    The Karcher mean minimizes the sum of squared angles. Each iteration moves by the mean of the
    tangent vectors from the current mean to the directions:

        x = mean_i(theta_i / sin(theta_i) (u_i - cos(theta_i) m)),
        m <- cos(|x|) m + sin(|x|) x / |x|,    theta_i: angle between m and u_i

    Args:
      gram: [N, N, ...]
      max_iter: maximum number of iterations
      tol: iterations end when |x| is below it; vectors with a smaller norm have no direction

    Example:
      >>> karcher_mean(np.eye(2)[..., None]).round(4).ravel().tolist()
      [0.7071, 0.7071]
    """
    norms, directions = _directions(gram, tol)
    number = np.maximum((directions > 0).sum(axis=0), 1)
    mean = directions / number
    length = _length(mean, gram)
    # Directions that cancel have no mean to start from: start from the first.
    first = (directions > 0) & ((directions > 0).cumsum(axis=0) == 1)
    mean = np.where(length < tol, directions * first, mean / np.where(length > 0, length, 1))
    moving = np.ones(length.shape, bool)
    for _ in range(max_iter):
        cosine = np.clip(directions * np.einsum("ij...,j...->i...", gram, mean), -1, 1)
        angle = np.arccos(cosine)
        far = (angle >= tol) & (directions > 0)
        share = np.where(far, angle / np.where(far, np.sin(angle), 1), 0) / number
        step = share * directions - (share * cosine).sum(axis=0) * mean
        length = _length(step, gram)
        moving &= length >= tol
        if not moving.any():
            break
        turned = np.cos(length) * mean + np.sin(length) * step / np.where(length > 0, length, 1)
        size = _length(turned, gram)
        mean = np.where(moving, turned / np.where(size > tol, size, 1), mean)
    return mean * norms.mean(axis=0)


def _directions(gram: np.ndarray, smallest: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the norms [N, ...], and their inverses; 0 for norms that are not above `smallest`."""
    norms = np.sqrt(np.maximum(geometry.squared_norms(gram), 0))
    return norms, np.where(norms > smallest, 1 / np.where(norms > smallest, norms, 1), 0)


def _length(coefficients: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Return the length of sum_i a_i v_i, [...]."""
    square = np.einsum("i...,ij...,j...->...", coefficients, gram, coefficients)
    return np.sqrt(np.maximum(square, 0))
