"""What is done with a merge unit: rules from its Gram matrix to coefficients, and what they report.

A rule takes the Gram matrix [N, N, ...] and `single` [...] bool (the unit holds fewer than two
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
    """What was done with a merge unit; `stats.policy` holds these codes as int8."""

    INTERPOLATED = 0  # w0 + t mean(d), the rule itself
    GIVEN = 1  # the ratio was given, not measured
    CLIPPED = 2  # cos <= 0 (carried: noise above the movement): no common signal, the anchor
    UNDEFINED = 3  # no replica moved: the anchor, bit for bit
    ONE_REPLICA_LEFT = 4  # one replica moved: its weights, bit for bit
    REPLICAS_LEFT_OUT = 5  # some did not move; the rule over the others
    TOO_SMALL = 6  # a unit of fewer than two numbers has no angle: the mean
    WEIGHTED_FALLBACK = 7  # a replica's noise came out negative: equation 3 in its place
    KEPT = 8  # integers, booleans and empty tensors: the anchor's
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
    active = geometry.moved(gram)
    number = active.astype(gram.dtype).sum(axis=0)
    squares = xp.where(active, geometry.squared_norms(gram), 0.0)
    return GramStats(
        active=active,
        number=number,
        cosine=geometry.cosine(gram),
        square=squares.sum(axis=0) / xp.maximum(number, 1.0),
        signal=geometry.mean_pairs(gram, active),
        outcome=xp.where(active.all(axis=0), np.int8(UnitOutcome.INTERPOLATED),
                        np.int8(UnitOutcome.REPLICAS_LEFT_OUT)),
    )


def solve_measured(gram, seen: GramStats, single, coefficient, policy) -> UnitSolution:
    """A solution from measured coefficients [N, ...], with the rules for degenerate units.

    `single` [...] bool: the unit holds fewer than two numbers and has no angle.
    """
    xp = geometry.namespace(gram)
    one = seen.number == 1
    mean = xp.where(seen.active, (1.0 / xp.maximum(seen.number, 1.0))[None], 0.0)
    coefficient = xp.where(single[None], mean, coefficient)
    policy = xp.where(single, np.int8(UnitOutcome.TOO_SMALL), policy)
    exact = seen.active & one[None]
    coefficient = xp.where(exact, 1.0, coefficient)
    policy = xp.where(one, np.int8(UnitOutcome.ONE_REPLICA_LEFT), policy)
    policy = xp.where(seen.number == 0, np.int8(UnitOutcome.UNDEFINED), policy)
    hold = (coefficient == 0).all(axis=0)
    return _solution(gram, seen, single, coefficient, exact, hold, policy, given=False)


def solve_given(gram, seen: GramStats, single, coefficient) -> UnitSolution:
    """A solution from coefficients [N, ...] that were given; the measures are for the report."""
    xp = geometry.namespace(gram)
    nothing = xp.zeros_like(seen.active)
    still = seen.number == 0  # the anchor bit for bit: -0.0 + 0.0 is another zero
    policy = xp.full_like(seen.outcome, UnitOutcome.GIVEN)
    return _solution(gram, seen, single, coefficient, nothing, still, policy, given=True)


def _solution(gram, seen, single, coefficient, exact, hold, policy, *, given) -> UnitSolution:
    xp = geometry.namespace(gram)
    cosine = xp.where(single, geometry.COSINE_UNDEFINED, seen.cosine)
    # Without an angle the noise is still l^2 - |mu|^2.
    safe = xp.where(seen.square > 0, seen.square, 1.0)
    similarity = xp.where(cosine > 1.0, seen.signal / safe, cosine)
    ratio = coefficient.sum(axis=0)
    distance = geometry.predicted_distances(
        seen.square, seen.signal, similarity, xp.maximum(seen.number, 1.0), ratio,
        given=given | single, squared_shares=(coefficient**2).sum(axis=0),
    )
    distance = geometry.Distances(
        *(xp.where(seen.number == 1, geometry.DISTANCE_UNDEFINED, d) for d in distance)
    )
    norm = geometry.root(geometry.squared_norms(gram))
    return UnitSolution(coefficient, exact, hold, cosine, ratio, norm, distance, policy)


def equation_3(gram, single) -> UnitSolution:
    """Equal coefficients t / N over the replicas that moved."""
    xp = geometry.namespace(gram)
    seen = measure(gram)
    number = xp.maximum(seen.number, 1.0)
    ratio = geometry.ratio(xp.where(seen.number > 1, seen.cosine, 0.0), number)
    coefficient = xp.where(seen.active, (ratio / number)[None], 0.0)
    policy = xp.where(seen.cosine <= 0, np.int8(UnitOutcome.CLIPPED), seen.outcome)
    return solve_measured(gram, seen, single, coefficient, policy)


def unequal_noise(gram, single) -> UnitSolution:
    """Coefficients by each replica's own noise; the formula is `weighted_model_stock`'s."""
    xp = geometry.namespace(gram)
    seen, plain = measure(gram), equation_3(gram, single)
    squares = geometry.squared_norms(gram)
    noise = squares - seen.signal[None]
    clear = noise > 4.0 * np.finfo(np.float32).eps * squares
    signal = seen.signal > 0
    fallback = signal & ~(clear | ~seen.active).all(axis=0)
    # signal / noise of each: the formula times |mu|^2 above and below.
    used = seen.active & (signal & ~fallback)[None]
    weight = xp.where(used, seen.signal[None] / xp.where(used, noise, 1.0), 0.0)
    coefficient = weight / (1.0 + weight.sum(axis=0))[None]
    coefficient = xp.where(fallback[None], plain.coefficient, coefficient)
    policy = xp.where(signal, seen.outcome, np.int8(UnitOutcome.CLIPPED))
    policy = xp.where(fallback, np.int8(UnitOutcome.WEIGHTED_FALLBACK), policy)
    return solve_measured(gram, seen, single, coefficient, policy)


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


def equal_shares(gram, single, ratio) -> UnitSolution:
    """Coefficients ratio / N for every replica, whatever its angles."""
    xp = geometry.namespace(gram)
    share = xp.full_like(gram[0], 1.0 / len(gram)) * ratio.astype(gram.dtype)
    return solve_given(gram, measure(gram), single, share)


def given_shares(gram, single, shares) -> UnitSolution:
    """Coefficients that were given, shares [N], whatever the angles."""
    xp = geometry.namespace(gram)
    shares = xp.asarray(shares, gram.dtype).reshape((-1,) + (1,) * (gram.ndim - 2))
    return solve_given(gram, measure(gram), single, xp.broadcast_to(shares, gram.shape[1:]))


def elected(gram, single, scale) -> UnitSolution:
    """The mean task vector times a scale, of which only some numbers will be taken (TIES)."""
    xp = geometry.namespace(gram)
    solution = equal_shares(gram, single, scale)
    unknown = xp.full_like(solution.ratio, geometry.DISTANCE_UNDEFINED)
    return solution._replace(distance=solution.distance._replace(merged=unknown))


def spherical(gram, single, shares) -> UnitSolution:
    """Coefficients of the task vectors merged along arcs, the m-th by shares[m - 2]."""
    xp = geometry.namespace(gram)
    squares = geometry.squared_norms(gram)
    total = [xp.ones_like(squares[0])] + [xp.zeros_like(squares[0])] * (len(gram) - 1)
    for m in range(1, len(gram)):
        along = sum(total[i] * gram[i, m] for i in range(m))
        square = sum(total[i] * total[j] * gram[i, j] for i in range(m) for j in range(m))
        kept, new = arc_shares(square, squares[m], along, shares[m - 1])
        total = [kept * c for c in total]
        total[m] = new
    return solve_given(gram, measure(gram), single, xp.stack(total))


def arc_shares(square_from, square_to, product, t, straight=1.0 - 1e-6):
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
      >>> [round(float(x), 4) for x in arc_shares(one, one, 0 * one, 0.5)]
      [0.7071, 0.7071]
    """
    xp = geometry.namespace(product)
    lengths = geometry.root(square_from) * geometry.root(square_to)
    cosine = xp.clip(product / xp.where(lengths > 0, lengths, 1.0), -1.0, 1.0)
    line = (xp.abs(cosine) > straight) | (lengths <= 0)
    omega = xp.arccos(xp.where(line, 0.0, cosine))
    return (xp.where(line, 1.0 - t, xp.sin((1.0 - t) * omega) / xp.sin(omega)),
            xp.where(line, t, xp.sin(t * omega) / xp.sin(omega)))


def at_length(gram, single, length) -> UnitSolution:
    """The first task vector, brought to a given length; 0 where it has none."""
    xp = geometry.namespace(gram)
    own = geometry.root(geometry.squared_norms(gram))
    factor = xp.where(own > 0, length[None] / xp.where(own > 0, own, 1.0), 0.0)
    return solve_given(gram, measure(gram), single, factor)


# Measures of a merge unit, as a row for tables and JSON.


def unit_row(
    name: str,
    key: str,
    cosine: np.ndarray,
    ratio: np.ndarray,
    norm: np.ndarray,
    policy: np.ndarray,
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
      policy: [...], codes of `Policy`.

    Example:
      >>> row = unit_row("w", "w", np.array(0.5), np.array(2 / 3), np.ones(2), np.array(0))
      >>> round(row["angle"], 4), row["norms"], row["policy"]
      (60.0, [1.0, 1.0], 'interpolated')
    """
    defined = cosine[cosine <= 1.0]
    policies = collections.Counter(UnitOutcome(int(code)).name.lower() for code in policy.flat)
    return {
        "name": name,
        "unit": key,
        "num_units": int(policy.size),
        "cosine": float(defined.mean()) if defined.size else None,
        "angle": float(geometry.angle(defined).mean()) if defined.size else None,
        "ratio": float(ratio.mean()),
        "norms": [float(np.sqrt(np.sum(n**2))) for n in norm],
        "policy": policies.most_common(1)[0][0] if len(policies) == 1 else "mixed",
        "policies": dict(policies),
    }
