"""The one reduction that everything needs: products of task vectors, summed in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.merging.anchor_rounding import half_ulp
from modelstock_jax.merging.precision import compute_dtype, widened

# Sums that are made in one pass over the tensors: all of up to four replicas'.
_SUMS = 10


def gram_matrix(pretrained, finetuned, part):
    """G_ij = d_i . d_j of one tensor, for each of its units.

    Elementwise products and one sum over the tensor's own axes: a dot would be TF32 on GPUs and
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
    def products(anchor, tuned):
        deltas = tuned - anchor[None]
        return jnp.sum(deltas[:, None] * deltas[None], axis=tuple(2 + axis for axis in part.axes))

    def in_one_pass(anchor, tuned):
        deltas = [replica - anchor for replica in tuned]
        rows = range(len(deltas))
        pairs = [(i, j) for i in rows for j in rows[i:]]
        sums = []
        for first in range(0, len(pairs), _SUMS):
            terms = [deltas[i] * deltas[j] for i, j in pairs[first : first + _SUMS]]
            zeros = [np.zeros((), anchor.dtype)] * len(terms)
            sums += jax.lax.reduce(terms, zeros, _add_each, part.axes)
        place = dict(zip(pairs, sums, strict=True))
        return jnp.stack([jnp.stack([place[min(i, j), max(i, j)] for j in rows]) for i in rows])

    def by_platform(anchor, tuned):
        # On a TPU float64 is emulated, and of reductions the plain ones are known to be.
        return jax.lax.platform_dependent(anchor, tuned, default=in_one_pass, tpu=products)

    seen = seen_by_unit(pretrained, finetuned, part)
    return widened(by_platform, derivative_of=products)(*seen)


def rounding_energy(pretrained, part):
    """Expected squared rounding error of one tensor of the anchor, for each of its units.

        E = sum of (half ulp)^2 / 3

    Args:
      pretrained: w0, [...], any floating dtype.
      part: `units.Part`, which says how the tensor is cut into units.

    Returns:
      [*unit shape], float32, without derivatives.

    Example:
      >>> from modelstock_jax.merging.units import Part
      >>> w0 = jnp.ones(3, jnp.bfloat16)  # an ulp is 2^-7
      >>> float(rounding_energy(w0, Part("w", (3,), (0,)))) == 2.0**-16
      True
    """
    halves = half_ulp(jax.lax.stop_gradient(pretrained)).reshape(part.view)
    return widened(lambda half: jnp.sum(half * half, axis=part.axes) / 3.0)(halves)


def _add_each(left, right):
    return [a + b for a, b in zip(left, right, strict=True)]


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
    # Else a compiler finds the Gram matrix's task vectors here again, and keeps those of the whole
    # model in float64 from there to here.
    finetuned = jax.lax.optimization_barrier(finetuned)

    def spread(values):
        return jnp.expand_dims(values, part.axes)

    def combine(anchor, tuned, coefficient):
        deltas = [replica - anchor for replica in tuned]
        moved = sum(spread(a) * d for a, d in zip(coefficient, deltas, strict=True))
        return cast(anchor + moved, dtype)

    merged = widened(combine)(*seen_by_unit(pretrained, finetuned, part), coefficient).astype(dtype)
    for chosen, replica in zip(exact, finetuned, strict=True):
        merged = jnp.where(spread(chosen), cast(replica, dtype).reshape(part.view), merged)
    anchor = cast(pretrained, dtype).reshape(part.view)
    return jnp.where(spread(hold), anchor, merged).reshape(pretrained.shape)


def seen_by_unit(pretrained, finetuned, part):
    """Anchor and replicas as the unit sees them, float32 at least (derivatives are in that)."""
    wide = [x.astype(compute_dtype(x.dtype)) for x in (pretrained, finetuned)]
    return wide[0].reshape(part.view), wide[1].reshape((len(finetuned), *part.view))


def cast(array, dtype):
    """To a dtype of smaller range by saturation: an overflow would be a non-finite weight."""
    limits, own = jnp.finfo(dtype), jnp.finfo(array.dtype)
    if float(limits.max) < float(own.max):
        array = jnp.clip(array, float(limits.min), float(limits.max))
    return array.astype(dtype)
