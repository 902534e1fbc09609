"""The two passes of a merge over a tensor: `gram_products` and `add_task_vectors`.

`in_float64` evaluates a function in float64 inside a float32 program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.merging import geometry
from modelstock_jax.merging.anchor_rounding import half_ulp
from modelstock_jax.merging.placement import broadcast_like


def in_float64(
    function: Callable, derivative_of: Callable | None = None, dtype: Any = None
) -> Callable:
    """Return a function that evaluates in float64 and is differentiated in the inputs' precision.

    The backend chooses the order of a float32 sum, and a sequential float32 sum of 10^8 terms loses
    1 to 10 %. In float64 neither the order nor the compiler's fusion is visible in the float32
    result, so a merge inside a training step equals the same merge outside of it.
    `jax_enable_x64` may be off: only values inside the function are float64.

    Args:
      function: maps arrays (or trees of arrays) to arrays or trees
      derivative_of: the same function in a form that is better to differentiate (default:
        `function`).
      dtype: dtype of the floating outputs (default: float32, or float64 if an argument is float64)

    Returns:
      A function of the same arguments.

    Example:
      >>> big = jnp.array([1e8, 1.0, -1e8], jnp.float32)
      >>> float(in_float64(jnp.sum)(big))
      1.0
    """

    @jax.custom_jvp
    def evaluate(*args):
        result_dtype = dtype or compute_dtype(*(leaf.dtype for leaf in jax.tree.leaves(args)))
        with jax.enable_x64(True):
            result = function(*jax.tree.map(lambda x: _convert(x, jnp.floating, "float64"), args))
            return jax.tree.map(lambda x: _convert(x, jnp.float64, result_dtype), result)

    @evaluate.defjvp
    def _differentiate(primals, tangents):
        # The value at a non-finite weight is discarded, but 0 * inf would make the derivative NaN.
        safe = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)), primals)
        return evaluate(*primals), jax.jvp(derivative_of or function, safe, tangents)[1]

    return evaluate


def compute_dtype(*dtypes):
    """Return the dtype of statistics: float64 if one of the dtypes is float64, else float32."""
    return jnp.dtype("float64" if any(d == jnp.float64 for d in dtypes) else "float32")


def _convert(array, kind, dtype):
    array = jnp.asarray(array)
    if jnp.issubdtype(array.dtype, kind):
        return jax.lax.convert_element_type(array, dtype)
    return array


# Sums per pass over a tensor. All pairs of up to four replicas are 10.
_SUMS_PER_PASS = 10


def _add_pairwise(left, right):
    return [a + b for a, b in zip(left, right, strict=True)]


def pairs(num_replicas: int) -> list[tuple[int, int]]:
    """Return the pairs i <= j of replicas, in the order of `gram_products`.

    Example:
      >>> pairs(2)
      [(0, 0), (0, 1), (1, 1)]
    """
    rows = range(num_replicas)
    return [(i, j) for i in rows for j in rows[i:]]


def gram_products(pretrained, finetuned, unit_view):
    """Return d_i . d_j of all pairs i <= j, of one tensor, for each of its units.

    The products are elementwise and the sum is over the tensor's own axes. A dot would run in TF32
    on GPUs and in bfloat16 on TPUs, and raveling a sharded tensor would gather it.

    Args:
      pretrained: w0, [...], any floating dtype
      finetuned: [N, ...]
      unit_view: how the tensor is split into units

    Returns:
      [N (N + 1) / 2, *unit shape], float32 (float64 for float64 weights)

    Example:
      >>> from modelstock_jax.merging.units import UnitView
      >>> gram_products(jnp.zeros(2), jnp.eye(2), UnitView("w", (2,), (0,))).tolist()
      [1.0, 0.0, 1.0]
    """

    def one_by_one(*products):
        zero = np.zeros((), products[0].dtype)
        return [jax.lax.reduce(x, zero, jax.lax.add, unit_view.axes) for x in products]

    def in_one_pass(*products):
        sums = []
        for first in range(0, len(products), _SUMS_PER_PASS):
            some = list(products[first : first + _SUMS_PER_PASS])
            zeros = [np.zeros((), products[0].dtype)] * len(some)
            sums += jax.lax.reduce(some, zeros, _add_pairwise, unit_view.axes)
        return sums

    def sums(anchor, tuned, *, add_up):
        deltas = [jax.lax.sub(replica, anchor) for replica in tuned]
        products = [jax.lax.mul(deltas[i], deltas[j]) for i, j in pairs(len(deltas))]
        return jax.lax.concatenate([unit_view.swap(x)[None] for x in add_up(*products)], 0)

    def by_platform(*products):
        # TPUs emulate float64. Of the reductions, only plain sums are known to be emulated.
        return jax.lax.platform_dependent(*products, default=in_one_pass, tpu=one_by_one)

    views = to_unit_shape(pretrained, finetuned, unit_view)
    return in_float64(
        functools.partial(sums, add_up=by_platform),
        derivative_of=functools.partial(sums, add_up=one_by_one),
    )(*views)


def gram_matrix(products):
    """Return the Gram matrix from the products of `gram_products`, NumPy or JAX.

    Args:
      products: [N (N + 1) / 2, ...]

    Returns:
      [N, N, ...]

    Example:
      >>> gram_matrix(np.array([4.0, 1.0, 9.0])).tolist()
      [[4.0, 1.0], [1.0, 9.0]]
    """
    xp = geometry.namespace(products)
    num_replicas = math.isqrt(2 * len(products))
    index = {pair: k for k, pair in enumerate(pairs(num_replicas))}
    rows = range(num_replicas)
    return xp.stack([xp.stack([products[index[min(i, j), max(i, j)]] for j in rows]) for i in rows])


def rounding_energy(pretrained, unit_view):
    """Return the expected squared rounding error of one tensor of the anchor, for each unit.

        E = sum of (half ulp)^2 / 3

    Args:
      pretrained: w0, [...], any floating dtype
      unit_view: how the tensor is split into units

    Returns:
      [*unit shape], float32, with a derivative of 0

    Example:
      >>> from modelstock_jax.merging.units import UnitView
      >>> w0 = jnp.ones(3, jnp.bfloat16)  # an ulp is 2^-7
      >>> float(rounding_energy(w0, UnitView("w", (3,), (0,)))) == 2.0**-16
      True
    """
    halves = half_ulp(jax.lax.stop_gradient(pretrained)).reshape(unit_view.view)
    energy = in_float64(lambda half: jnp.sum(half * half, axis=unit_view.axes) / 3.0)(halves)
    return unit_view.swap(energy)


class Update(NamedTuple):
    """How the merged weights of a unit follow from its tensors.

    Attributes:
      coefficient: a_i, [N, ...], float32 (float64 for float64 weights)
      residual: the rounding error of a_i, [N, ...]: coefficient + residual has 48 bits
      source: the result is computed (`COMPUTED`), replica 0 .. N - 1, or the anchor (N); [...]
    """

    coefficient: Any
    residual: Any
    source: Any


COMPUTED = -1.0


def add_task_vectors(pretrained, finetuned, update: Update, *, unit_view, dtype):
    """Return w0 + sum_i a_i d_i of one tensor, rounded once to `dtype`.

    If the result equals one of the inputs, it is copied from the input, not computed.

    Args:
      pretrained: w0, [...]
      finetuned: [N, ...]
      update: coefficients of the tensor's units, [N, *unit shape]
      unit_view: how the tensor is split into units
      dtype: dtype of the result; None for the anchor's

    Returns:
      [...]
    """
    dtype = pretrained.dtype if dtype is None else jnp.dtype(dtype)
    # Without this barrier XLA merges these with the float64 task vectors of `gram_products` and
    # keeps all of them alive.
    finetuned = jax.lax.optimization_barrier(finetuned)

    unit_axes = [axis for axis in range(len(unit_view.view)) if axis not in unit_view.axes]

    def expand(values, like):
        return broadcast_like(unit_view.swap(values), unit_axes, like)

    def combine(anchor, tuned, coefficient, residual):
        total = anchor
        for a, rest, replica in zip(coefficient, residual, tuned, strict=True):
            delta = jax.lax.sub(replica, anchor)
            total = jax.lax.add(total, jax.lax.mul(expand(a + rest, delta), delta))
        return cast(total, dtype)

    merged = in_float64(combine)(
        *to_unit_shape(pretrained, finetuned, unit_view), update.coefficient, update.residual
    ).astype(dtype)
    *replicas, anchor = (cast(x, dtype).reshape(unit_view.view) for x in (*finetuned, pretrained))
    choice = jax.lax.convert_element_type(update.source - COMPUTED, "int32")
    choice = jax.lax.min(choice, np.int32(len(replicas)))
    merged = jax.lax.select_n(expand(choice, merged), merged, *replicas)
    # The anchor last: if it is on all devices, XLA then gathers one tensor and not all inputs.
    keep_anchor = expand(update.source == len(replicas), merged)
    merged = jax.lax.select(keep_anchor, anchor, merged)
    return merged.reshape(pretrained.shape)


def to_unit_shape(pretrained, finetuned, unit_view):
    """Reshape anchor and replicas to the unit view, in float32 or wider for the derivatives."""
    wide = [x.astype(compute_dtype(x.dtype)) for x in (pretrained, finetuned)]
    return wide[0].reshape(unit_view.view), wide[1].reshape((len(finetuned), *unit_view.view))


def cast(array, dtype):
    """Cast to a dtype; values outside a smaller range saturate instead of becoming infinite."""
    target, source = jnp.finfo(dtype), jnp.finfo(array.dtype)
    if float(target.max) < float(source.max):
        # bfloat16 cannot represent the largest float16: it would round up to 65536, infinity.
        array = array.astype(compute_dtype(array.dtype))
        low, high = (np.asarray(x, array.dtype) for x in (float(target.min), float(target.max)))
        array = jax.lax.clamp(low, array, high)
    return array.astype(dtype)
