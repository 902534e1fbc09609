"""From a Gram matrix to cosines, ratios, distances and shells; NumPy or JAX arrays, in and out.

The Gram matrix G_ij = d_i . d_j of N task vectors d_i = w_i - w0 has shape [N, N, ...]; the
trailing axes run over merge units. Nothing else of the weights is needed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.errors import UserError

COSINE_UNDEFINED = 2.0  # outside [-1, 1], and no NaN: arrays stay clean under jax_debug_nans
DISTANCE_UNDEFINED = -1.0
MIN_SQUARED_NORM = float(np.finfo(np.float32).tiny)


class Distances(NamedTuple):
    """Expected distances from the center: of one replica, of the mean, of the merged weights."""

    replica: Any
    mean: Any
    merged: Any


def squared_norms(gram):
    """|d_i|^2 = G_ii: [N, N, ...] -> [N, ...].

    Example:
      >>> squared_norms(np.array([[4.0, 1.0], [1.0, 9.0]])).tolist()
      [4.0, 9.0]
    """
    xp = namespace(gram)
    diagonal = _pairs(np.eye(len(gram), dtype=bool), gram)
    return xp.sum(xp.where(diagonal, gram, 0.0), axis=1)


def is_moved(gram):
    """Which replicas moved at all, [N, ...] bool: a squared norm that float32 can hold."""
    return squared_norms(gram) > MIN_SQUARED_NORM


def mean_pairs(values, active):
    """Mean over the pairs i < j of active replicas, [N, N, ...] -> [...]; 0 where there is none."""
    xp = namespace(values)
    above = _pairs(np.triu(np.ones((len(values), len(values)), bool), 1), values)
    both = active[:, None] & active[None] & above
    pairs = xp.sum(xp.where(both, xp.ones_like(values), 0.0), axis=(0, 1))
    return xp.sum(xp.where(both, values, 0.0), axis=(0, 1)) / xp.where(pairs > 0, pairs, 1.0)


def cosine(gram):
    """Mean cosine over all pairs of task vectors, cos = mean_{i<j} G_ij / (|d_i| |d_j|).

    The angle theta of section 3; its mean over pairs, for N > 2, is the authors' own choice.

    Args:
      gram: [N, N, ...].

    Returns:
      [...] in [-1, 1], of the replicas that moved; `COSINE_UNDEFINED` where fewer than two did.

    Example:
      >>> round(float(cosine(np.array([[2.0, 1.0], [1.0, 2.0]]))), 6)
      0.5
    """
    xp = namespace(gram)
    active = is_moved(gram)
    squares = squared_norms(gram)
    norms = xp.sqrt(xp.where(active, squares, 1.0))
    # One norm after the other: their product may leave the range where the quotient does not.
    pairs = gram / norms[:, None] / norms[None, :]
    mean = xp.clip(mean_pairs(pairs, active), -1.0, 1.0)
    return xp.where(xp.sum(active, axis=0) > 1, mean, COSINE_UNDEFINED)


def ratio(cosine, num_replicas):
    """Interpolation ratio t = N cos / (1 + (N - 1) cos), 0 where cos <= 0 (equation 3).

    N = 2 gives equation 2. A cosine of at most 0 means that no common movement was seen.

    Args:
      cosine: [...] in [-1, 1].
      num_replicas: N, a number or an array [...].

    Returns:
      [...] in [0, 1].

    Example:
      >>> round(float(ratio(np.array(0.5), 2)), 4)
      0.6667
    """
    xp = namespace(cosine)
    positive = cosine > 0
    safe = xp.where(positive, cosine, 1.0)
    t = num_replicas * safe / (1.0 + (num_replicas - 1.0) * safe)
    return xp.where(positive, xp.clip(t, 0.0, 1.0), 0.0)


def angle(cosine):
    """Angle in degrees, theta = arccos(cos); the cosine clipped to [-1, 1].

    Example:
      >>> round(float(angle(np.array(0.5))), 3)
      60.0
    """
    xp = namespace(cosine)
    return xp.arccos(xp.clip(cosine, -1.0, 1.0)) * (180.0 / math.pi)


def predicted_distances(
    square, signal, cosine, num_replicas, ratio, *, fixed_ratio=False, squared_coefficients=None
) -> Distances:
    """Expected distances from the center, which nobody needs to know.

    With l^2 the mean squared norm and |mu|^2 the mean product of two task vectors:
    one replica l sqrt(1 - cos), the mean of N of them l sqrt((1 - cos) / N), the merged weights
    |mu| sqrt(1 - t). For coefficients a_i that were given and not measured, with r their sum, the
    last is sqrt((1 - r)^2 |mu|^2 + sum_i(a_i^2) l^2 (1 - cos)); among equal ones, whose
    sum_i(a_i^2) is r^2 / N, it is least at equation 3's ratio.

    Args:
      square: l^2, [...].
      signal: |mu|^2, [...]; negative counts as 0.
      cosine: [...], in [-1, 1].
      num_replicas: N.
      ratio: t or r, [...].
      fixed_ratio: whether the ratio was given; a bool or [...].
      squared_coefficients: sum_i(a_i^2), [...]; None for equal shares.

    Returns:
      `Distances` of [...], in the units of the weights.

    Example:
      >>> one = np.array(1.0)
      >>> [round(float(d), 3) for d in predicted_distances(one, one / 2, one / 2, 2, one * 2 / 3)]
      [0.707, 0.5, 0.408]
    """
    xp = namespace(square)
    noise = square * xp.clip(1.0 - cosine, 0.0, 2.0)
    signal = xp.clip(signal, 0.0, None)
    if squared_coefficients is None:
        squared_coefficients = ratio**2 / num_replicas
    merged = xp.where(
        fixed_ratio,
        (1.0 - ratio) ** 2 * signal + squared_coefficients * noise,
        signal * (1.0 - ratio),
    )
    return Distances(*(positive_sqrt(part) for part in (noise, noise / num_replicas, merged)))


def mean_distance(single_distance, num_averaged, num_center=None):
    """Distance of the mean of N models from the center, from that of one model (Table 1).

    one * sqrt((1/N - 1/M) / (1 - 1/M)), where the center is itself the mean of M models that
    include these; M = None is the true center, one / sqrt(N).

    Example:
      >>> round(mean_distance(13.133, 2, 50), 2)
      9.19
    """
    center = 0.0 if num_center is None else 1.0 / num_center
    return single_distance * math.sqrt((1.0 / num_averaged - center) / (1.0 - center))


def num_averaged(single_distance, mean, num_center=None):
    """How many models a mean at this distance from the center is of: `mean_distance`, inverted.

    It finds rows of a table that are not what they say: the paper's Table 7 gives 5.63 for N = 4.

    Example:
      >>> round(num_averaged(13.133, 5.63, 50), 1)
      5.0
    """
    center = 0.0 if num_center is None else 1.0 / num_center
    return 1.0 / ((mean / single_distance) ** 2 * (1.0 - center) + center)


def positive_sqrt(value):
    """Square root of the positive part, with derivative 0 and not infinity at 0."""
    xp = namespace(value)
    positive = value > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, value, 1.0)), 0.0)


def _pairs(mask, like):
    """A mask over pairs [N, N], with the rank of an array [N, N, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - 2))


def namespace(array):
    """NumPy or jax.numpy, whichever the array is of; a new way to merge needs no second copy."""
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else np


# The thin shell of section 2.1, measured about a center that no measured model had a part in.


class Shell(NamedTuple):
    """Properties (i) to (iii) of M models about their center; trailing axes run over units."""

    radius: Any  # [M, ...], (i) |w_i - mu|
    anchor_cosine: Any  # [M, ...], (ii) of w_0 - mu and w_i - mu
    pair_cosine: Any  # [M, M, ...], (iii) of w_i - mu and w_j - mu; 1 on the diagonal
    center: Any  # [...], |mu - w_0|


def shell(gram) -> Shell:
    """Radii and angles of M models about their center, without the bias of a sample mean.

    The mean of M models lies nearer to each of them than the true center does, and turns (ii) and
    (iii) away from 90 degrees. So mu is estimated for each model from the others alone, and its
    square from products of two different ones; with G_ij = d_i . d_j, all j, k other than i:

        mu . d_i = mean_j G_ij        |mu|^2 = mean_{j < k} G_jk
        |w_i - mu|^2 = G_ii - 2 mu . d_i + |mu|^2
        (w_0 - mu) . (w_i - mu) = |mu|^2 - mu . d_i

    and for a pair all but both of it. Each is unbiased for independent models. The products of
    (ii) and of (iii) sum to 0 over any M models: the finding is not their mean but their spread.

    Args:
      gram: [M, M, ...] of the task vectors, M >= 4, NumPy or JAX; sums of units' are a unit's.

    Example:
      >>> noise = np.eye(4, 5)  # orthogonal, of length 1, about mu = 2 e_5
      >>> found = shell((noise + 2 * np.eye(5)[4]) @ (noise + 2 * np.eye(5)[4]).T)
      >>> found.radius.tolist(), float(found.center), float(abs(found.anchor_cosine).max())
      ([1.0, 1.0, 1.0, 1.0], 2.0, 0.0)
    """
    number = len(gram)
    if number < 4:
        raise UserError(f"a held-out center for every pair needs at least 4 models, not {number}")
    xp = namespace(gram)
    own = squared_norms(gram)
    rows = gram.sum(axis=1) - own  # sums over the others
    total = rows.sum(axis=0)
    along = rows / (number - 1)
    square = (total[None] - 2 * rows) / ((number - 1) * (number - 2))
    radius = positive_sqrt(own - 2 * along + square)
    center = positive_sqrt(total / (number * (number - 1)))
    anchor = (square - along) / _positive(xp, radius * center[None])

    # For a pair i, j: the sums above without the other one, and without both.
    without = (rows[:, None] - gram) / (number - 2)
    rest = total[None, None] - 2 * rows[:, None] - 2 * rows[None] + 2 * gram
    pairs = gram - without - xp.swapaxes(without, 0, 1) + rest / ((number - 2) * (number - 3))
    cosine = pairs / _positive(xp, radius[:, None] * radius[None])
    same = xp.eye(number, dtype=bool).reshape((number, number) + (1,) * (gram.ndim - 2))
    return Shell(radius, anchor, xp.where(same, 1.0, cosine), center)


def true_distance(measured, num_averaged, num_center, *, included=True):
    """Distance of the mean of N models from the true center, from that to a pseudo-center of M.

        measured / sqrt(1 - N / M)      where the M models include the N
        measured / sqrt(1 + N / M)      where they do not: a held-out center

    Example:
      >>> round(true_distance(13.133, 1, 50), 2)
      13.27
    """
    share = num_averaged / num_center
    if included and share >= 1:
        raise UserError(
            f"the mean of {num_averaged} of {num_center} models is the pseudo-center "
            "itself: it says nothing about its distance"
        )
    return measured / math.sqrt(1.0 - share if included else 1.0 + share)


def _positive(xp, value):
    return xp.where(value > 0, value, 1.0)
