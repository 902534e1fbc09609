"""TIES on the weights of a unit: trim, elect signs, mean of the elements that agree."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from modelstock_jax.merging import rules
from modelstock_jax.merging.engine import or_anchor
from modelstock_jax.merging.geometry import namespace
from modelstock_jax.merging.gram import cast, in_float64, to_unit_shape


def trim(density, scale, names, pretrained, finetuned, updates, views, dtype) -> list:
    """Return the merged tensors of a unit; an `engine.Combine` after two arguments.

    Args:
      density: fraction of elements to keep, [] or [N]
      scale: `exact` number, []
      names: not used
      pretrained: the unit's tensors of the anchor, each [...]
      finetuned: the unit's tensors of the replicas, each [N, ...]
      updates: packed update of each tensor's unit; only its `source` is used
      views: a `units.UnitView` per tensor
      dtype: dtype of the result; None for the anchor's
    """
    del names
    count = sum(view.count for view in views)
    rank = tuple(rules.ties_ranks(density, count, len(finetuned[0])))
    if min(rank) < count:
        threshold = trim_threshold(pretrained, finetuned, views=tuple(views), rank=rank)
    else:
        threshold = jnp.zeros((2, len(rank), *views[0].unit_shape), jnp.uint32)
    return [
        add_trimmed(w0, w, threshold, scale, update, unit_view=view, dtype=dtype)
        for w0, w, update, view in zip(pretrained, finetuned, updates, views, strict=True)
    ]


def has_elected_sign(terms):
    """Return whether each element has the sign of the sum of all, [N, ...] bool (TIES).

    Args:
      terms: [N, ...], NumPy or JAX; the sign of a sum of 0 is positive, an element of 0 has none
    """
    xp = namespace(terms)
    return xp.where(terms.sum(axis=0)[None] >= 0, terms > 0, terms < 0)


def disjoint_mean(trimmed):
    """Elect the sign of the sum, and return the mean of the elements with this sign (TIES).

        gamma = sgn(sum_i trimmed_i),    mean of { trimmed_i : sgn(trimmed_i) = gamma }

    Args:
      trimmed: trimmed task vectors, [N, ...], NumPy or JAX

    Returns:
      [...]; 0 where all elements are 0. Where nonzero elements sum to 0, the positive sign is
      elected.

    Example:
      >>> disjoint_mean(np.array([[2.0, -1.0], [1.0, 3.0], [-1.0, 1.0]])).tolist()
      [1.5, 2.0]
    """
    xp = namespace(trimmed)
    agree = has_elected_sign(trimmed)
    count = agree.sum(axis=0).astype(trimmed.dtype)
    return xp.where(agree, trimmed, 0.0).sum(axis=0) / xp.maximum(count, 1.0)


@partial(jax.jit, static_argnames=("views", "rank"))
def trim_threshold(pretrained: list, finetuned: list, *, views: tuple, rank: tuple[int, ...]):
    """Return the rank-th largest magnitude of each task vector in a unit (TIES), as its order key.

    A bisection on the 63 bits of the key makes 63 counts over the tensors' own axes. It is exact,
    and unlike a sort it neither gathers nor copies a sharded tensor.

    Args:
      pretrained: the unit's tensors of the anchor, each [...]
      finetuned: the unit's tensors of the replicas, each [N, ...]
      views: a `units.UnitView` per tensor
      rank: for each replica, which magnitude, counted from 1

    Returns:
      [2, N, *unit shape] uint32: the upper and lower halves of the key, see `magnitude`. Halves,
      because callers may have disabled 64-bit types.
    """
    min_count = np.array(rank, np.float64).reshape((-1,) + (1,) * len(views[0].unit_shape))

    def set_bit(step, threshold):
        trial = threshold | (jnp.uint64(1 << 62) >> step.astype(jnp.uint64))
        count = sum(
            view.swap(
                jnp.sum(
                    magnitude(*to_unit_shape(w0, w, view)) >= _expand_to_unit(trial, view),
                    axis=tuple(1 + axis for axis in view.axes),
                    dtype=jnp.float64,  # counts up to 2^53, int32 only up to 2^31
                )
            )
            for w0, w, view in zip(pretrained, finetuned, views, strict=True)
        )
        return jnp.where(count >= min_count, trial, threshold)

    with jax.enable_x64(True):
        zeros = jnp.zeros((len(finetuned[0]), *views[0].unit_shape), jnp.uint64)
        # The first step is outside of the loop: it makes the type under shard_map that of the data.
        first = set_bit(jnp.asarray(0), zeros)
        threshold = lax.fori_loop(1, 63, lambda *x: set_bit(jnp.asarray(x[0]), x[1]), first)
        return jnp.stack([threshold >> 32, threshold]).astype(jnp.uint32)


@partial(jax.jit, static_argnames=("unit_view", "dtype"))
def add_trimmed(pretrained, finetuned, threshold, scale, packed, *, unit_view, dtype):
    """Return w0 + scale * disjoint mean of the trimmed d_i of one tensor, rounded once to `dtype`.

    Args:
      pretrained: w0, [...]
      finetuned: [N, ...]
      threshold: key of the smallest magnitude to keep, from `trim_threshold`
      scale: `exact` number, []
      packed: update of the tensor's units; only its `source` is used
      unit_view: how the tensor is split into units
      dtype: dtype of the result; None for the anchor's
    """
    dtype = pretrained.dtype if dtype is None else jnp.dtype(dtype)
    anchor, tuned = to_unit_shape(pretrained, finetuned, unit_view)
    with jax.enable_x64(True):
        upper, lower = threshold.astype(jnp.uint64)
        kept = magnitude(anchor, tuned) >= _expand_to_unit(upper << 32 | lower, unit_view)

    def combine(anchor, tuned, kept, scale):
        trimmed = jnp.where(kept, tuned - anchor[None], 0.0)
        return cast(anchor + (scale.value + scale.rest) * disjoint_mean(trimmed), dtype)

    merged = in_float64(combine)(anchor, tuned, kept, scale).astype(dtype)
    return or_anchor(merged, pretrained, packed, len(finetuned), unit_view)


def magnitude(anchor, tuned):
    """Return integers in the order of |w_i - w0|, [N, ...] uint64 below 2^63.

    The difference is in float64. A float32 difference makes elements tie that are not equal. Call
    this under `jax.enable_x64(True)`.
    """
    deltas = tuned.astype(jnp.float64) - anchor.astype(jnp.float64)[None]
    deltas = jnp.abs(lax.stop_gradient(deltas))
    return lax.platform_dependent(deltas, default=_bits, tpu=_bits_of_float32_pair)


def _bits(values):
    return lax.bitcast_convert_type(values, jnp.uint64)


def _bits_of_float32_pair(values):
    """Return keys without a 64-bit bitcast, which TPUs lack: they emulate float64 by two float32.

    The upper half of a key has the bits of the value rounded to float32, the lower half those of
    the remainder, mapped to unsigned integers in the order of the remainders.
    """
    rounded = lax.optimization_barrier(values.astype(jnp.float32))
    rest = (values - rounded.astype(jnp.float64)).astype(jnp.float32)
    upper, lower = (lax.bitcast_convert_type(x, jnp.uint32) for x in (rounded, rest))
    sign = jnp.uint32(1 << 31)
    lower = jnp.where(lower >= sign, ~lower, lower | sign)
    return upper.astype(jnp.uint64) << 32 | lower.astype(jnp.uint64)


def _expand_to_unit(values, unit_view):
    return jnp.expand_dims(unit_view.swap(values), tuple(1 + axis for axis in unit_view.axes))
