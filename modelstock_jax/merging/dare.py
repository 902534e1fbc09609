"""DARE: task vectors with random elements dropped, the others rescaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from modelstock_jax.errors import UserError
from modelstock_jax.merging import philox, rules
from modelstock_jax.merging.baselines import checked_density, finite_scale, num_replicas
from modelstock_jax.merging.engine import Exact, exact, merge, or_anchor
from modelstock_jax.merging.gram import cast, in_float64, to_unit_shape
from modelstock_jax.merging.stats import Stats
from modelstock_jax.merging.stock import check_coefficient
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.merging.trimming import has_elected_sign
from modelstock_jax.merging.units import UnitFunction, UnitView


def dare_linear(
    pretrained: PyTree,
    finetuned: PyTree,
    density: float | Sequence[float],
    *,
    weights: Any = None,
    scale: Any = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    seed: int = 0,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Merge by DARE (Yu et al. 2024, arXiv 2311.03099): task arithmetic of sparse task vectors.

        w = w0 + scale * sum_i c_i s_i,    s_i = m_i d_i / density

    m_i is 1 for random elements, each with probability `density`, and 0 for the others. It depends
    only on the seed, the position of the replica, and the name and index of the element: the result
    is equal on any devices and, for the same tensor names, to that of `modelstock merge`.

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`, but N = 1 is allowed
      density: probability that an element remains, in (0, 1], one for all replicas or one per
        replica. Static under jit.
      weights: c_i, one per replica, [N]; 1 each by default; may be traced
      scale: lambda; may be traced
      normalize: divide by the sum of the weights
      rescale: divide the remaining elements by the density, so that the expected s_i is d_i
      seed: seed of the random elements. Static under jit.
      unit: merge unit of the statistics; the merge does not depend on it
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      The merged tree, and `Stats` of the complete task vectors, with ratio `scale`. The predicted
      distance of the merged weights is unknown: DISTANCE_UNDEFINED.

    Raises:
      UserError: a density outside (0, 1], weights other than N finite numbers, a scale that is not
        finite, or an error of `model_stock`

    Example:
      >>> w = {"w": jnp.ones((1, 8))}
      >>> dare_linear({"w": jnp.zeros(8)}, w, 0.5, seed=3)[0]["w"].tolist()
      [2.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    """
    options: dict[str, Any] = {"unit": unit, "num_heads": num_heads, "filter_axis": filter_axis}
    options |= {"scan_axes": scan_axes, "dtype": dtype}
    numbers = _numbers(finetuned, density, weights, scale, normalize, rescale, seed)
    return _merge(pretrained, finetuned, numbers, elect=False, **options)


def dare_ties(
    pretrained: PyTree,
    finetuned: PyTree,
    density: float | Sequence[float],
    *,
    weights: Any = None,
    scale: Any = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    seed: int = 0,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Merge by DARE with the elected signs of TIES (arXiv 2311.03099 and 2306.01708).

        gamma = sgn(sum_i c_i s_i),    w = w0 + scale * sum of the c_i s_i whose sign is gamma

    s_i are the sparse task vectors of `dare_linear`. The sign of a sum of 0 is positive.

    Args:
      pretrained: as in `dare_linear`
      finetuned: as in `dare_linear`
      density: as in `dare_linear`
      weights: as in `dare_linear`
      scale: as in `dare_linear`
      normalize: divide each element by the sum of the weights of the replicas that agree: the
        disjoint mean of TIES
      rescale: as in `dare_linear`
      seed: as in `dare_linear`
      unit: as in `dare_linear`
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      as `dare_linear`

    Raises:
      UserError: as `dare_linear`

    Example:
      >>> w = {"w": jnp.array([[4.0, -3.0], [2.0, 5.0]])}
      >>> dare_ties({"w": jnp.zeros(2)}, w, 1.0, normalize=True)[0]["w"].tolist()
      [3.0, 5.0]
    """
    options: dict[str, Any] = {"unit": unit, "num_heads": num_heads, "filter_axis": filter_axis}
    options |= {"scan_axes": scan_axes, "dtype": dtype}
    numbers = _numbers(finetuned, density, weights, scale, normalize, rescale, seed)
    return _merge(pretrained, finetuned, numbers, elect=True, **options)


class _Numbers(NamedTuple):
    """Options of DARE after their checks.

    Attributes:
      density: [N], NumPy
      weights: `exact` numbers, [N]
      scale: `exact` number, []
      normalize: see `dare_linear`
      rescale: see `dare_linear`
      seed: see `dare_linear`
    """

    density: np.ndarray
    weights: Exact
    scale: Exact
    normalize: bool
    rescale: bool
    seed: int


def _numbers(finetuned, density, weights, scale, normalize, rescale, seed) -> _Numbers:
    check_coefficient("density", density, max_ndim=1)
    check_coefficient("weights", weights, max_ndim=1)
    check_coefficient("scale", scale)
    number = num_replicas(finetuned)
    densities = np.broadcast_to(checked_density(density, number), number)
    given = finite_scale(np.ones(number) if weights is None else weights, "weights")
    if given.value.shape != (number,):
        raise UserError(
            f"weights must be one number per replica, shape ({number},), not {given.value.shape}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise UserError(f"seed must be an integer, not {seed!r}")
    return _Numbers(densities, given, finite_scale(scale), normalize, rescale, int(seed))


def _merge(pretrained, finetuned, numbers: _Numbers, *, elect: bool, **options):
    merged, stats, _ = merge(
        rules.ties_statistics,
        pretrained,
        finetuned,
        shared=(numbers.scale,),
        min_replicas=1,
        combine=partial(_combine, numbers, elect),
        **options,
    )
    return merged, stats


def _combine(numbers, elect, names, pretrained, finetuned, updates, views, dtype) -> list:
    bounds = tuple(int(philox.below(np.float64(p))) for p in numbers.density)
    factors = exact(1 / numbers.density if numbers.rescale else np.ones(len(bounds)))
    return [
        add_sparse(
            w0, w, keys(numbers.seed, len(w), name), numbers.weights, factors, numbers.scale,
            update, bounds=bounds, elect=elect, normalize=numbers.normalize, unit_view=view,
            dtype=w0.dtype if dtype is None else jnp.dtype(dtype),
        )
        for name, w0, w, update, view in zip(
            names, pretrained, finetuned, updates, views, strict=True
        )
    ]  # fmt: skip


def keys(seed: int, number: int, name: str) -> jax.Array:
    """Return the key of one tensor of each replica as 32-bit words, [N, 2, 2], low words first."""
    words = [philox.key(seed, i, name) for i in range(number)]
    return jax.device_put(np.array(words, "<u8").view("<u4").reshape(number, 2, 2))


@partial(jax.jit, static_argnames=("bounds", "elect", "normalize", "unit_view", "dtype"))
def add_sparse(
    pretrained, finetuned, keys, weights, factors, scale, packed,
    *, bounds: tuple[int, ...], elect: bool, normalize: bool, unit_view: UnitView, dtype,
):  # fmt: skip
    """Return w0 + scale * sum_i c_i s_i of one tensor, rounded once to `dtype`.

    Args:
      pretrained: w0, [...]
      finetuned: [N, ...]
      keys: 32-bit words of the keys, [N, 2, 2]
      weights: c_i, `exact` numbers, [N]
      factors: of the elements that remain, `exact` numbers, [N]
      scale: `exact` number, []
      packed: update of the tensor's units; only its `source` is used
      bounds: an element remains if its random word is below this, for each replica
      elect: add only the elements whose sign is that of the sum
      normalize: divide by the sum of the weights of what is added
      unit_view: how the tensor is split into units
      dtype: dtype of the result
    """
    kept = jnp.stack([
        _is_kept(pretrained.shape, key, bound).reshape(unit_view.view)
        for key, bound in zip(keys, bounds, strict=True)
    ])  # fmt: skip

    def combine(anchor, tuned, kept, weights, factors, scale):
        c, factors, scale = (x.value + x.rest for x in (weights, factors, scale))
        c, factors = (x.reshape(-1, *[1] * anchor.ndim) for x in (c, factors))
        terms = jnp.where(kept, (tuned - anchor[None]) * factors, 0.0) * c
        divisor = c.sum()
        if elect:
            agree = has_elected_sign(terms)
            terms, divisor = jnp.where(agree, terms, 0.0), jnp.where(agree, c, 0.0).sum(axis=0)
        total = terms.sum(axis=0)
        if normalize:
            total = total / jnp.where(jnp.abs(divisor) < 1e-8, 1.0, divisor)
        return cast(anchor + scale * total, dtype)

    anchor, tuned = to_unit_shape(pretrained, finetuned, unit_view)
    merged = in_float64(combine)(anchor, tuned, kept, weights, factors, scale).astype(dtype)
    return or_anchor(merged, pretrained, packed, len(finetuned), unit_view)


def _is_kept(shape: tuple[int, ...], key, bound: int):
    """Return whether the random word of each element is below a bound, [*shape] bool."""
    with jax.enable_x64(True):
        index = jnp.zeros(shape, jnp.uint64)
        for axis, length in enumerate(shape):
            along = lax.broadcasted_iota(jnp.uint32, shape, axis)
            index = index * np.uint64(length) + along.astype(jnp.uint64)
        low, high = key[:, 0].astype(jnp.uint64), key[:, 1].astype(jnp.uint64)
        words = high << np.uint64(32) | low
        return philox.words(index, (words[0], words[1])) < np.uint64(bound)
