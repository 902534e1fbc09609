"""Merges at a given ratio, with Model Stock's signature and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging.analysis import distance
from modelstock_jax.merging.engine import merge
from modelstock_jax.merging.precision import compute_dtype
from modelstock_jax.merging.rules import equal_shares
from modelstock_jax.merging.stats import Stats
from modelstock_jax.merging.stock import model_stock


def uniform_mean(
    pretrained: Any,
    finetuned: Any,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[Any, Stats]:
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
    pretrained: Any,
    finetuned: Any,
    alpha: Any,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[Any, Stats]:
    """WiSE-FT: w = (1 - alpha) w0 + alpha mean_i(w_i), one alpha for all (Figure 1's curves).

    Wortsman et al. 2022 (arXiv 2109.01903), section 3; WARP's interpolation toward initialisation.

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
    pretrained: Any,
    finetuned: Any,
    ratio: Any = None,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
) -> tuple[Any, Stats]:
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
        equal_shares, pretrained, finetuned, shared=(ratio,),
        unit=unit, num_heads=num_heads, filter_axis=filter_axis, dtype=dtype, least=1,
    )
    return merged, stats
