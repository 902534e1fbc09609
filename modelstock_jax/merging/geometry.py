"""Cosines, ratios, distances and shells from a Gram matrix, for NumPy and JAX arrays.

The Gram matrix G_ij = d_i . d_j of N task vectors d_i = w_i - w0 has shape [N, N, ...]; the
trailing axes run over merge units. No function here needs the weights themselves. Section 2 of
docs/method.md derives equation 2, section 3 equation 3, and section 5 the distances.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.errors import UserError

# Values that mark an undefined cosine or distance. They are finite because a NaN would raise an
# error under jax_debug_nans. Mask them before taking a mean or a sum.
COSINE_UNDEFINED = 2.0
DISTANCE_UNDEFINED = -1.0
# A replica changed if its squared norm is above this: the smallest normal float32.
MIN_SQUARED_NORM = float(np.finfo(np.float32).tiny)


class Distances(NamedTuple):
    """Expected distances from the center mu.

    Attributes:
      replica: of a single fine-tuned model
      mean: of the mean of the N replicas
      merged: of the merged weights
    """

    replica: Any
    mean: Any
    merged: Any


def squared_norms(gram):
    """Return |d_i|^2 = G_ii: [N, N, ...] -> [N, ...].

    Example:
      >>> squared_norms(np.array([[4.0, 1.0], [1.0, 9.0]])).tolist()
      [4.0, 9.0]
    """
    xp = namespace(gram)
    diagonal = _expand_mask(np.eye(len(gram), dtype=bool), gram)
    return xp.sum(xp.where(diagonal, gram, 0.0), axis=1)


def is_moved(gram):
    """Return whether each replica changed, [N, ...] bool: |d_i|^2 > `MIN_SQUARED_NORM`."""
    return squared_norms(gram) > MIN_SQUARED_NORM


def mean_pairs(values, active):
    """Return the mean over pairs i < j of active replicas, [N, N, ...] -> [...]; 0 if none."""
    xp = namespace(values)
    upper = _expand_mask(np.triu(np.ones((len(values), len(values)), bool), 1), values)
    both_active = active[:, None] & active[None] & upper
    count = xp.sum(xp.where(both_active, xp.ones_like(values), 0.0), axis=(0, 1))
    total = xp.sum(xp.where(both_active, values, 0.0), axis=(0, 1))
    return total / xp.where(count > 0, count, 1.0)


def cosine(gram):
    """Return the mean cosine over all pairs, cos = mean_{i<j} G_ij / (|d_i| |d_j|).

    This is cos(theta) of the paper's section 3. The paper does not define it for N > 2; its authors
    use the mean of the pairwise cosines.

    Args:
      gram: [N, N, ...]

    Returns:
      [...] in [-1, 1], over the replicas that changed; `COSINE_UNDEFINED` if fewer than two did

    Example:
      >>> round(float(cosine(np.array([[2.0, 1.0], [1.0, 2.0]]))), 6)
      0.5
    """
    xp = namespace(gram)
    active = is_moved(gram)
    squares = squared_norms(gram)
    norms = xp.sqrt(xp.where(active, squares, 1.0))
    # Divide by one norm at a time: the product of two norms may overflow or underflow.
    pairs = gram / norms[:, None] / norms[None, :]
    mean = xp.clip(mean_pairs(pairs, active), -1.0, 1.0)
    return xp.where(xp.sum(active, axis=0) > 1, mean, COSINE_UNDEFINED)


def ratio(cosine, num_replicas):
    """Return the interpolation ratio t = N cos / (1 + (N - 1) cos), or 0 if cos <= 0 (equation 3).

    N = 2 gives equation 2. If cos <= 0, the task vectors show no common signal.

    Args:
      cosine: [...] in [-1, 1]
      num_replicas: N, a scalar or an array [...]

    Returns:
      [...] in [0, 1]

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
    """Return the angle theta = arccos(cos) in degrees; the cosine is clipped to [-1, 1].

    Example:
      >>> round(float(angle(np.array(0.5))), 3)
      60.0
    """
    xp = namespace(cosine)
    return xp.arccos(xp.clip(cosine, -1.0, 1.0)) * (180.0 / math.pi)


def predicted_distances(
    mean_squared_norm,
    mean_product,
    cosine,
    num_replicas,
    ratio,
    *,
    fixed_ratio=False,
    squared_coefficients=None,
) -> Distances:
    """Return the expected distances from the center mu, although mu is unknown.

    With l^2 the mean squared norm and |mu|^2 the mean product of two task vectors:

        replica   l sqrt(1 - cos)
        mean      l sqrt((1 - cos) / N)
        merged    |mu| sqrt(1 - t)

    For coefficients a_i that were not measured, with sum r, the distance of the merged weights is

        sqrt((1 - r)^2 |mu|^2 + sum_i(a_i^2) l^2 (1 - cos))

    Equal coefficients have sum_i(a_i^2) = r^2 / N; the distance is then minimal at the ratio of
    equation 3.

    Args:
      mean_squared_norm: l^2, [...]
      mean_product: |mu|^2, [...]; a negative value counts as 0
      cosine: [...], in [-1, 1]
      num_replicas: N
      ratio: t or r, [...]
      fixed_ratio: whether the coefficients were not measured; a bool or [...]
      squared_coefficients: sum_i(a_i^2), [...]; None for equal coefficients

    Returns:
      `Distances` of [...], in the units of the weights

    Example:
      >>> one = np.array(1.0)
      >>> [round(float(d), 3) for d in predicted_distances(one, one / 2, one / 2, 2, one * 2 / 3)]
      [0.707, 0.5, 0.408]
    """
    xp = namespace(mean_squared_norm)
    noise = mean_squared_norm * xp.clip(1.0 - cosine, 0.0, 2.0)
    signal = xp.clip(mean_product, 0.0, None)
    if squared_coefficients is None:
        squared_coefficients = ratio**2 / num_replicas
    merged = xp.where(
        fixed_ratio,
        (1.0 - ratio) ** 2 * signal + squared_coefficients * noise,
        signal * (1.0 - ratio),
    )
    return Distances(*(positive_sqrt(square) for square in (noise, noise / num_replicas, merged)))


def mean_distance(single_distance, num_averaged, num_center=None):
    """Return the distance of the mean of N models from the center (Table 1).

        single_distance * sqrt((1/N - 1/M) / (1 - 1/M))

    Here the center is a pseudo-center: the mean of M models that include the N. For the true center
    (`num_center=None`) the distance is single_distance / sqrt(N).

    Args:
      single_distance: distance of a single model from the center
      num_averaged: N
      num_center: M, or None

    Example:
      >>> round(mean_distance(13.133, 2, 50), 2)
      9.19
    """
    center = 0.0 if num_center is None else 1.0 / num_center
    return single_distance * math.sqrt((1.0 / num_averaged - center) / (1.0 - center))


def num_averaged(single_distance, mean, num_center=None):
    """Return N for the mean of N models at a distance from the center: inverts `mean_distance`.

    It detects wrong rows of a table: the paper's Table 7 gives 5.63 for N = 4, the distance of five
    models.

    Args:
      single_distance: distance of a single model from the center
      mean: distance of the mean from the center
      num_center: M, as in `mean_distance`, or None

    Example:
      >>> round(num_averaged(13.133, 5.63, 50), 1)
      5.0
    """
    center = 0.0 if num_center is None else 1.0 / num_center
    return 1.0 / ((mean / single_distance) ** 2 * (1.0 - center) + center)


def positive_sqrt(value):
    """Return the square root of the positive part; its derivative at 0 is 0, not infinity."""
    xp = namespace(value)
    positive = value > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, value, 1.0)), 0.0)


def _expand_mask(mask, like):
    """Reshape a mask over pairs [N, N] to the rank of an array [N, N, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - 2))


def namespace(array):
    """Return the array's own namespace, NumPy or jax.numpy, so that one rule serves both."""
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else np


class Shell(NamedTuple):
    """Properties (i) to (iii) of section 2.1 for M models; trailing axes run over units.

    Attributes:
      radius: (i) |w_i - mu|, [M, ...]
      anchor_cosine: (ii) cosine of w_0 - mu and w_i - mu, [M, ...]
      pair_cosine: (iii) cosine of w_i - mu and w_j - mu, [M, M, ...]; 1 on the diagonal
      center: |mu - w_0|, [...]
    """

    radius: Any
    anchor_cosine: Any
    pair_cosine: Any
    center: Any


def shell(gram) -> Shell:
    """Return radii and angles of M models about their center, without the bias of a sample mean.

    The mean of M models is closer to each of them than the true center is, and biases (ii) and
    (iii) away from 90 degrees. Therefore mu is estimated for each model from the other models only,
    and |mu|^2 from products of two different models. With G_ij = d_i . d_j and j, k != i:

        mu . d_i = mean_j G_ij        |mu|^2 = mean_{j < k} G_jk
        |w_i - mu|^2 = G_ii - 2 mu . d_i + |mu|^2
        (w_0 - mu) . (w_i - mu) = |mu|^2 - mu . d_i

    For a pair, both of its models are left out. Each estimate is unbiased for independent models.
    The products of (ii), and those of (iii), sum to 0 for any M models: the result to look at is
    their spread, not their mean.

    Args:
      gram: [M, M, ...] of the task vectors, M >= 4, NumPy or JAX. To join units, add their Gram
        matrices.

    Raises:
      UserError: fewer than 4 models

    Example:
      >>> noise = np.eye(4, 5)  # orthogonal, of length 1, about mu = 2 e_5
      >>> found = shell((noise + 2 * np.eye(5)[4]) @ (noise + 2 * np.eye(5)[4]).T)
      >>> found.radius.tolist(), float(found.center), float(abs(found.anchor_cosine).max())
      ([1.0, 1.0, 1.0, 1.0], 2.0, 0.0)
    """
    count = len(gram)
    if count < 4:
        raise UserError(
            f"shell needs at least 4 models, not {count}: it holds out two per estimate"
        )
    xp = namespace(gram)
    squared_norm = squared_norms(gram)
    row_sums = gram.sum(axis=1) - squared_norm  # over the other models
    total = row_sums.sum(axis=0)
    center_product = row_sums / (count - 1)  # mu . d_i
    center_square = (total[None] - 2 * row_sums) / ((count - 1) * (count - 2))  # |mu|^2
    radius = positive_sqrt(squared_norm - 2 * center_product + center_square)
    center = positive_sqrt(total / (count * (count - 1)))
    anchor_cosine = (center_square - center_product) / _one_if_zero(xp, radius * center[None])

    # For a pair i, j: mu . d_i without j, and |mu|^2 without both.
    pair_product = (row_sums[:, None] - gram) / (count - 2)
    rest = total[None, None] - 2 * row_sums[:, None] - 2 * row_sums[None] + 2 * gram
    pair_square = rest / ((count - 2) * (count - 3))
    products = gram - pair_product - xp.swapaxes(pair_product, 0, 1) + pair_square
    cosine = products / _one_if_zero(xp, radius[:, None] * radius[None])
    diagonal = xp.eye(count, dtype=bool).reshape((count, count) + (1,) * (gram.ndim - 2))
    return Shell(radius, anchor_cosine, xp.where(diagonal, 1.0, cosine), center)


def true_distance(measured, num_averaged, num_center, *, included=True):
    """Return the distance of a mean of N models from the true center.

        measured / sqrt(1 - N / M)      if the M models of the pseudo-center include the N
        measured / sqrt(1 + N / M)      if they do not (a held-out center)

    Args:
      measured: distance of the mean from the pseudo-center, the mean of M models
      num_averaged: N
      num_center: M
      included: whether the M models include the N

    Raises:
      UserError: `included` and N >= M

    Example:
      >>> round(true_distance(13.133, 1, 50), 2)
      13.27
    """
    fraction = num_averaged / num_center
    if included and fraction >= 1:
        raise UserError(
            f"the mean of {num_averaged} of {num_center} models is the pseudo-center itself, so "
            "its distance is not measurable; pass fewer averaged models"
        )
    return measured / math.sqrt(1.0 - fraction if included else 1.0 + fraction)


def _one_if_zero(xp, value):
    return xp.where(value > 0, value, 1.0)
