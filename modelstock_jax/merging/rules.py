"""Rules that turn a unit's Gram matrix into coefficients; NumPy or JAX arrays, in and out.

A rule takes the Gram matrix [N, N, ...] and `single` [...] bool (the unit holds fewer than two
numbers), and whatever else it needs; training, the library and the file merge use these alone.
"""

from __future__ import annotations

import numpy as np

from modelstock_jax.merging import geometry
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
