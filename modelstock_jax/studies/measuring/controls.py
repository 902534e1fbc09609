"""Merges that only a study makes: what Model Stock would be without one of its rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from modelstock_jax.merging import Stats
from modelstock_jax.merging.engine import merge
from modelstock_jax.merging.rules import Solution, measure, solve_given


def not_clipped(
    pretrained: Any,
    finetuned: Any,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
) -> tuple[Any, Stats]:
    """Equation 3 where cos <= 0 as well: t = N cos / (1 + (N - 1) cos), below zero there.

    Args:
      pretrained: as `model_stock`.
      finetuned: as `model_stock`.
      unit: as `model_stock`.
      num_heads: as `model_stock`.

    Returns:
      The merged tree, and `Stats`.

    Example:
      >>> w0 = {"w": jnp.zeros(2)}
      >>> w = {"w": jnp.array([[1.0, 0.0], [-0.5, 0.75**0.5]])}  # 120 degrees apart
      >>> round(float(not_clipped(w0, w)[1].ratio["w"]), 3)
      -2.0
    """
    merged, stats, _ = merge(
        _equation_3_everywhere, pretrained, finetuned, unit=unit, num_heads=num_heads
    )
    return merged, stats


def _equation_3_everywhere(gram, single) -> Solution:
    seen = measure(gram)
    number = jnp.maximum(seen.number, 1.0)
    # 0 / 0 of two opposite task vectors: their mean is the anchor, whatever t.
    below = 1.0 + (number - 1.0) * seen.cosine
    ratio = jnp.where(below > 0, number * seen.cosine / jnp.where(below > 0, below, 1.0), 0.0)
    ratio = jnp.where(single | (seen.number < 2), 1.0, ratio)
    share = jnp.where(seen.active, (ratio / number)[None], 0.0)
    return solve_given(gram, seen, single, share)
