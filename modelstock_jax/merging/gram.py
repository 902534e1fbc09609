"""The one reduction that everything needs: products of task vectors, summed in float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from modelstock_jax.merging.precision import widened


@partial(jax.jit, static_argnames=("part",))
def gram_matrix(pretrained, finetuned, part):
    """G_ij = d_i . d_j of one tensor, for each of its units.

    Elementwise products and sums over the tensor's own axes: a dot would be TF32 on GPUs and
    bfloat16 on TPUs, and to ravel a sharded tensor would gather it.

    Args:
      pretrained: w0, [...], any floating dtype.
      finetuned: [N, ...].
      part: `units.Part`, which says how the tensor is cut into units.

    Returns:
      [N, N, *unit shape], float32 (float64 for float64 weights).

    Example:
      >>> from modelstock_jax.merging.units import Part
      >>> gram_matrix(jnp.zeros(2), jnp.eye(2), Part("w", (2,), (0,))).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    def products(pretrained, finetuned):
        anchor = pretrained.reshape(part.view)
        deltas = [replica.reshape(part.view) - anchor for replica in finetuned]
        rows = range(len(deltas))
        pairs = {
            (i, j): jnp.sum(deltas[i] * deltas[j], axis=part.axes) for i in rows for j in rows[i:]
        }
        return jnp.stack([jnp.stack([pairs[min(i, j), max(i, j)] for j in rows]) for i in rows])

    # Differentiated as it is evaluated in float32 or better: narrow dtypes are widened first.
    return widened(products)(_at_least_float32(pretrained), _at_least_float32(finetuned))


@partial(jax.jit, static_argnames=("part", "dtype"))
def add_task_vectors(pretrained, finetuned, coefficient, exact, hold, *, part, dtype):
    """w0 + sum_i a_i d_i of one tensor, rounded once to `dtype`.

    Where the answer is one of the inputs it is selected, not computed.

    Args:
      pretrained: w0, [...].
      finetuned: [N, ...].
      coefficient: a_i, [N, *unit shape].
      exact: [N, *unit shape] bool: this replica's weights.
      hold: [*unit shape] bool: the anchor's weights.
      part: `units.Part` of the tensor.
      dtype: of the result; None for the anchor's.

    Returns:
      [...].
    """
    dtype = pretrained.dtype if dtype is None else jnp.dtype(dtype)

    def spread(values):
        return jnp.broadcast_to(jnp.expand_dims(values, part.axes), part.view)

    def combine(anchor, tuned, coefficient, hold):
        # Before the product as well as after it: 0 * inf would reach the gradients.
        deltas = [jnp.where(spread(hold), 0.0, replica - anchor) for replica in tuned]
        moved = sum(spread(a) * d for a, d in zip(coefficient, deltas, strict=True))
        return cast(anchor + moved, dtype)

    anchor, tuned = pretrained.reshape(part.view), finetuned.reshape((-1, *part.view))
    wide = (_at_least_float32(anchor), _at_least_float32(tuned))
    merged = widened(combine)(*wide, coefficient, hold)
    merged = merged.astype(dtype)
    for chosen, replica in zip(exact, tuned, strict=True):
        merged = jnp.where(spread(chosen), cast(replica, dtype), merged)
    return jnp.where(spread(hold), cast(anchor, dtype), merged).reshape(pretrained.shape)


def cast(array, dtype):
    """To a dtype of smaller range by saturation: an overflow would be a non-finite weight."""
    limits, own = jnp.finfo(dtype), jnp.finfo(array.dtype)
    if float(limits.max) < float(own.max):
        array = jnp.clip(array, float(limits.min), float(limits.max))
    return array.astype(dtype)


def _at_least_float32(array):
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
