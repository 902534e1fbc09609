"""The one reduction that everything needs: products of task vectors, summed to full accuracy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def inner(x, y, axes):
    """Sum of x * y over the given axes, accumulated in float64 and returned in the input's dtype.

    Elementwise products and a sum: a dot would be TF32 on GPUs and bfloat16 on TPUs. float64 for
    the accumulator alone, whatever `jax_enable_x64` says: how a backend orders a float32 sum is
    not ours to choose, and 10^8 terms one after the other lose 1 to 10 %.

    Args:
      x: [...] float32 or float64.
      y: the same shape and dtype.
      axes: tuple of axes to sum over; the tensor's own, so that a sharded tensor stays sharded.

    Returns:
      The sum, of the shape that is left.

    Example:
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> inner(x, x, (0,)).tolist()
      [10.0, 20.0]
    """
    with jax.enable_x64(True):
        wide = (jax.lax.convert_element_type(part, jnp.float64) for part in (x, y))
        total = jnp.sum(jax.lax.mul(*wide), axis=axes)
        return jax.lax.convert_element_type(total, x.dtype)


@inner.defjvp
def _inner_jvp(axes, primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    return inner(x, y, axes), jnp.sum(dx * y + x * dy, axis=axes)


def compute_dtype(*dtypes):
    """Dtype of task vectors: float32, or float64 where a weight is float64."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*dtypes))


def task_vectors(pretrained, finetuned):
    """d_i = w_i - w0, subtracted in `compute_dtype`: [...] and [N, ...] -> [N, ...]."""
    dtype = compute_dtype(pretrained.dtype, finetuned.dtype)
    return finetuned.astype(dtype) - pretrained.astype(dtype)[None]


@partial(jax.jit, static_argnames=("part",))
def gram_matrix(pretrained, finetuned, part):
    """G_ij = d_i . d_j of one tensor, for each of its units.

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
    deltas = task_vectors(pretrained, finetuned)
    deltas = deltas.reshape((len(deltas), *part.view))
    pairs = {}
    for i in range(len(deltas)):
        for j in range(i, len(deltas)):
            pairs[i, j] = pairs[j, i] = inner(deltas[i], deltas[j], part.axes)
    rows = range(len(deltas))
    return jnp.stack([jnp.stack([pairs[i, j] for j in rows]) for i in rows])
