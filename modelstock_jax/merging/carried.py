"""Periodic merging that remembers noise: an extension of this project, not the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from modelstock_jax.merging.engine import merge, unit_zeros
from modelstock_jax.merging.policy import Policy
from modelstock_jax.merging.solution import Solution, measure, solve_measured
from modelstock_jax.merging.stats import Stats


def zero_noise(
    pretrained: Any,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
) -> Any:
    """The noise energy before the first merge of a series: S = 0 in every unit.

    Args:
      pretrained: w0; its names and shapes suffice (`jax.ShapeDtypeStruct` will do).
      unit: as `model_stock`.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.

    Returns:
      A tree of zeros of the units' shapes, as `model_stock_carried` takes and gives it.

    Raises:
      UserError: as `model_stock`, of the unit.

    Example:
      >>> {name: s.shape for name, s in zero_noise({"w": jnp.ones((3, 2))}, "filter").items()}
      {'w': (2,)}
    """
    return unit_zeros(pretrained, unit, num_heads=num_heads, filter_axis=filter_axis)


def model_stock_carried(
    pretrained: Any,
    finetuned: Any,
    noise: Any = None,
    unit: str = "tensor",
    *,
    shrink: Any = True,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[Any, Stats, Any]:
    """One of a series of merges, with the noise of the earlier ones carried along.

    After a merge replaces every replica, the next angle shows the noise of one period only: the
    replicas share the rest. The noise energy S that is in the merged weights is kept per unit:

        s  = (mean_i |d_i|^2 - mean_{i<j} d_i . d_j) / N     what this period adds to the mean
        t  = 1 - (S + s) / |mean_i d_i|^2                    clipped to [0, 1]
        w  = w0 + t mean_i(d_i),   S <- t^2 (S + s)

    With S = 0, at the first merge, t is equation 3 with cos = mean G_ij / mean G_ii. Only
    differences between replicas enter s, so the last merged weights are not needed, but all
    replicas must have begun the period from them.

    Ours and not proved: it ends nearer to the anchor; at equal accuracy in distribution it was a
    little worse than Model Stock from one anchor and better from another (docs/method.md).

    Args:
      pretrained: w0, fixed over the series; as `model_stock`.
      finetuned: as `model_stock`.
      noise: S of the last merge, or None (`zero_noise(pretrained, unit)`) at the first.
      unit: as `model_stock`.
      shrink: whether to shrink at this merge. False takes the mean, t = 1, and lets the noise add
        up: for series that shrink at the last merge only. A bool, or a traced one.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.
      dtype: as `model_stock`.

    Returns:
      The merged tree, `Stats`, and S: a tree of the units' shapes, squared units of the weights.
      The predicted distances are those of this period's angle alone.

    Raises:
      UserError: as `model_stock`.

    Example:
      >>> w0, w = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])}
      >>> merged, stats, noise = model_stock_carried(w0, w)
      >>> round(float(stats.ratio["w"]), 3), round(float(noise["w"]), 3)
      (0.667, 0.111)
    """
    if noise is None:
        noise = zero_noise(pretrained, unit, num_heads=num_heads, filter_axis=filter_axis)
    return merge(
        shrink_by_carried_noise, pretrained, finetuned, noise,
        shared=(jnp.asarray(shrink, bool),),
        unit=unit, num_heads=num_heads, filter_axis=filter_axis, dtype=dtype,
    )


def shrink_by_carried_noise(gram, single, noise, shrink) -> Solution:
    """Equal coefficients t / N with t from all the noise so far."""
    seen = measure(gram)
    noise = noise.astype(gram.dtype)
    number = jnp.maximum(seen.number, 1.0)
    added = jnp.maximum(seen.square - seen.signal, 0.0) / number
    mean_square = (seen.square + (number - 1.0) * seen.signal) / number
    enough = mean_square > noise + added
    ratio = 1.0 - (noise + added) / jnp.where(enough, mean_square, 1.0)
    ratio = jnp.where(enough, ratio, 0.0)
    ratio = jnp.where(shrink, ratio, jnp.ones_like(ratio))
    coefficient = jnp.where(seen.active, (ratio / number)[None], 0.0)
    policy = jnp.where(ratio > 0, seen.policy, jnp.int8(Policy.CLIPPED))
    solved = solve_measured(gram, seen, single, coefficient, policy)
    # One replica says nothing about noise.
    added = jnp.where(seen.number > 1, added, 0.0)
    return solved._replace(carry=solved.ratio**2 * (noise + added))
