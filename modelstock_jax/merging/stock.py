"""Model Stock (section 3 of the paper) and two extensions of this project.

`weighted_model_stock` merges replicas of unequal noise. `model_stock_carried` carries the noise
estimate from one periodic merge to the next. docs/method.md derives the equations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry
from modelstock_jax.merging.engine import merge, unit_zeros
from modelstock_jax.merging.rules import (
    UnitOutcome,
    UnitSolution,
    equation_3,
    measure,
    noise_weights,
    solve_with_fallbacks,
)
from modelstock_jax.merging.stats import Stats
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.merging.units import UnitFunction

_P = ParamSpec("_P")
_T = TypeVar("_T")


def no_third_position(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a merge method without a coefficient: explain a third positional argument.

    The common mistake is `model_stock(base, model_a, model_b)`.
    """

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if len(args) > 2:
            name = getattr(method, "__name__", "method")
            if isinstance(args[2], str):
                raise UserError(f"{name}: pass the unit by keyword, unit={args[2]!r}")
            raise UserError(
                f"{name} accepts two positional arguments; pass all fine-tuned models as one tree: "
                f"{name}(base, stack_replicas([a, b]))"
            )
        return method(*args, **kwargs)

    return call


def check_coefficient(name: str, value: Any, max_ndim: int = 0) -> None:
    """Raise a UserError if the coefficient of a method is a model or another tree, not a number.

    Args:
      name: name of the coefficient
      value: a number, an array or, for `max_ndim=1`, a sequence of numbers; None is accepted
      max_ndim: maximum number of axes

    Raises:
      UserError: the message explains `stack_replicas`

    Example:
      >>> check_coefficient("alpha", 0.5)
      >>> check_coefficient("alpha", {"w": jnp.zeros(2)})
      Traceback (most recent call last):
      ...
      modelstock_jax.errors.UserError: alpha must be a number, not a dict; to merge several
      models, pass stack_replicas([a, b]) as the second argument
    """
    if value is None:
        return
    what = f"a {type(value).__name__}"
    if hasattr(value, "dtype"):
        valid, what = np.ndim(value) <= max_ndim, f"an array of shape {np.shape(value)}"
    elif isinstance(value, list | tuple) and max_ndim:
        valid = all(np.ndim(x) == 0 and not isinstance(x, Mapping | str) for x in value)
    else:
        valid = isinstance(value, int | float)
    if not valid:
        number = "a number, or one per replica" if max_ndim else "a number"
        raise UserError(
            f"{name} must be {number}, not {what}; to merge several models, pass "
            "stack_replicas([a, b]) as the second argument"
        )


@no_third_position
def model_stock(
    pretrained: PyTree,
    finetuned: PyTree,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
    anchor_rounding: str = "keep",
) -> tuple[PyTree, Stats]:
    """Merge fine-tuned replicas with their anchor by the ratio that the angles determine.

    Per merge unit, with task vectors d_i = w_i - w0 and cos their mean pairwise cosine:

        t   = N cos / (1 + (N - 1) cos)          equation 3; N = 2 gives equation 2
        w_H = t mean_i(w_i) + (1 - t) w0

    The paper leaves some cases open. `stats.outcome` reports which units they occurred in:

    - cos <= 0: t = 0, the anchor.
    - No replica changed: the anchor, bit for bit. The cosine is undefined (`COSINE_UNDEFINED`).
    - Some replicas did not change: the unit is merged from the other replicas. If only one replica
      changed, the result is its weights, bit for bit. A replica changed if float32 can represent
      its squared norm |d_i|^2 (rms of d_i above about 1e-19).
    - A unit of fewer than two elements (a scalar): the mean. Its cosine is undefined.
    - Integers and booleans: the anchor's values. Empty tensors stay empty; None stays None.
    - A non-finite weight: an error. In a traced call (jit, grad, vmap) no error can be raised: the
      unit keeps the anchor's weights, and `check_finite(stats)` raises the error afterwards.

    Weights may have any floating dtype from float8 to float64, in any combination. (float64
    requires `jax_enable_x64`; without it JAX converts to float32.) All arithmetic is in float64,
    regardless of this setting. Statistics are float32 (float64 for float64 weights). The result is
    rounded once, to the anchor's dtype or to `dtype`; values outside the range of a narrower dtype
    saturate at its largest finite value.

    Args:
      pretrained: w0, any pytree of arrays
      finetuned: the same tree with a leading replica axis N >= 2 on every array
      unit: which elements share one angle: tensor, layer, filter, head, block or global
        (see `units.assign`), or a function `(name, shape) -> key`: tensors with equal keys are one
        unit, a tensor with the key None is one by itself. Static under jit.
      num_heads: number of attention heads, for `unit="head"`: an integer, or a mapping from name
        prefix to integer. Not needed if the heads are an axis, as in flax's attention.
      filter_axis: output axis of kernels: -1 (JAX) or 0 (PyTorch)
      scan_axes: for tensors that stack layers, as `nn.scan` makes them: a mapping from name prefix
        (`""` for all) to the axis of the layers. Each layer is then merged as if it were separate.
      dtype: dtype of the merged floating tensors (default: the anchor's)
      anchor_rounding: "keep" (default) or "correct". Use "correct" if the anchor was rounded to a
        coarser dtype after the replicas were trained from the original, for example a bfloat16
        base of float32 fine-tuned models. It subtracts the expected energy of the rounding error,
        sum of (half ulp)^2 / 3, from every entry of the Gram matrix, so that t and the statistics
        approximate those of the original anchor. Tensors whose anchor is not coarser than the
        replicas are not affected. If training started from the rounded anchor, nothing may be
        subtracted: the call raises an error. Under jit or vmap, where no error can be raised,
        "keep" applies (see `anchor_rounding.started_from_rounded`). Static under jit.

    Returns:
      the merged tree, and `Stats`

    Raises:
      UserError: fewer than two replicas; trees or shapes that differ; dtypes that cannot be
        merged; `anchor_rounding="correct"` if training started from the rounded anchor.
      NonFiniteError: NaN or infinity; the message names replica and tensor

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
        scan_axes=scan_axes,
        dtype=dtype,
        anchor_rounding=anchor_rounding,
    )
    return merged, stats


@no_third_position
def weighted_model_stock(
    pretrained: PyTree,
    finetuned: PyTree,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
    anchor_rounding: str = "keep",
) -> tuple[PyTree, Stats]:
    """Merge replicas of unequal noise: an extension of this project, not part of the paper.

    With |mu|^2 = mean_{i<j} d_i . d_j and the noise energy s_i^2 = |d_i|^2 - |mu|^2 of replica i:

        w = w0 + sum_i a_i d_i,    a_i = (1 / s_i^2) / (1 / |mu|^2 + sum_j 1 / s_j^2)

    Replicas of equal noise give equation 3. The formula assumes that all replicas have the same
    signal. If their updates differ in length, for example because of their learning rates, s_i^2
    of the shorter update is usually negative. Where some s_i^2 is not above rounding, equation 3
    is used; `outcome_counts(stats)` counts these units as "fallback_to_eq3". Where |mu|^2 <= 0,
    the result is the anchor. All other cases are as in `model_stock`. `stats.ratio` is the sum of
    the a_i.

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`
      unit: as in `model_stock`
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`
      anchor_rounding: as in `model_stock`. It changes |mu|^2; the noise energies s_i^2 do not
        change.

    Returns:
      the merged tree, and `Stats`

    Raises:
      UserError: as in `model_stock`

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
        scan_axes=scan_axes,
        dtype=dtype,
        anchor_rounding=anchor_rounding,
    )
    return merged, stats


def init_noise(
    pretrained: PyTree,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
) -> PyTree:
    """Return the noise energy before the first of a series of merges: S = 0 in every unit.

    Args:
      pretrained: w0; only names and shapes are used, so `jax.ShapeDtypeStruct` leaves work too
      unit: as in `model_stock`
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`

    Returns:
      a tree of zeros with the shapes of the units: the input of the first `model_stock_carried`

    Raises:
      UserError: a `unit` that `model_stock` does not accept

    Example:
      >>> {name: s.shape for name, s in init_noise({"w": jnp.ones((3, 2))}, unit="filter").items()}
      {'w': (2,)}
    """
    return unit_zeros(
        pretrained, unit, num_heads=num_heads, filter_axis=filter_axis, scan_axes=scan_axes
    )


def model_stock_carried(
    pretrained: PyTree,
    finetuned: PyTree,
    noise: PyTree = None,
    *,
    unit: str | UnitFunction = "tensor",
    shrink: Any = True,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats, PyTree]:
    """Merge in a series of periodic merges, and account for the noise of the earlier merges.

    After a merge replaces every replica, the next angle shows only the noise of one period,
    because the replicas share the rest of their weights. This function therefore tracks the noise
    energy S of the merged weights, per unit:

        s  = (mean_i |d_i|^2 - mean_{i<j} d_i . d_j) / N     noise that this period adds to the mean
        t  = 1 - (S + s) / |mean_i d_i|^2                    clipped to [0, 1]
        w  = w0 + t mean_i(d_i),   S <- t^2 (S + s)

    At the first merge, S = 0 and t is equation 3 with cos = mean G_ij / mean G_ii. Only differences
    between replicas enter s. The last merged weights are therefore not an input, but all replicas
    must have started the period from them.

    This is an extension of this project, without a proof. It ends closer to the anchor. At equal
    in-distribution accuracy it was slightly worse than Model Stock from one anchor and better from
    another (docs/method.md, section 8).

    Args:
      pretrained: w0, the same for all merges of the series; as in `model_stock`
      finetuned: as in `model_stock`
      noise: S that the last merge returned, or None (`init_noise(pretrained, unit=unit)`) at the
        first
      unit: as in `model_stock`
      shrink: whether to shrink at this merge. False returns the mean (t = 1) and accumulates the
        noise, for series that shrink only at the last merge. A bool, which may be traced.
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      The merged tree, `Stats`, and S: a tree with the shapes of the units, in squared units of the
      weights. The predicted distances use only the angle of this period.

    Raises:
      UserError: as in `model_stock`

    Example:
      >>> w0, w = {"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [0.5, 0.75**0.5]])}
      >>> merged, stats, noise = model_stock_carried(w0, w)
      >>> round(float(stats.ratio["w"]), 3), round(float(noise["w"]), 3)
      (0.667, 0.111)
    """
    zeros = functools.partial(
        init_noise, unit=unit, num_heads=num_heads, filter_axis=filter_axis, scan_axes=scan_axes
    )
    noise = zeros(pretrained) if noise is None else noise
    shapes, expected = (
        jax.tree.map(jnp.shape, x) for x in (noise, jax.eval_shape(zeros, pretrained))
    )
    if shapes != expected:
        raise UserError(
            "noise must be the third result of the last model_stock_carried with the same unit, or "
            "None; to merge several models, pass stack_replicas([a, b]) as the second argument"
        )
    return merge(
        shrink_by_carried_noise,
        pretrained,
        finetuned,
        noise,
        shared=(_as_bool(shrink),),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        scan_axes=scan_axes,
        dtype=dtype,
    )


def _as_bool(value: Any) -> jax.Array:
    return value.astype(bool) if isinstance(value, jax.Array) else jax.device_put(np.bool_(value))


def shrink_by_carried_noise(gram, is_scalar, noise, shrink) -> UnitSolution:
    """Return equal coefficients t / N, with t from the noise of all merges so far.

    Args:
      gram: [N, N, ...]
      is_scalar: [...] bool, see `rules`
      noise: S, [...]
      shrink: [] bool; False sets t = 1

    Returns:
      a `UnitSolution` whose `carry` is the new S, [...]
    """
    xp = geometry.namespace(gram)
    stats = measure(gram)
    noise = noise.astype(gram.dtype)
    num_active = xp.maximum(stats.num_active, 1.0)
    added = xp.maximum(stats.mean_squared_norm - stats.mean_product, 0.0) / num_active
    # |mean_i d_i|^2
    squared_mean = (stats.mean_squared_norm + (num_active - 1.0) * stats.mean_product) / num_active
    has_signal = squared_mean > noise + added
    ratio = 1.0 - (noise + added) / xp.where(has_signal, squared_mean, 1.0)
    ratio = xp.where(has_signal, ratio, 0.0)
    ratio = xp.where(shrink, ratio, xp.ones_like(ratio))
    coefficient = xp.where(stats.active, (ratio / num_active)[None], 0.0)
    outcome = xp.where(ratio > 0, stats.outcome, np.int8(UnitOutcome.CLAMPED))
    solution = solve_with_fallbacks(gram, stats, is_scalar, coefficient, outcome)
    # Noise cannot be estimated from a single replica.
    added = xp.where(stats.num_active > 1, added, 0.0)
    return solution._replace(carry=solution.ratio**2 * (noise + added))
