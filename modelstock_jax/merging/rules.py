"""Merge rules: functions from the Gram matrix of a merge unit to its coefficients.

The merged weights of a unit are w0 + sum_i a_i d_i. A rule computes the coefficients a_i from

    gram       [N, N, ...], G_ij = d_i . d_j; the trailing axes run over units
    is_scalar  [...] bool: the unit has fewer than two elements, hence no angle

and from the further inputs that its signature names. Training, the library and the file merge all
use these functions. Inputs and outputs are NumPy or JAX arrays.
"""

from __future__ import annotations

import collections
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry
from modelstock_jax.merging.anchor_rounding import correct_gram


class UnitOutcome(enum.IntEnum):
    """How a merge unit was merged. `stats.outcome` contains these codes as int8."""

    INTERPOLATED = 0  # the rule itself: w0 + t mean(d)
    FIXED_RATIO = 1  # the ratio was an input, not measured
    CLAMPED = 2  # cos <= 0, or carried noise above the squared mean update: t = 0, the anchor
    UNCHANGED = 3  # no replica changed: the anchor, bit for bit
    ONE_MODEL_CHANGED = 4  # only one replica changed: its weights, bit for bit
    UNCHANGED_MODELS_LEFT_OUT = 5  # some replicas did not change: the rule over the others
    SCALAR = 6  # a unit of fewer than two elements has no angle: the mean
    FALLBACK_TO_EQ3 = 7  # a replica's estimated noise was negative: equation 3 instead
    COPIED = 8  # integers, booleans and empty tensors: the anchor's values
    NON_FINITE = 9  # NaN or infinity in a replica: the anchor; `stats.finite` shows the replica


class NonFiniteError(UserError):
    """NaN or infinity in the weights.

    Attributes:
      replica: index of the replica, or 'pretrained'
      tensor: name of the tensor
    """

    def __init__(self, message: str, replica: int | str, tensor: str):
        super().__init__(message)
        self.replica = replica
        self.tensor = tensor


class UnitSolution(NamedTuple):
    """The coefficients of a merge unit and its measures.

    Attributes:
      coefficient: a_i, [N, ...]
      copy_replica: [N, ...] bool: the result is this replica's weights, bit for bit
      keep_anchor: [...] bool: the result is the anchor's weights, bit for bit
      cosine: [...]
      ratio: sum of the a_i, [...]
      norm: |d_i|, [N, ...]
      distance: predicted distances from the center, each [...]
      outcome: codes of `UnitOutcome`, [...] int8
      carry: state for the next merge; None if the rule has none
    """

    coefficient: Any
    copy_replica: Any
    keep_anchor: Any
    cosine: Any
    ratio: Any
    norm: Any
    distance: geometry.Distances
    outcome: Any
    carry: Any = None


class GramStats(NamedTuple):
    """Statistics of a Gram matrix, before any rule. Means are over the replicas that changed.

    Attributes:
      active: whether a replica changed, [N, ...] bool
      num_active: how many replicas changed, [...] in the dtype of the Gram matrix
      cosine: mean pairwise cosine, [...]
      mean_squared_norm: l^2, the mean of G_ii, [...]
      mean_product: |mu|^2, the mean of G_ij over pairs i < j, [...]
      outcome: INTERPOLATED or UNCHANGED_MODELS_LEFT_OUT, [...] int8
    """

    active: Any
    num_active: Any
    cosine: Any
    mean_squared_norm: Any
    mean_product: Any
    outcome: Any


def measure(gram) -> GramStats:
    """Return the statistics of a Gram matrix [N, N, ...]."""
    xp = geometry.namespace(gram)
    active = geometry.is_moved(gram)
    num_active = active.astype(gram.dtype).sum(axis=0)
    squared_norms = xp.where(active, geometry.squared_norms(gram), 0.0)
    return GramStats(
        active=active,
        num_active=num_active,
        cosine=geometry.cosine(gram),
        mean_squared_norm=squared_norms.sum(axis=0) / xp.maximum(num_active, 1.0),
        mean_product=geometry.mean_pairs(gram, active),
        outcome=xp.where(
            active.all(axis=0),
            np.int8(UnitOutcome.INTERPOLATED),
            np.int8(UnitOutcome.UNCHANGED_MODELS_LEFT_OUT),
        ),
    )


def solve_with_fallbacks(gram, stats: GramStats, is_scalar, coefficient, outcome) -> UnitSolution:
    """Return a solution from measured coefficients, with the rules for degenerate units.

    Args:
      gram: [N, N, ...]
      stats: of `gram`
      is_scalar: [...] bool
      coefficient: a_i, [N, ...]
      outcome: outcome of a unit that is not degenerate, [...] int8

    Returns:
      A `UnitSolution`. Scalar units get the mean, units in which one replica changed its weights.
    """
    xp = geometry.namespace(gram)
    one_changed = stats.num_active == 1
    mean = xp.where(stats.active, (1.0 / xp.maximum(stats.num_active, 1.0))[None], 0.0)
    coefficient = xp.where(is_scalar[None], mean, coefficient)
    outcome = xp.where(is_scalar, np.int8(UnitOutcome.SCALAR), outcome)
    copy_replica = stats.active & one_changed[None]
    coefficient = xp.where(copy_replica, 1.0, coefficient)
    outcome = xp.where(one_changed, np.int8(UnitOutcome.ONE_MODEL_CHANGED), outcome)
    outcome = xp.where(stats.num_active == 0, np.int8(UnitOutcome.UNCHANGED), outcome)
    keep_anchor = (coefficient == 0).all(axis=0)
    return _solution(
        gram, stats, is_scalar, coefficient, copy_replica, keep_anchor, outcome, fixed_ratio=False
    )


def solve_with_coefficients(gram, stats: GramStats, is_scalar, coefficient) -> UnitSolution:
    """Return a solution from coefficients that were not measured; the measures are for the report.

    Args:
      gram: [N, N, ...]
      stats: of `gram`
      is_scalar: [...] bool
      coefficient: a_i, [N, ...]
    """
    xp = geometry.namespace(gram)
    copy_none = xp.zeros_like(stats.active)
    unchanged = stats.num_active == 0  # copy the anchor: -0.0 + 0.0 would change the sign of zero
    outcome = xp.full_like(stats.outcome, UnitOutcome.FIXED_RATIO)
    return _solution(
        gram, stats, is_scalar, coefficient, copy_none, unchanged, outcome, fixed_ratio=True
    )


def _solution(
    gram, stats, is_scalar, coefficient, copy_replica, keep_anchor, outcome, *, fixed_ratio
) -> UnitSolution:
    xp = geometry.namespace(gram)
    cosine = xp.where(is_scalar, geometry.COSINE_UNDEFINED, stats.cosine)
    # If the cosine is undefined, the noise is still l^2 - |mu|^2.
    safe = xp.where(stats.mean_squared_norm > 0, stats.mean_squared_norm, 1.0)
    similarity = xp.where(cosine > 1.0, stats.mean_product / safe, cosine)
    ratio = coefficient.sum(axis=0)
    distance = geometry.predicted_distances(
        stats.mean_squared_norm,
        stats.mean_product,
        similarity,
        xp.maximum(stats.num_active, 1.0),
        ratio,
        fixed_ratio=fixed_ratio | is_scalar,
        squared_coefficients=(coefficient**2).sum(axis=0),
    )
    distance = geometry.Distances(
        *(xp.where(stats.num_active == 1, geometry.DISTANCE_UNDEFINED, d) for d in distance)
    )
    norm = geometry.positive_sqrt(geometry.squared_norms(gram))
    return UnitSolution(
        coefficient, copy_replica, keep_anchor, cosine, ratio, norm, distance, outcome
    )


def equation_3(gram, is_scalar) -> UnitSolution:
    """Return equal coefficients t / N over the replicas that changed; see `model_stock`."""
    xp = geometry.namespace(gram)
    stats = measure(gram)
    num_active = xp.maximum(stats.num_active, 1.0)
    ratio = geometry.ratio(xp.where(stats.num_active > 1, stats.cosine, 0.0), num_active)
    coefficient = xp.where(stats.active, (ratio / num_active)[None], 0.0)
    outcome = xp.where(stats.cosine <= 0, np.int8(UnitOutcome.CLAMPED), stats.outcome)
    return solve_with_fallbacks(gram, stats, is_scalar, coefficient, outcome)


def noise_weights(gram, is_scalar) -> UnitSolution:
    """Return coefficients from the noise of each replica; see `weighted_model_stock`."""
    xp = geometry.namespace(gram)
    stats, by_equation_3 = measure(gram), equation_3(gram, is_scalar)
    squared_norms = geometry.squared_norms(gram)
    noise = squared_norms - stats.mean_product[None]
    above_rounding = noise > 4.0 * float(np.finfo(np.float32).eps) * squared_norms
    has_signal = stats.mean_product > 0
    fallback = has_signal & ~(above_rounding | ~stats.active).all(axis=0)
    # |mu|^2 / s_i^2: numerator and denominator of the formula, multiplied by |mu|^2.
    valid = stats.active & (has_signal & ~fallback)[None]
    weight = xp.where(valid, stats.mean_product[None] / xp.where(valid, noise, 1.0), 0.0)
    coefficient = weight / (1.0 + weight.sum(axis=0))[None]
    coefficient = xp.where(fallback[None], by_equation_3.coefficient, coefficient)
    outcome = xp.where(has_signal, stats.outcome, np.int8(UnitOutcome.CLAMPED))
    outcome = xp.where(fallback, np.int8(UnitOutcome.FALLBACK_TO_EQ3), outcome)
    return solve_with_fallbacks(gram, stats, is_scalar, coefficient, outcome)


@functools.cache
def without_rounding(rule: Callable[..., UnitSolution]) -> Callable[..., UnitSolution]:
    """Return the rule, applied to a Gram matrix without the rounding error of the anchor.

    The new rule has two more inputs: the rounding energy E of the unit, [...], and whether training
    started from the rounded anchor, [] bool. If it did, nothing is subtracted.
    """

    def solve(gram, is_scalar, energy, started_from_rounded):
        xp = geometry.namespace(gram)
        return rule(xp.where(started_from_rounded, gram, correct_gram(gram, energy)), is_scalar)

    return solve


def fixed_ratio(gram, is_scalar, ratio) -> UnitSolution:
    """Return coefficients ratio / N for every replica, independent of the angles."""
    xp = geometry.namespace(gram)
    coefficient = xp.full_like(gram[0], 1.0 / len(gram)) * ratio.astype(gram.dtype)
    return solve_with_coefficients(gram, measure(gram), is_scalar, coefficient)


def fixed_coefficients(gram, is_scalar, coefficients) -> UnitSolution:
    """Return the given coefficients [N] for every unit, independent of the angles."""
    xp = geometry.namespace(gram)
    coefficient = xp.asarray(coefficients, gram.dtype).reshape((-1,) + (1,) * (gram.ndim - 2))
    return solve_with_coefficients(
        gram, measure(gram), is_scalar, xp.broadcast_to(coefficient, gram.shape[1:])
    )


def ties_statistics(gram, is_scalar, scale) -> UnitSolution:
    """Return the statistics of a TIES merge: ratio `scale`, no distance of the merged weights.

    The coefficients are those of the untrimmed mean task vector. TIES computes the merged weights
    from the trimmed elements instead.
    """
    xp = geometry.namespace(gram)
    solution = fixed_ratio(gram, is_scalar, scale)
    undefined = xp.full_like(solution.ratio, geometry.DISTANCE_UNDEFINED)
    return solution._replace(distance=solution.distance._replace(merged=undefined))


def ratio_by_layer(gram, is_scalar, index, last, alpha, beta) -> UnitSolution:
    """Return coefficients ratio / N with the ratio of LiNeS, alpha + beta (l - 1) / (L - 1).

    Args:
      gram: [N, N, ...]
      is_scalar: [...] bool
      index: l - 1 of each unit, [...]
      last: L - 1, at least 1, [...]
      alpha: ratio of the first layer, []
      beta: what is added up to the last layer, []
    """
    xp = geometry.namespace(gram)
    ratio = (alpha + beta * (index / last)).astype(gram.dtype)
    coefficient = xp.broadcast_to((ratio / len(gram))[None], gram.shape[1:])
    return solve_with_coefficients(gram, measure(gram), is_scalar, coefficient)


def ties_ranks(
    density: float | Sequence[float] | np.ndarray,
    count: int,
    num_replicas: int,
    *,
    round_down: bool = False,
) -> list[int]:
    """Return how many of `count` elements TIES keeps of each task vector, at least 1; 0 of none.

    It is density * count, rounded to the nearest integer (half to even, as Python's `round`).
    Rounded down, a product just below an integer would lose an element.

    Args:
      density: in [0, 1], one value, or one per replica; 0 keeps nothing
      count: number of elements that are ranked together
      num_replicas: N
      round_down: round density * count down, as mergekit does

    Example:
      >>> ties_ranks(0.29, 100, 2), ties_ranks(0.29, 100, 2, round_down=True)
      ([29, 29], [28, 28])
    """
    densities = np.broadcast_to(np.asarray(density, np.float64), num_replicas)
    integer = int if round_down else round
    return [max(1, integer(float(d) * count)) if d > 0 else 0 for d in densities]


def breadcrumbs_ranks(
    density: Sequence[float] | np.ndarray, gamma: Sequence[float] | np.ndarray, count: int
) -> tuple[list[int], list[int]]:
    """Return the ranks of the smallest and the largest magnitude that Model Breadcrumbs keeps.

    Of `count` elements, int(gamma count) of the largest are dropped, then the smallest until
    int(density count) remain. Fewer of the largest are dropped if else too few would remain.

    Args:
      density: fraction that remains, in [0, 1], [N]; 1 keeps all
      gamma: fraction of the largest that is dropped, [N]
      count: number of elements that are ranked together

    Returns:
      Two ranks per replica, counted from 1 for the largest magnitude; the first is 0 if nothing
      remains.

    Example:
      >>> breadcrumbs_ranks([0.5, 0.9], [0.1, 0.2], 10)
      ([6, 10], [2, 2])
    """
    smallest, largest = [], []
    for d, g in zip(density, gamma, strict=True):
        kept = count if d >= 1 else int(float(d) * count)
        dropped = min(int(float(g) * count), count - kept)
        smallest.append(dropped + kept if kept else 0)
        largest.append(dropped + 1)
    return smallest, largest


def sequential_slerp(gram, is_scalar, ratios) -> UnitSolution:
    """Return the coefficients of task vectors that are merged along arcs, one after the other.

    Args:
      gram: [N, N, ...]
      is_scalar: [...] bool
      ratios: [N - 1]; ratios[m - 1] is t of the step that adds d_m, m = 1 .. N - 1 from 0.
    """
    xp = geometry.namespace(gram)
    squared_norms = geometry.squared_norms(gram)
    coefficients = [xp.ones_like(squared_norms[0])]
    coefficients += [xp.zeros_like(squared_norms[0])] * (len(gram) - 1)
    for m in range(1, len(gram)):
        product = sum(coefficients[i] * gram[i, m] for i in range(m))
        squared_norm = sum(
            coefficients[i] * coefficients[j] * gram[i, j] for i in range(m) for j in range(m)
        )
        from_factor, to_factor = slerp_coefficients(
            squared_norm, squared_norms[m], product, ratios[m - 1]
        )
        coefficients = [from_factor * c for c in coefficients]
        coefficients[m] = to_factor
    return solve_with_coefficients(gram, measure(gram), is_scalar, xp.stack(coefficients))


def slerp_coefficients(square_from, square_to, product, t, straight=1.0 - 1e-6):
    """Return the factors of the two ends of an arc: sin((1 - t) Omega) and sin(t Omega).

    Both are divided by sin(Omega); Omega is the angle between the two ends.

    Args:
      square_from: squared length of the end at t = 0, [...]
      square_to: squared length of the end at t = 1, [...]
      product: inner product of the two ends, [...]
      t: position on the arc, in [0, 1]
      straight: if |cos(Omega)| is above this, the ends count as collinear and the factors are
        1 - t and t.

    Returns:
      two arrays [...]

    Example:
      >>> one = np.array(1.0)
      >>> [round(float(x), 4) for x in slerp_coefficients(one, one, 0 * one, 0.5)]
      [0.7071, 0.7071]
    """
    xp = geometry.namespace(product)
    lengths = geometry.positive_sqrt(square_from) * geometry.positive_sqrt(square_to)
    cosine = xp.clip(product / xp.where(lengths > 0, lengths, 1.0), -1.0, 1.0)
    collinear = (xp.abs(cosine) > straight) | (lengths <= 0)
    omega = xp.arccos(xp.where(collinear, 0.0, cosine))
    return (
        xp.where(collinear, 1.0 - t, xp.sin((1.0 - t) * omega) / xp.sin(omega)),
        xp.where(collinear, t, xp.sin(t * omega) / xp.sin(omega)),
    )


def rescale_to_norm(gram, is_scalar, length) -> UnitSolution:
    """Return the coefficient that scales the only task vector to `length`; 0 if it is zero."""
    xp = geometry.namespace(gram)
    norm = geometry.positive_sqrt(geometry.squared_norms(gram))
    factor = xp.where(norm > 0, length[None] / xp.where(norm > 0, norm, 1.0), 0.0)
    return solve_with_coefficients(gram, measure(gram), is_scalar, factor)


def unit_row(
    name: str,
    key: str,
    cosine: np.ndarray,
    ratio: np.ndarray,
    norm: np.ndarray,
    outcome: np.ndarray,
) -> dict[str, Any]:
    """Return the measures of one tensor as a row for tables and JSON.

    Values are plain Python values, None if undefined. If the tensor has several units: means of
    cosine, angle (degrees) and ratio, and root-sum-squares of norms. Means of cosine and angle
    leave out the units whose cosine is undefined.

    Args:
      name: name of the tensor
      key: name of its merge unit
      cosine: [...], the shape of the unit; `geometry.COSINE_UNDEFINED` if undefined
      ratio: [...]
      norm: |d_i|, [N, ...]
      outcome: codes of `UnitOutcome`, [...]

    Example:
      >>> row = unit_row("w", "w", np.array(0.5), np.array(2 / 3), np.ones(2), np.array(0))
      >>> round(row["angle"], 4), row["norms"], row["outcome"]
      (60.0, [1.0, 1.0], 'interpolated')
    """
    defined = cosine[cosine <= 1.0]
    outcomes = collections.Counter(UnitOutcome(int(code)).name.lower() for code in outcome.flat)
    return {
        "name": name,
        "unit": key,
        "num_units": int(outcome.size),
        "cosine": float(defined.mean()) if defined.size else None,
        "angle": float(geometry.angle(defined).mean()) if defined.size else None,
        "ratio": float(ratio.mean()),
        "norms": [float(np.sqrt(np.sum(n**2))) for n in norm],
        "outcome": outcomes.most_common(1)[0][0] if len(outcomes) == 1 else "mixed",
        "outcomes": dict(outcomes),
    }
