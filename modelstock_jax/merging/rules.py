"""Rules that turn a unit's Gram matrix into coefficients; NumPy or JAX arrays, in and out.

A rule takes the Gram matrix [N, N, ...] and `single` [...] bool (the unit holds fewer than two
numbers), and whatever else it needs; training, the library and the file merge use these alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from modelstock_jax.merging import geometry
from modelstock_jax.merging.anchor_rounding import correct_gram
from modelstock_jax.merging.policy import Policy
from modelstock_jax.merging.solution import Solution, measure, solve_given, solve_measured


def equation_3(gram, single) -> Solution:
    """Equal coefficients t / N over the replicas that moved."""
    xp = geometry.namespace(gram)
    seen = measure(gram)
    number = xp.maximum(seen.number, 1.0)
    ratio = geometry.ratio(xp.where(seen.number > 1, seen.cosine, 0.0), number)
    coefficient = xp.where(seen.active, (ratio / number)[None], 0.0)
    policy = xp.where(seen.cosine <= 0, np.int8(Policy.CLIPPED), seen.policy)
    return solve_measured(gram, seen, single, coefficient, policy)


def unequal_noise(gram, single) -> Solution:
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
    policy = xp.where(signal, seen.policy, np.int8(Policy.CLIPPED))
    policy = xp.where(fallback, np.int8(Policy.WEIGHTED_FALLBACK), policy)
    return solve_measured(gram, seen, single, coefficient, policy)


@functools.cache
def without_rounding(rule: Callable[..., Solution]) -> Callable[..., Solution]:
    """The same rule on a Gram matrix without the rounding error of the anchor.

    It takes two arrays more: E of the unit, [...], and whether training started from the rounded
    anchor, [] bool, in which case nothing is subtracted.
    """
    def solve(gram, single, energy, started):
        xp = geometry.namespace(gram)
        return rule(xp.where(started, gram, correct_gram(gram, energy)), single)

    return solve


def equal_shares(gram, single, ratio) -> Solution:
    """Coefficients ratio / N for every replica, whatever its angles."""
    xp = geometry.namespace(gram)
    share = xp.full_like(gram[0], 1.0 / len(gram)) * ratio.astype(gram.dtype)
    return solve_given(gram, measure(gram), single, share)


def given_shares(gram, single, shares) -> Solution:
    """Coefficients that were given, shares [N], whatever the angles."""
    xp = geometry.namespace(gram)
    shares = xp.asarray(shares, gram.dtype).reshape((-1,) + (1,) * (gram.ndim - 2))
    return solve_given(gram, measure(gram), single, xp.broadcast_to(shares, gram.shape[1:]))


def elected(gram, single, scale) -> Solution:
    """The mean task vector times a scale, of which only some numbers will be taken (TIES)."""
    xp = geometry.namespace(gram)
    solution = equal_shares(gram, single, scale)
    unknown = xp.full_like(solution.ratio, geometry.DISTANCE_UNDEFINED)
    return solution._replace(distance=solution.distance._replace(merged=unknown))


def spherical(gram, single, shares) -> Solution:
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


def at_length(gram, single, length) -> Solution:
    """The first task vector, brought to a given length; 0 where it has none."""
    xp = geometry.namespace(gram)
    own = geometry.root(geometry.squared_norms(gram))
    factor = xp.where(own > 0, length[None] / xp.where(own > 0, own, 1.0), 0.0)
    return solve_given(gram, measure(gram), single, factor)
