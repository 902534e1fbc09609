"""Merges that measure no ratio, with Model Stock's signature and statistics.

At one given ratio (mean, WiSE-FT), of models of different tasks (task arithmetic, TIES), and along
arcs (slerp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from modelstock_jax.errors import UserError
from modelstock_jax.merging import rules
from modelstock_jax.merging.analysis import distance
from modelstock_jax.merging.engine import Stats, merge
from modelstock_jax.merging.geometry import namespace
from modelstock_jax.merging.gram import (
    PyTree,
    cast,
    compute_dtype,
    in_float64,
    pair_leaves,
    to_unit_shape,
)
from modelstock_jax.merging.stock import model_stock

# Merges at one given ratio.


def uniform_mean(
    pretrained: PyTree,
    finetuned: PyTree,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Mean of the replicas, w = mean_i(w_i): the uniform soup, w_avr of Tables 1 and 7.

    Of replicas that differ in hyper-parameters, data order and starting checkpoint it is WARM
    (Rame et al. 2024, arXiv 2401.12187).

    Args:
      pretrained: as `model_stock`.
      finetuned: as `model_stock`; N = 1 will do.
      unit: of the statistics; the mean does not depend on it.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.
      dtype: as `model_stock`.

    Returns:
      The merged tree, and `Stats` with ratio 1.

    Example:
      >>> merged, _ = uniform_mean({"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [3.0, 4.0]])})
      >>> merged["w"].tolist()
      [2.0, 2.0]
    """
    return _given(pretrained, finetuned, 1.0, unit, num_heads, filter_axis, dtype)


def wise_ft(
    pretrained: PyTree,
    finetuned: PyTree,
    alpha: Any,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """WiSE-FT: w = (1 - alpha) w0 + alpha mean_i(w_i), one alpha for all (Figure 1's curves).

    Wortsman et al. 2022 (arXiv 2109.01903), section 3; WARP's interpolation toward initialization.

    Args:
      pretrained: as `model_stock`.
      finetuned: as `model_stock`; N = 1 is the method as published, more is its curve of the mean.
      alpha: in [0, 1], a number or a traced array of shape [].
      unit: of the statistics; the merge does not depend on it.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.
      dtype: as `model_stock`.

    Returns:
      The merged tree, and `Stats` with ratio alpha.

    Raises:
      UserError: alpha outside [0, 1], or as `model_stock`.

    Example:
      >>> merged, _ = wise_ft({"w": jnp.zeros(2)}, {"w": jnp.array([[4.0, 8.0]])}, 0.25)
      >>> merged["w"].tolist()
      [1.0, 2.0]
    """
    return _given(pretrained, finetuned, alpha, unit, num_heads, filter_axis, dtype)


def constant_ratio(
    pretrained: PyTree,
    finetuned: PyTree,
    ratio: Any = None,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """The mean of the replicas, shrunk toward the anchor by one constant: w0 + t mean_i(d_i).

    The control for what unit-wise ratios are worth: by default the constant at which the result
    lies as far from the anchor as Model Stock's,

        t = |model_stock - w0| / |mean_i(w_i) - w0|,    1 at most

    Args:
      pretrained: as `model_stock`.
      finetuned: as `model_stock`.
      ratio: t in [0, 1]; None for Model Stock's distance.
      unit: of Model Stock's merge, and of the statistics.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.
      dtype: as `model_stock`.

    Returns:
      The merged tree, and `Stats` with that ratio in every unit.

    Raises:
      UserError: as `model_stock`.

    Example:
      >>> w0, w = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])}
      >>> round(float(constant_ratio(w0, w)[1].ratio["w"]), 3)  # one unit: Model Stock itself
      0.667
    """
    how: dict[str, Any] = {"num_heads": num_heads, "filter_axis": filter_axis}
    if ratio is None:
        # Measured before either is rounded to narrower weights.
        how["dtype"] = compute_dtype(*(jnp.result_type(x) for x in jax.tree.leaves(pretrained)))
        stock, _ = model_stock(pretrained, finetuned, unit, **how)
        mean, _ = uniform_mean(pretrained, finetuned, unit, **how)
        far = distance(pretrained, mean)
        ratio = jnp.where(far > 0, distance(pretrained, stock) / jnp.where(far > 0, far, 1.0), 0.0)
        ratio = jnp.clip(ratio, 0.0, 1.0)
    return _given(pretrained, finetuned, ratio, unit, num_heads, filter_axis, dtype)


def _given(pretrained, finetuned, ratio, unit, num_heads, filter_axis, dtype):
    ratio = jnp.asarray(ratio, jnp.result_type(float))
    if not isinstance(ratio, jax.core.Tracer) and not 0.0 <= float(ratio) <= 1.0:
        raise UserError(f"the ratio (alpha) must lie in [0, 1], not {float(ratio):g}")
    merged, stats, _ = merge(
        rules.fixed_ratio,
        pretrained,
        finetuned,
        shared=(ratio,),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        dtype=dtype,
        min_replicas=1,
    )
    return merged, stats


# Merges of models of different tasks: task arithmetic and TIES.


def task_arithmetic(
    pretrained: PyTree,
    finetuned: PyTree,
    scale: Any,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Add scaled task vectors to the anchor (Ilharco et al. 2023, arXiv 2212.04089, section 2).

        w = w0 + scale * sum_i d_i          learning by addition (section 4)
        w = w0 - scale * d                  forgetting by negation (section 3): a negative scale
        w = w0 + d_C + (d_B - d_A)          analogies (section 5): one scale a task vector

    Args:
      pretrained: as `model_stock`.
      finetuned: as `model_stock`; N = 1 will do.
      scale: one number for all task vectors, or one for each, [N]; it may be traced. The paper
        chooses one number on held-out data; 0.3 to 0.5 did well in its section 4.
      unit: of the statistics; the merge does not depend on it.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.
      dtype: as `model_stock`.

    Returns:
      The merged tree, and `Stats` with ratio sum_i scale_i. The predicted distances are those of
      replicas that differ in noise alone: of models of different tasks they say nothing.

    Raises:
      UserError: a scale that is not finite or of another length than N, or as `model_stock`.

    Example:
      >>> w0, w = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [3.0, 4.0]])}
      >>> task_arithmetic(w0, w, 0.5)[0]["w"].tolist()
      [2.0, 2.0]
      >>> task_arithmetic(w0, w, (1.0, -1.0))[0]["w"].tolist()
      [-2.0, -4.0]
    """
    number = _number(finetuned)
    scale = _scale(scale)
    if scale.shape not in ((), (number,)):
        raise UserError(
            f"scale is one number or one a replica, shape ({number},); not {scale.shape}"
        )
    merged, stats, _ = merge(
        rules.fixed_coefficients,
        pretrained,
        finetuned,
        shared=(jnp.broadcast_to(scale, number),),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        dtype=dtype,
        min_replicas=1,
    )
    return merged, stats


def ties(
    pretrained: PyTree,
    finetuned: PyTree,
    density: float | Sequence[float] = 0.2,
    scale: Any = 1.0,
    unit: str = "global",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """TIES-Merging (Yadav et al. 2023, arXiv 2306.01708, algorithm 1): trim, elect, disjoint mean.

        trim     of each d_i the numbers of largest magnitude stay, the rest becomes 0
        elect    gamma = sgn(sum_i d_i), number by number
        merge    w = w0 + scale * mean of those d_i whose sign is gamma

    What the paper leaves open: of numbers as large as the last that is kept, all are kept; at
    least one is; where opposite numbers cancel to exactly 0, the positive sign is elected.

    Args:
      pretrained: as `model_stock`.
      finetuned: as `model_stock`; N = 1 will do.
      density: share of numbers that is kept, in (0, 1], one for all or one a replica. Static
        under jit.
      scale: lambda; it may be traced. The defaults of both are the paper's, for no held-out data.
      unit: which numbers are ranked together when trimming: `global` is the paper's, `tensor`
        what `modelstock merge` and mergekit do.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.
      dtype: as `model_stock`.

    Returns:
      The merged tree, and `Stats` of the task vectors before trimming, with ratio `scale` and no
      predicted distance for the merged weights.

    Raises:
      UserError: a density outside (0, 1], or as `task_arithmetic`.

    Example:
      >>> w0 = {"w": jnp.zeros(4)}
      >>> w = {"w": jnp.array([[4.0, -3.0, 1.0, 0.0], [2.0, 5.0, 0.0, 1.0]])}
      >>> ties(w0, w, density=0.5)[0]["w"].tolist()  # 1s are trimmed; -3 loses against 5
      [3.0, 5.0, 0.0, 0.0]
    """
    number, scale = _number(finetuned), _scale(scale)
    if scale.shape:
        raise UserError(f"TIES takes one scale, not an array of shape {scale.shape}")
    share = np.asarray(density, np.float64)
    if share.shape not in ((), (number,)) or not ((share > 0) & (share <= 1)).all():
        raise UserError(f"density is a number in (0, 1], or {number} of them, not {density!r}")
    merged, stats, _ = merge(
        rules.ties_statistics,
        pretrained,
        finetuned,
        shared=(scale,),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        dtype=dtype,
        min_replicas=1,
        combine=partial(_trim, share, scale),
    )
    return merged, stats


def _trim(density, scale, pretrained, finetuned, solution, parts, dtype) -> list:
    count = sum(part.count for part in parts)
    rank = tuple(ranks(density, count, len(finetuned[0])))
    if min(rank) < count:
        least = trim_threshold(pretrained, finetuned, parts=tuple(parts), rank=rank)
    else:
        least = jnp.zeros(solution.coefficient.shape, jnp.uint32)
    return [
        add_trimmed(w0, w, least, scale, solution.keep_anchor, unit_view=part, dtype=dtype)
        for w0, w, part in zip(pretrained, finetuned, parts, strict=True)
    ]


def _number(finetuned: PyTree) -> int:
    """Replicas, by the first leaf that has any axis; what is wrong with the rest `merge` says."""
    return next((len(x) for x in jax.tree.leaves(finetuned) if jnp.ndim(x)), 0)


def _scale(scale: Any):
    scale = jnp.asarray(scale, jnp.result_type(float))
    if not isinstance(scale, jax.core.Tracer) and not bool(jnp.isfinite(scale).all()):
        raise UserError(f"scale must be finite, not {scale}")
    return scale


# Merges along arcs of task vectors.


def slerp(
    pretrained: PyTree,
    finetuned: PyTree,
    t: Any = None,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Spherical interpolation of task vectors: the second stage of WARP (Rame et al. 2024).

    Per merge unit, with Omega the angle between d_1 and d_2 (arXiv 2406.16768, section 3.2):

        w = w0 + sin((1 - t) Omega) / sin(Omega) d_1 + sin(t Omega) / sin(Omega) d_2

    The mean of two task vectors is shorter than either; this keeps their length. More than two
    are merged one after the other, the m-th at t = 1 / m, as the paper's appendix does: their
    order then matters. Vectors along one line (Omega of 0 or 180 degrees), and one that is 0,
    are interpolated linearly.

    Args:
      pretrained: as `model_stock`.
      finetuned: as `model_stock`; N = 1 gives that replica.
      t: from the first (0) to the second (1) of two replicas; it may be traced. None for equal
        shares, 1/2 of two.
      unit: which numbers share one angle; the paper's is a layer.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.
      dtype: as `model_stock`.

    Returns:
      The merged tree, and `Stats`, whose ratio (the sum of the coefficients) is above 1.

    Raises:
      UserError: t outside [0, 1], or given for another number than two; or as `model_stock`.

    Example:
      >>> w0, w = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> [round(float(x), 4) for x in slerp(w0, w)[0]["w"]]
      [0.7071, 0.7071]
    """
    number = pair_leaves(pretrained, finetuned, 1).num_replicas
    if t is None:
        shares = [1.0 / m for m in range(2, number + 1)]
    elif number != 2:
        raise UserError(f"t is for two replicas, not {number}; leave it out for equal shares")
    else:
        shares = [t]
        if not isinstance(t, jax.core.Tracer) and not 0.0 <= float(t) <= 1.0:
            raise UserError(f"t must lie in [0, 1], not {float(t):g}")
    merged, stats, _ = merge(
        rules.sequential_slerp,
        pretrained,
        finetuned,
        shared=(jnp.asarray(shares, jnp.result_type(float)),),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        dtype=dtype,
        min_replicas=1,
    )
    return merged, stats


# TIES's three steps on one merge unit: trim, elect a sign, mean of those that agree.


def disjoint_mean(trimmed):
    """Elect the sign of the sum, and take the mean of the numbers that have it.

        gamma = sgn(sum_t kept_t),    mean of { kept_t : sgn(kept_t) = gamma }

    Args:
      trimmed: [N, ...], trimmed task vectors, NumPy or JAX.

    Returns:
      [...]; 0 where all are 0. Where the sum is 0 but its terms are not, the positive sign.

    Example:
      >>> disjoint_mean(np.array([[2.0, -1.0], [1.0, 3.0], [-1.0, 1.0]])).tolist()
      [1.5, 2.0]
    """
    xp = namespace(trimmed)
    agree = xp.where(trimmed.sum(axis=0)[None] >= 0, trimmed > 0, trimmed < 0)
    number = agree.sum(axis=0).astype(trimmed.dtype)
    return xp.where(agree, trimmed, 0.0).sum(axis=0) / xp.maximum(number, 1.0)


def ranks(density: float | Sequence[float], count: int, num_replicas: int) -> list[int]:
    """How many of `count` numbers each replica keeps: density * count, at least one.

    Example:
      >>> ranks(0.2, 24, 2)
      [4, 4]
    """
    each = np.broadcast_to(np.asarray(density, np.float64), num_replicas)
    return [max(1, int(share * count)) for share in each]


@partial(jax.jit, static_argnames=("parts", "rank"))
def trim_threshold(pretrained: list, finetuned: list, *, parts: tuple, rank: tuple[int, ...]):
    """Bits of the rank-th largest magnitude of each task vector in a unit: [N, *unit shape].

    By bisection on the bits, which count up with the magnitude: 31 counts over the unit's own
    axes. Exact, and unlike a sort it neither gathers a sharded tensor nor copies one.
    """

    def keeps_enough(step, least):
        trial = least | (jnp.uint32(1 << 30) >> step.astype(jnp.uint32))
        count = sum(
            jnp.sum(
                magnitude(*to_unit_shape(w0, w, part)) >= _expand_to_unit(trial, part),
                axis=tuple(1 + axis for axis in part.axes),
                dtype=jnp.float64,
            )
            for w0, w, part in zip(pretrained, finetuned, parts, strict=True)
        )
        wanted = np.array(rank, np.float64).reshape((-1,) + (1,) * (least.ndim - 1))
        return jnp.where(count >= wanted, trial, least)

    shape = (len(finetuned[0]), *parts[0].unit_shape)
    with jax.enable_x64(True):  # float64 counts to 2^53; int32 only to 2^31
        return lax.fori_loop(0, 31, keeps_enough, jnp.zeros(shape, jnp.uint32))


@partial(jax.jit, static_argnames=("unit_view", "dtype"))
def add_trimmed(pretrained, finetuned, threshold, scale, keep_anchor, *, unit_view, dtype):
    """w0 + scale * disjoint mean of the trimmed d_i of one tensor, rounded once to `dtype`.

    Args:
      pretrained: w0, [...].
      finetuned: [N, ...].
      threshold: bits of the least magnitude kept, [N, *unit shape] uint32.
      scale: [].
      keep_anchor: [*unit shape] bool: the anchor's weights.
      unit_view: `units.UnitView` of the tensor.
      dtype: of the result; None for the anchor's.
    """
    dtype = pretrained.dtype if dtype is None else jnp.dtype(dtype)
    anchor, tuned = to_unit_shape(pretrained, finetuned, unit_view)
    kept = magnitude(anchor, tuned) >= _expand_to_unit(threshold, unit_view)

    def combine(anchor, tuned, kept, scale):
        trimmed = jnp.where(kept, tuned - anchor[None], 0.0)
        return cast(anchor + scale * disjoint_mean(trimmed), dtype)

    merged = in_float64(combine)(anchor, tuned, kept, scale).astype(dtype)
    anchor = cast(pretrained, dtype).reshape(unit_view.view)
    hold = jnp.expand_dims(keep_anchor, unit_view.axes)
    return jnp.where(hold, anchor, merged).reshape(pretrained.shape)


def magnitude(anchor, tuned):
    """Bits of |w_i - w0| as float32: whole numbers in the order of the magnitudes."""
    movement = (tuned - anchor[None]).astype(jnp.float32)
    return lax.bitcast_convert_type(movement, jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def _expand_to_unit(values, unit_view):
    return jnp.expand_dims(values, tuple(1 + axis for axis in unit_view.axes))
