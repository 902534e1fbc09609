"""What is done with a merge unit: rules from its Gram matrix to coefficients, and what they report.

A rule takes the Gram matrix [N, N, ...] and `is_scalar` [...] bool (the unit holds fewer than two
numbers), and whatever else it needs; training, the library and the file merge use these alone.
NumPy or JAX arrays, in and out.
"""

from __future__ import annotations

import collections
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry
from modelstock_jax.merging.anchor_rounding import correct_gram

# What was done with a merge unit, and what is refused; the same words in every door.


class UnitOutcome(enum.IntEnum):
    """What was done with a merge unit; `stats.outcome` holds these codes as int8."""

    INTERPOLATED = 0  # w0 + t mean(d), the rule itself
    FIXED_RATIO = 1  # the ratio was given, not measured
    CLAMPED = 2  # cos <= 0 (carried: noise above the movement): no common signal, the anchor
    UNCHANGED = 3  # no replica moved: the anchor, bit for bit
    ONE_MODEL_CHANGED = 4  # one replica moved: its weights, bit for bit
    UNCHANGED_MODELS_LEFT_OUT = 5  # some did not move; the rule over the others
    SCALAR = 6  # a unit of fewer than two numbers has no angle: the mean
    FALLBACK_TO_EQ3 = 7  # a replica's noise came out negative: equation 3 in its place
    COPIED = 8  # integers, booleans and empty tensors: the anchor's
    NON_FINITE = 9  # NaN or infinity in a replica: the anchor, and `stats.finite` says which


class NonFiniteError(UserError):
    """NaN or infinity in the weights; `tensor` is its name, `replica` its index or 'pretrained'."""

    def __init__(self, message: str, replica: int | str, tensor: str):
        """Keep what a program may want to look at beside the message."""
        super().__init__(message)
        self.replica = replica
        self.tensor = tensor


# A method's answer for one merge unit, and the rules that all methods share.


class UnitSolution(NamedTuple):
    """Coefficients and measures; arrays of the unit's shape, with axis N in front where noted."""

    coefficient: Any  # [N, ...], a_i
    copy_replica: Any  # [N, ...] bool: take this replica's weights bit for bit
    keep_anchor: Any  # bool: take the anchor's bit for bit
    cosine: Any
    ratio: Any
    norm: Any  # [N, ...]
    distance: geometry.Distances
    outcome: Any  # int8
    carry: Any = None  # handed on to the next merge


class GramStats(NamedTuple):
    """What a Gram matrix says about a unit, before any method."""

    active: Any  # [N, ...] bool: which replicas moved
    number: Any  # how many did, in the Gram matrix's dtype
    cosine: Any
    square: Any  # l^2, the mean squared norm of those
    signal: Any  # |mu|^2, the mean product of two of those
    outcome: Any  # int8: the rule itself, or some left out


def measure(gram) -> GramStats:
    """Read a Gram matrix [N, N, ...]."""
    xp = geometry.namespace(gram)
    active = geometry.is_moved(gram)
    number = active.astype(gram.dtype).sum(axis=0)
    squares = xp.where(active, geometry.squared_norms(gram), 0.0)
    return GramStats(
        active=active,
        number=number,
        cosine=geometry.cosine(gram),
        square=squares.sum(axis=0) / xp.maximum(number, 1.0),
        signal=geometry.mean_pairs(gram, active),
        outcome=xp.where(
            active.all(axis=0),
            np.int8(UnitOutcome.INTERPOLATED),
            np.int8(UnitOutcome.UNCHANGED_MODELS_LEFT_OUT),
        ),
    )


def solve_measured(gram, stats: GramStats, is_scalar, coefficient, outcome) -> UnitSolution:
    """A solution from measured coefficients [N, ...], with the rules for degenerate units.

    `is_scalar` [...] bool: the unit holds fewer than two numbers and has no angle.
    """
    xp = geometry.namespace(gram)
    one = stats.number == 1
    mean = xp.where(stats.active, (1.0 / xp.maximum(stats.number, 1.0))[None], 0.0)
    coefficient = xp.where(is_scalar[None], mean, coefficient)
    outcome = xp.where(is_scalar, np.int8(UnitOutcome.SCALAR), outcome)
    copy_replica = stats.active & one[None]
    coefficient = xp.where(copy_replica, 1.0, coefficient)
    outcome = xp.where(one, np.int8(UnitOutcome.ONE_MODEL_CHANGED), outcome)
    outcome = xp.where(stats.number == 0, np.int8(UnitOutcome.UNCHANGED), outcome)
    keep_anchor = (coefficient == 0).all(axis=0)
    return _solution(
        gram, stats, is_scalar, coefficient, copy_replica, keep_anchor, outcome, fixed_ratio=False
    )


def solve_with_coefficients(gram, stats: GramStats, is_scalar, coefficient) -> UnitSolution:
    """A solution from coefficients [N, ...] that were given; the measures are for the report."""
    xp = geometry.namespace(gram)
    nothing = xp.zeros_like(stats.active)
    still = stats.number == 0  # the anchor bit for bit: -0.0 + 0.0 is another zero
    outcome = xp.full_like(stats.outcome, UnitOutcome.FIXED_RATIO)
    return _solution(gram, stats, is_scalar, coefficient, nothing, still, outcome, fixed_ratio=True)


def _solution(
    gram, stats, is_scalar, coefficient, copy_replica, keep_anchor, outcome, *, fixed_ratio
) -> UnitSolution:
    xp = geometry.namespace(gram)
    cosine = xp.where(is_scalar, geometry.COSINE_UNDEFINED, stats.cosine)
    # Without an angle the noise is still l^2 - |mu|^2.
    safe = xp.where(stats.square > 0, stats.square, 1.0)
    similarity = xp.where(cosine > 1.0, stats.signal / safe, cosine)
    ratio = coefficient.sum(axis=0)
    distance = geometry.predicted_distances(
        stats.square,
        stats.signal,
        similarity,
        xp.maximum(stats.number, 1.0),
        ratio,
        fixed_ratio=fixed_ratio | is_scalar,
        squared_coefficients=(coefficient**2).sum(axis=0),
    )
    distance = geometry.Distances(
        *(xp.where(stats.number == 1, geometry.DISTANCE_UNDEFINED, d) for d in distance)
    )
    norm = geometry.positive_sqrt(geometry.squared_norms(gram))
    return UnitSolution(
        coefficient, copy_replica, keep_anchor, cosine, ratio, norm, distance, outcome
    )


def equation_3(gram, is_scalar) -> UnitSolution:
    """Equal coefficients t / N over the replicas that moved."""
    xp = geometry.namespace(gram)
    stats = measure(gram)
    number = xp.maximum(stats.number, 1.0)
    ratio = geometry.ratio(xp.where(stats.number > 1, stats.cosine, 0.0), number)
    coefficient = xp.where(stats.active, (ratio / number)[None], 0.0)
    outcome = xp.where(stats.cosine <= 0, np.int8(UnitOutcome.CLAMPED), stats.outcome)
    return solve_measured(gram, stats, is_scalar, coefficient, outcome)


def noise_weights(gram, is_scalar) -> UnitSolution:
    """Coefficients by each replica's own noise; the formula is `weighted_model_stock`'s."""
    xp = geometry.namespace(gram)
    stats, plain = measure(gram), equation_3(gram, is_scalar)
    squares = geometry.squared_norms(gram)
    noise = squares - stats.signal[None]
    clear = noise > 4.0 * np.finfo(np.float32).eps * squares
    signal = stats.signal > 0
    fallback = signal & ~(clear | ~stats.active).all(axis=0)
    # signal / noise of each: the formula times |mu|^2 above and below.
    used = stats.active & (signal & ~fallback)[None]
    weight = xp.where(used, stats.signal[None] / xp.where(used, noise, 1.0), 0.0)
    coefficient = weight / (1.0 + weight.sum(axis=0))[None]
    coefficient = xp.where(fallback[None], plain.coefficient, coefficient)
    outcome = xp.where(signal, stats.outcome, np.int8(UnitOutcome.CLAMPED))
    outcome = xp.where(fallback, np.int8(UnitOutcome.FALLBACK_TO_EQ3), outcome)
    return solve_measured(gram, stats, is_scalar, coefficient, outcome)


@functools.cache
def without_rounding(rule: Callable[..., UnitSolution]) -> Callable[..., UnitSolution]:
    """The same rule on a Gram matrix without the rounding error of the anchor.

    It takes two arrays more: E of the unit, [...], and whether training started from the rounded
    anchor, [] bool, in which case nothing is subtracted.
    """

    def solve(gram, single, energy, started):
        xp = geometry.namespace(gram)
        return rule(xp.where(started, gram, correct_gram(gram, energy)), single)

    return solve


def fixed_ratio(gram, is_scalar, ratio) -> UnitSolution:
    """Coefficients ratio / N for every replica, whatever its angles."""
    xp = geometry.namespace(gram)
    share = xp.full_like(gram[0], 1.0 / len(gram)) * ratio.astype(gram.dtype)
    return solve_with_coefficients(gram, measure(gram), is_scalar, share)


def fixed_coefficients(gram, is_scalar, coefficients) -> UnitSolution:
    """Coefficients that were given, shares [N], whatever the angles."""
    xp = geometry.namespace(gram)
    shares = xp.asarray(coefficients, gram.dtype).reshape((-1,) + (1,) * (gram.ndim - 2))
    return solve_with_coefficients(
        gram, measure(gram), is_scalar, xp.broadcast_to(shares, gram.shape[1:])
    )


def elected(gram, is_scalar, scale) -> UnitSolution:
    """The mean task vector times a scale, of which only some numbers will be taken (TIES)."""
    xp = geometry.namespace(gram)
    solution = fixed_ratio(gram, is_scalar, scale)
    unknown = xp.full_like(solution.ratio, geometry.DISTANCE_UNDEFINED)
    return solution._replace(distance=solution.distance._replace(merged=unknown))


def spherical(gram, is_scalar, ratios) -> UnitSolution:
    """Coefficients of the task vectors merged along arcs, the m-th by shares[m - 2]."""
    xp = geometry.namespace(gram)
    squares = geometry.squared_norms(gram)
    total = [xp.ones_like(squares[0])] + [xp.zeros_like(squares[0])] * (len(gram) - 1)
    for m in range(1, len(gram)):
        along = sum(total[i] * gram[i, m] for i in range(m))
        square = sum(total[i] * total[j] * gram[i, j] for i in range(m) for j in range(m))
        kept, new = slerp_coefficients(square, squares[m], along, ratios[m - 1])
        total = [kept * c for c in total]
        total[m] = new
    return solve_with_coefficients(gram, measure(gram), is_scalar, xp.stack(total))


def slerp_coefficients(square_from, square_to, product, t, straight=1.0 - 1e-6):
    """Factors of the two ends of an arc, sin((1 - t) Omega) / sin(Omega) and sin(t Omega) / ...

    Args:
      square_from: squared length of the end at t = 0, [...].
      square_to: of the end at t = 1, [...].
      product: their inner product, [...].
      t: in [0, 1].
      straight: cosines beyond this, of either sign, count as one line: 1 - t and t.

    Returns:
      Two arrays [...].

    Example:
      >>> one = np.array(1.0)
      >>> [round(float(x), 4) for x in slerp_coefficients(one, one, 0 * one, 0.5)]
      [0.7071, 0.7071]
    """
    xp = geometry.namespace(product)
    lengths = geometry.positive_sqrt(square_from) * geometry.positive_sqrt(square_to)
    cosine = xp.clip(product / xp.where(lengths > 0, lengths, 1.0), -1.0, 1.0)
    line = (xp.abs(cosine) > straight) | (lengths <= 0)
    omega = xp.arccos(xp.where(line, 0.0, cosine))
    return (
        xp.where(line, 1.0 - t, xp.sin((1.0 - t) * omega) / xp.sin(omega)),
        xp.where(line, t, xp.sin(t * omega) / xp.sin(omega)),
    )


def rescale_to_norm(gram, is_scalar, length) -> UnitSolution:
    """The first task vector, brought to a given length; 0 where it has none."""
    xp = geometry.namespace(gram)
    own = geometry.positive_sqrt(geometry.squared_norms(gram))
    factor = xp.where(own > 0, length[None] / xp.where(own > 0, own, 1.0), 0.0)
    return solve_with_coefficients(gram, measure(gram), is_scalar, factor)


# Measures of a merge unit, as a row for tables and JSON.


def unit_row(
    name: str,
    key: str,
    cosine: np.ndarray,
    ratio: np.ndarray,
    norm: np.ndarray,
    outcome: np.ndarray,
) -> dict[str, Any]:
    """One tensor's row: plain Python values, None where undefined.

    Where the tensor lies in many units: means of cosine, angle (degrees) and ratio, and
    root-sum-squares of norms.

    Args:
      name: of the tensor.
      key: of the unit that it lies in.
      cosine: [...] of the units' shape, `geometry.COSINE_UNDEFINED` where there is none.
      ratio: [...].
      norm: [N, ...], |d_i|.
      outcome: [...], codes of `UnitOutcome`.

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
