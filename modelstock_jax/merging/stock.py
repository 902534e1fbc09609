"""Model Stock (section 3 of the paper), and two extensions of it.

One is to replicas of unequal noise, the other to a series of merges that carries noise along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from modelstock_jax.merging.engine import Stats, merge, unit_zeros
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.merging.rules import (
    UnitOutcome,
    UnitSolution,
    equation_3,
    measure,
    noise_weights,
    solve_measured,
)


def model_stock(
    pretrained: PyTree,
    finetuned: PyTree,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
    anchor_rounding: str = "keep",
) -> tuple[PyTree, Stats]:
    """Merge fine-tuned replicas with their anchor at the ratio that their angles give.

    Per merge unit, with task vectors d_i = w_i - w0 and cos their mean pairwise cosine:

        t   = N cos / (1 + (N - 1) cos)          equation 3; N = 2 gives equation 2
        w_H = t mean_i(w_i) + (1 - t) w0

    Rules for what the paper leaves open; `stats.outcome` says where each was met:

    - cos <= 0: t = 0, the anchor.
    - No replica moved: the anchor, bit for bit; the cosine is undefined (`COSINE_UNDEFINED`).
    - A replica that did not move while others did leaves the unit; where one is left, the result
      is its weights, bit for bit. To have moved is to have a squared norm that float32 can hold
      (rms of a delta above about 1e-19).
    - A unit of fewer than two numbers (a scalar) takes the mean; its cosine is undefined.
    - Integers and booleans keep the anchor's values; empty tensors stay empty; None stays None.
    - Any floating dtype from float8 to float64 (the latter needs `jax_enable_x64`; without it JAX
      makes it float32), mixed as you like: all arithmetic is in float64, whatever the setting.
      Statistics are float32 (float64 for float64 weights). The result is rounded once, to the
      anchor's dtype or to `dtype`, saturating at the largest number of a dtype of smaller range.
    - A non-finite weight is an error. In a traced call (jit, grad, vmap) it cannot be raised: its
      unit keeps the anchor's weights, and `check_finite(stats)` raises afterwards.

    Args:
      pretrained: w0, any pytree of arrays.
      finetuned: the same tree with a leading replica axis N >= 2 on every array.
      unit: which numbers share one angle: tensor, layer, filter, head, block or global
        (`units.assign`). Static under jit.
      num_heads: attention heads, for `unit="head"`: a number, or a mapping from the beginning of
        a name to a number.
      filter_axis: the output axis of kernels: -1 (JAX) or 0 (PyTorch).
      dtype: of the merged floating tensors.
      anchor_rounding: "keep" (default), or "correct" for an anchor that was rounded to a coarser
        dtype after the replicas were trained from its original (say a bfloat16 base of float32
        fine-tunes). The expected energy of the rounding error, sum of (half ulp)^2 / 3, is then
        subtracted from every entry of the Gram matrix, so that t and the statistics are about
        those of the original anchor. Tensors whose anchor is not coarser than the replicas are
        unchanged. If training started from the rounded anchor, nothing may be subtracted: the
        call raises an error, and under jit or vmap, which cannot raise, "keep" applies
        (`anchor_rounding.started_from_rounded`). Static under jit.

    Returns:
      The merged tree, and `Stats`.

    Raises:
      UserError: fewer than two replicas, trees or shapes that differ, dtypes that cannot merge;
        `anchor_rounding="correct"` where training started from the rounded anchor.
      NonFiniteError: NaN or infinity, naming replica and tensor.

    Example:
      >>> import jax.numpy as jnp
      >>> w0 = {"kernel": jnp.zeros(2)}
      >>> w = {"kernel": jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])}  # 60 degrees apart
      >>> merged, stats = model_stock(w0, w)
      >>> round(float(stats.ratio["kernel"]), 3), [round(float(x), 3) for x in merged["kernel"]]
      (0.667, [0.5, 0.289])
    """
    merged, stats, _ = merge(
        equation_3,
        pretrained,
        finetuned,
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        dtype=dtype,
        anchor_rounding=anchor_rounding,
    )
    return merged, stats


def weighted_model_stock(
    pretrained: PyTree,
    finetuned: PyTree,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
    anchor_rounding: str = "keep",
) -> tuple[PyTree, Stats]:
    """Model Stock for replicas of unequal noise: an extension of this project, not the paper's.

    With |mu|^2 = mean_{i<j} d_i . d_j and s_i^2 = |d_i|^2 - |mu|^2, the noise of replica i:

        w = w0 + sum_i a_i d_i,    a_i = (1 / s_i^2) / (1 / |mu|^2 + sum_j 1 / s_j^2)

    Replicas of equal noise give equation 3. All are taken for one signal: of replicas that have
    moved unequally far, by their learning rates say, the shorter one's s_i^2 mostly comes out below
    0. Where an s_i^2 is not above rounding, equation 3 is used; `outcome_counts(stats)` counts those
    units as "fallback_to_eq3". Where |mu|^2 <= 0 the result is the anchor. All else as
    `model_stock`; `stats.ratio` is the sum of the a_i.

    Args:
      pretrained: as `model_stock`.
      finetuned: as `model_stock`.
      unit: as `model_stock`.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.
      dtype: as `model_stock`.
      anchor_rounding: as `model_stock`. It changes |mu|^2; the noises s_i^2 are the same.

    Returns:
      The merged tree, and `Stats`.

    Raises:
      UserError: as `model_stock`.

    Example:
      >>> import jax.numpy as jnp
      >>> w0 = {"w": jnp.zeros(3)}
      >>> w = {"w": jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 3.0]])}  # the second is noisier
      >>> [round(float(x), 3) for x in weighted_model_stock(w0, w)[0]["w"]]
      [0.526, 0.474, 0.158]
    """
    merged, stats, _ = merge(
        noise_weights,
        pretrained,
        finetuned,
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        dtype=dtype,
        anchor_rounding=anchor_rounding,
    )
    return merged, stats


# Periodic merging that remembers noise: an extension of this project, not the paper's.


def init_noise(
    pretrained: PyTree,
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
      >>> {name: s.shape for name, s in init_noise({"w": jnp.ones((3, 2))}, "filter").items()}
      {'w': (2,)}
    """
    return unit_zeros(pretrained, unit, num_heads=num_heads, filter_axis=filter_axis)


def model_stock_carried(
    pretrained: PyTree,
    finetuned: PyTree,
    noise: PyTree = None,
    unit: str = "tensor",
    *,
    shrink: Any = True,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[PyTree, Stats, PyTree]:
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
      noise: S of the last merge, or None (`init_noise(pretrained, unit)`) at the first.
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
        noise = init_noise(pretrained, unit, num_heads=num_heads, filter_axis=filter_axis)
    return merge(
        shrink_by_carried_noise,
        pretrained,
        finetuned,
        noise,
        shared=(jnp.asarray(shrink, bool),),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        dtype=dtype,
    )


def shrink_by_carried_noise(gram, is_scalar, noise, shrink) -> UnitSolution:
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
    outcome = jnp.where(ratio > 0, seen.outcome, jnp.int8(UnitOutcome.CLAMPED))
    solved = solve_measured(gram, seen, is_scalar, coefficient, outcome)
    # One replica says nothing about noise.
    added = jnp.where(seen.number > 1, added, 0.0)
    return solved._replace(carry=solved.ratio**2 * (noise + added))
