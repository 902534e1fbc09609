"""Merge methods that do not measure a ratio, with the signature and statistics of `model_stock`.

| methods | merged weights |
|---|---|
| `uniform_mean`, `wise_ft`, `constant_ratio` | the mean of the replicas, at one ratio |
| `task_arithmetic`, `ties` | models of different tasks |
| `slerp` | interpolation along arcs |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.merging import rules
from modelstock_jax.merging.analysis import distance
from modelstock_jax.merging.engine import Exact, exact, merge
from modelstock_jax.merging.gram import compute_dtype
from modelstock_jax.merging.placement import on_this_host
from modelstock_jax.merging.stats import Stats
from modelstock_jax.merging.stock import check_coefficient, model_stock, no_third_position
from modelstock_jax.merging.trees import PyTree, pair_leaves
from modelstock_jax.merging.trimming import trim
from modelstock_jax.merging.units import UnitFunction


@no_third_position
def uniform_mean(
    pretrained: PyTree,
    finetuned: PyTree,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Merge by the mean of the replicas, w = mean_i(w_i): the uniform soup (Tables 1 and 7: w_avr).

    For replicas that differ in hyperparameters, data order and starting checkpoint, this is WARM
    (Rame et al. 2024, arXiv 2401.12187).

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`, but N = 1 is allowed
      unit: merge unit of the statistics; the mean does not depend on it
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      the merged tree, and `Stats` with ratio 1

    Example:
      >>> merged, _ = uniform_mean({"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [3.0, 4.0]])})
      >>> merged["w"].tolist()
      [2.0, 2.0]
    """
    options = {"num_heads": num_heads, "filter_axis": filter_axis, "scan_axes": scan_axes}
    return _merge_at_ratio(pretrained, finetuned, 1.0, unit=unit, dtype=dtype, **options)


def wise_ft(
    pretrained: PyTree,
    finetuned: PyTree,
    alpha: Any,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Merge by WiSE-FT: w = (1 - alpha) w0 + alpha mean_i(w_i), one alpha for all units (Figure 1).

    Wortsman et al. 2022 (arXiv 2109.01903), section 3. WARP's interpolation toward the
    initialization is the same.

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`, but N = 1 is allowed: the method as published. N > 1
        interpolates toward the mean of the replicas.
      alpha: in [0, 1], a scalar or a traced array of shape []
      unit: merge unit of the statistics; the merge does not depend on it
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      the merged tree, and `Stats` with ratio alpha

    Raises:
      UserError: alpha outside [0, 1], or an error of `model_stock`

    Example:
      >>> merged, _ = wise_ft({"w": jnp.zeros(2)}, {"w": jnp.array([[4.0, 8.0]])}, 0.25)
      >>> merged["w"].tolist()
      [1.0, 2.0]
    """
    check_coefficient("alpha", alpha)
    options = {"num_heads": num_heads, "filter_axis": filter_axis, "scan_axes": scan_axes}
    return _merge_at_ratio(pretrained, finetuned, alpha, unit=unit, dtype=dtype, **options)


def constant_ratio(
    pretrained: PyTree,
    finetuned: PyTree,
    ratio: Any = None,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Merge by the mean with one global ratio: w = w0 + t mean_i(d_i).

    This is the control for the benefit of a ratio per unit. By default, t is chosen such that the
    result is as far from the anchor as that of Model Stock:

        t = min(1, |model_stock - w0| / |mean_i(w_i) - w0|)

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`
      ratio: t in [0, 1]; None to match the distance of Model Stock
      unit: merge unit of Model Stock, and of the statistics
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      the merged tree, and `Stats` with this ratio in every unit

    Raises:
      UserError: as in `model_stock`

    Example:
      >>> w0, w = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])}
      >>> round(float(constant_ratio(w0, w)[1].ratio["w"]), 3)  # one unit: Model Stock itself
      0.667
    """
    check_coefficient("ratio", ratio)
    options: dict[str, Any] = {"unit": unit, "num_heads": num_heads}
    options |= {"filter_axis": filter_axis, "scan_axes": scan_axes}
    if ratio is None:
        pair_leaves(pretrained, finetuned)
        # Measure both distances before the results are rounded to a narrower dtype.
        wide = compute_dtype(*(jnp.result_type(x) for x in jax.tree.leaves(pretrained)))
        stock, _ = model_stock(pretrained, finetuned, dtype=wide, **options)
        mean, _ = uniform_mean(pretrained, finetuned, dtype=wide, **options)
        ratio = _ratio_of_lengths(distance(pretrained, stock), distance(pretrained, mean))
    return _merge_at_ratio(pretrained, finetuned, ratio, dtype=dtype, **options)


@jax.jit
def _ratio_of_lengths(length, full_length):
    ratio = length / jnp.where(full_length > 0, full_length, 1.0)
    return jnp.clip(jnp.where(full_length > 0, ratio, 0.0), 0.0, 1.0)


def _merge_at_ratio(pretrained, finetuned, ratio, **options):
    ratio = exact(ratio)
    if on_this_host(ratio) and not 0.0 <= float(ratio.value) <= 1.0:
        raise UserError(f"the ratio (alpha) must be in [0, 1], not {float(ratio.value):g}")
    merged, stats, _ = merge(
        rules.fixed_ratio,
        pretrained,
        finetuned,
        shared=(ratio,),
        min_replicas=1,
        **options,
    )
    return merged, stats


def task_arithmetic(
    pretrained: PyTree,
    finetuned: PyTree,
    scale: Any,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Add scaled task vectors to the anchor (Ilharco et al. 2023, arXiv 2212.04089, section 2).

        w = w0 + scale * sum_i d_i          learning by addition (section 4)
        w = w0 - scale * d                  forgetting by negation (section 3): a negative scale
        w = w0 + d_C + (d_B - d_A)          analogies (section 5): one scale per task vector

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`, but N = 1 is allowed
      scale: one scale for all task vectors, or one per task vector, [N]; may be traced. That paper
        chooses one scale on held-out data; 0.3 to 0.5 performed well in its section 4.
      unit: merge unit of the statistics; the merge does not depend on it
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      The merged tree, and `Stats` with ratio sum_i scale_i. The predicted distances hold only for
      replicas that differ in noise alone, not for models of different tasks.

    Raises:
      UserError: a scale that is not finite, a number of scales other than 1 or N, or an error of
        `model_stock`.

    Example:
      >>> w0, w = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [3.0, 4.0]])}
      >>> task_arithmetic(w0, w, 0.5)[0]["w"].tolist()
      [2.0, 2.0]
      >>> task_arithmetic(w0, w, (1.0, -1.0))[0]["w"].tolist()
      [-2.0, -4.0]
    """
    check_coefficient("scale", scale, max_ndim=1)
    number = num_replicas(finetuned)
    scale = finite_scale(scale)
    if scale.value.shape not in ((), (number,)):
        raise UserError(
            "scale must be one scalar, or one per replica, shape "
            f"({number},); not {scale.value.shape}"
        )
    merged, stats, _ = merge(
        rules.fixed_coefficients,
        pretrained,
        finetuned,
        shared=(Exact(*(jnp.broadcast_to(x, number) for x in scale)),),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        scan_axes=scan_axes,
        dtype=dtype,
        min_replicas=1,
    )
    return merged, stats


def ties(
    pretrained: PyTree,
    finetuned: PyTree,
    density: float | Sequence[float] = 0.2,
    *,
    scale: Any = 1.0,
    unit: str | UnitFunction = "global",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Merge by TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1): trim, elect, disjoint mean.

        trim     keep the elements of largest magnitude of each d_i, set the others to 0
        elect    gamma = sgn(sum_i d_i), elementwise
        merge    w = w0 + scale * mean of the d_i whose sign is gamma

    That paper leaves four cases open. All elements that tie with the smallest kept element are
    kept; magnitudes are compared in float64 for weights of any dtype. The number of elements to
    keep is density * n rounded to the nearest integer (half to even), and at least 1. If opposite
    elements cancel to exactly 0, the positive sign is elected.

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`, but N = 1 is allowed
      density: fraction of elements to keep, in (0, 1], one for all replicas or one per replica.
        Static under jit.
      scale: lambda; may be traced. The defaults of `density` and `scale` are that paper's values
        for use without held-out data.
      unit: which elements are ranked together when trimming: `global` as in that paper, `tensor`
        as in `modelstock merge` and mergekit.
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      The merged tree, and `Stats` of the task vectors before trimming, with ratio `scale`. The
      predicted distance of the merged weights is unknown: DISTANCE_UNDEFINED.

    Raises:
      UserError: a density outside (0, 1], or as `task_arithmetic`

    Example:
      >>> w0 = {"w": jnp.zeros(4)}
      >>> w = {"w": jnp.array([[4.0, -3.0, 1.0, 0.0], [2.0, 5.0, 0.0, 1.0]])}
      >>> ties(w0, w, density=0.5)[0]["w"].tolist()  # 1s are trimmed; -3 loses against 5
      [3.0, 5.0, 0.0, 0.0]
    """
    check_coefficient("density", density, max_ndim=1)
    check_coefficient("scale", scale, max_ndim=1)
    scale = finite_scale(scale)
    if scale.value.shape:
        raise UserError(f"TIES accepts one scale, not an array of shape {scale.value.shape}")
    densities = checked_density(density, num_replicas(finetuned))
    merged, stats, _ = merge(
        rules.ties_statistics,
        pretrained,
        finetuned,
        shared=(scale,),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        scan_axes=scan_axes,
        dtype=dtype,
        min_replicas=1,
        combine=partial(trim, densities, scale),
    )
    return merged, stats


def checked_density(density: float | Sequence[float], number: int) -> np.ndarray:
    """Return densities as an array of one number, or one per replica, or raise a UserError.

    Args:
      density: one value, or one per replica
      number: N
    """
    if isinstance(density, jax.core.Tracer):
        raise UserError("density is static: pass a number, not a value that jit traces")
    densities = np.asarray(density, np.float64)
    in_range = ((densities > 0) & (densities <= 1)).all()
    if densities.shape not in ((), (number,)) or not in_range:
        raise UserError(
            "density must be in (0, 1] (a fraction, not a percentage), or one such value per "
            f"replica ({number} values), not {density!r}"
        )
    return densities


def num_replicas(finetuned: PyTree) -> int:
    """Return N from the first leaf that has an axis; `merge` checks the other leaves."""
    if isinstance(finetuned, Iterator):
        return 0
    shapes = (getattr(x, "shape", ()) for x in jax.tree.leaves(finetuned))
    return next((shape[0] for shape in shapes if shape), 0)


def finite_scale(scale: Any, name: str = "scale") -> Exact:
    """Return a coefficient as an `exact` number, or raise a UserError if it is not finite.

    Args:
      scale: a number or several; may be traced
      name: its name in the error
    """
    number = exact(scale)
    if on_this_host(number) and not bool(jnp.isfinite(number.value).all()):
        raise UserError(f"{name} must be finite, not {scale}")
    return number


def slerp(
    pretrained: PyTree,
    finetuned: PyTree,
    t: Any = None,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Merge by spherical interpolation of task vectors: stage 2 of WARP (Rame et al. 2024).

    Per merge unit, with Omega the angle between d_1 and d_2 (arXiv 2406.16768, section 3.2):

        w = w0 + sin((1 - t) Omega) / sin(Omega) d_1 + sin(t Omega) / sin(Omega) d_2

    The mean of two task vectors is shorter than either; spherical interpolation preserves their
    length. More than two task vectors are merged one after the other, the m-th at t = 1 / m, as in
    the appendix of that paper. The result then depends on their order. Collinear task vectors
    (Omega of 0 or 180 degrees) and zero task vectors are interpolated linearly.

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`, but N = 1 is allowed and returns this replica
      t: position from the first (0) to the second (1) of two replicas; may be traced. None for
        equal weights: 1/2 for two replicas.
      unit: which elements share one angle; a layer in that paper
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      the merged tree, and `Stats`, whose ratio (the sum of the coefficients) is above 1

    Raises:
      UserError: t outside [0, 1], t for a number of replicas other than two, or an error of
        `model_stock`.

    Example:
      >>> w0, w = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> [round(float(x), 4) for x in slerp(w0, w)[0]["w"]]
      [0.7071, 0.7071]
    """
    check_coefficient("t", t)
    num_replicas = pair_leaves(pretrained, finetuned, 1).num_replicas
    if t is None:
        ratios = [1.0 / m for m in range(2, num_replicas + 1)]
    elif num_replicas != 2:
        raise UserError(
            f"t requires two replicas, not {num_replicas}; leave it out for equal weights"
        )
    else:
        ratios = jnp.stack([t]) if isinstance(t, jax.Array) else [t]
        if not isinstance(t, jax.core.Tracer) and not 0.0 <= float(t) <= 1.0:
            raise UserError(f"t must be in [0, 1], not {float(t):g}")
    merged, stats, _ = merge(
        rules.sequential_slerp,
        pretrained,
        finetuned,
        shared=(exact(ratios),),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        scan_axes=scan_axes,
        dtype=dtype,
        min_replicas=1,
    )
    return merged, stats
