"""Points around models in weight space: the plane through three (Figure 3), noise (Figure 4)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging import rules
from modelstock_jax.merging.engine import merge, unit_grams
from modelstock_jax.merging.precision import widened
from modelstock_jax.merging.replicas import is_float, stack_replicas
from modelstock_jax.merging.solver import on_this_host


class Plane(NamedTuple):
    """The plane through three models, with orthonormal axes; made by `plane_through`."""

    origin: Any
    through: Any  # the other two, [2, ...] a leaf
    axes: jax.Array  # [2, 2], e_k = sum_j axes[k, j] (through_j - origin)


def plane_through(origin: Any, first: Any, second: Any) -> Plane:
    """The plane of three models: origin at (0, 0), `first` on the positive x axis, `second` above.

    Figure 3 has w0, one fine-tuned model and the mean of 50. Distances in the plane are those of
    weight space, over all floating tensors.

    Raises:
      UserError: three models on one line, or trees that differ.

    Example:
      >>> o, a, b = ({"w": jnp.array(w)} for w in ([1.0, 1.0], [3.0, 1.0], [2.0, 5.0]))
      >>> plane = plane_through(o, a, b)
      >>> plane_coordinates(plane, stack_replicas([o, a, b])).tolist()
      [[0.0, 0.0], [2.0, 0.0], [1.0, 4.0]]
      >>> plane_point(plane, 1.0, 4.0)["w"].tolist()
      [2.0, 5.0]
    """
    through = stack_replicas([first, second])
    axes = widened(_axes)(_total_gram(origin, through))
    if on_this_host(axes) and not bool((jnp.diag(axes) > 0).all()):
        raise UserError("the three models lie on one line, or two are the same: they span no plane")
    return Plane(origin, through, axes)


def plane_coordinates(plane: Plane, models: Any) -> jax.Array:
    """Coordinates [M, 2] of M models ([M, ...] a leaf), projected onto the plane."""
    both = jax.tree.map(
        lambda a, b: jnp.concatenate([jnp.asarray(a), jnp.asarray(b)]), plane.through, models)
    products = _total_gram(plane.origin, both)[:2, 2:]
    return jnp.sum(plane.axes[:, :, None] * products[None], axis=1).T


def plane_point(plane: Plane, x: Any, y: Any) -> Any:
    """The model at (x, y); under jit and vmap too, for a grid."""
    shares = jnp.stack([jnp.asarray(v, plane.axes.dtype) for v in (x, y)])
    shares = jnp.sum(shares[:, None] * plane.axes, axis=0)
    return merge(rules.given_shares, plane.origin, plane.through, shared=(shares,))[0]


def random_point(
    key: jax.Array,
    centre: Any,
    distances: Any,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
) -> Any:
    """A random model at given distances from a centre, unit by unit (Observation 4, Figure 4).

    The centre plus Gaussian noise, brought in every merge unit to the distance asked for. The
    paper gives its noise the standard deviation of fine-tuned weights about the centre; that is
    their mean distance, `jax.tree.map(lambda d: d.mean(0), norms(centre, models, unit))`.

    Args:
      key: of `jax.random`.
      centre: a tree of arrays.
      distances: the same tree with arrays of the units' shapes.
      unit: as `model_stock`.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.

    Returns:
      A tree in the dtypes of the centre; what is not floating is the centre's.

    Example:
      >>> point = random_point(jax.random.key(0), {"w": jnp.ones(5)}, {"w": jnp.array(2.0)})
      >>> round(float(jnp.linalg.norm(point["w"] - 1)), 4)
      2.0
    """
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, centre))
    keys = jax.random.split(key, len(leaves))
    noisy = [
        (w + jax.random.normal(k, w.shape).astype(w.dtype) if is_float(w) else w)[None]
        for k, w in zip(keys, leaves, strict=True)
    ]
    return merge(
        rules.at_length, treedef.unflatten(leaves), treedef.unflatten(noisy), distances,
        unit=unit, num_heads=num_heads, filter_axis=filter_axis, least=1,
    )[0]


def _total_gram(origin: Any, models: Any) -> jax.Array:
    """Products of the movements from the origin over all tensors, [M, M]."""
    return functools.reduce(jnp.add, jax.tree.leaves(unit_grams(origin, models)))


def _axes(gram):
    """Gram-Schmidt of two vectors, as coefficients; a row of zeros for one that is missing."""
    length = jnp.sqrt(gram[0, 0])
    height_square = gram[1, 1] - gram[0, 1] ** 2 / jnp.where(length > 0, gram[0, 0], 1.0)
    # Below the rounding of float32 products there is no direction left.
    clear = (height_square > 1e-6 * gram[1, 1]) & (length > 0)
    height = jnp.sqrt(jnp.where(clear, height_square, 1.0))
    one = 1.0 / jnp.where(length > 0, length, 1.0)
    along = gram[0, 1] * one**2
    axes = jnp.stack([jnp.stack([one, jnp.zeros_like(one)]),
                      jnp.stack([-along / height, 1.0 / height])])
    return jnp.where(clear, axes, 0.0)
