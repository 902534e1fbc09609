"""Measures of any models, and points around them, for the analyzes of the paper's section 2.

Angles, norms, distances and shells; the plane through three models, and noise around one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry, rules
from modelstock_jax.merging.engine import merge, on_this_host, unit_grams
from modelstock_jax.merging.gram import PyTree, in_float64, is_float, pair_leaves, stack_replicas


def distance(a: PyTree, b: PyTree):
    """Distance |a - b| of two models over all floating tensors, a scalar array.

    Example:
      >>> float(distance({"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}))
      5.0
    """
    return distances(a, jax.tree.map(lambda x: jnp.asarray(x)[None], b))[0]


def distances(center: PyTree, models: PyTree):
    """Distance |w_i - center| of each of M models, over all floating tensors (Table 1).

    Args:
      center: a tree of arrays; the anchor, or the pseudo-center `mean_model(models)`.
      models: the same tree with a leading axis M.

    Returns:
      [M].

    Example:
      >>> distances({"w": jnp.zeros(2)}, {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}).tolist()
      [5.0, 1.0]
    """
    leaves = pair_leaves(center, models, 1)
    total = sum(
        _squares(w0, w)
        for w0, w in zip(leaves.pretrained, leaves.finetuned, strict=True)
        if is_float(w0)
    )
    return geometry.positive_sqrt(jnp.broadcast_to(total, leaves.num_replicas))


@jax.jit
def _squares(center, models):
    """Squared distance of each model, [...] and [M, ...] -> [M]."""

    def squares(center, models):
        return jnp.stack([jnp.sum(jnp.square(model - center)) for model in models])

    return in_float64(squares)(center, models)


def mean_model(models: PyTree):
    """Mean over the leading axis of every floating tensor; the first model's where not floating.

    The pseudo-center of section 2.2. Accumulated in float32, rounded to the tensors' dtype.

    Example:
      >>> mean_model({"w": jnp.array([[3.0, 4.0], [1.0, 0.0]])})["w"].tolist()
      [2.0, 2.0]
    """

    def mean(w):
        w = jnp.asarray(w)
        return (
            jnp.mean(w, axis=0, dtype=jnp.promote_types(w.dtype, jnp.float32)).astype(w.dtype)
            if is_float(w)
            else w[0]
        )

    return jax.tree.map(mean, models)


def norms(pretrained: PyTree, models: PyTree, unit: str = "tensor", **how: Any):
    """Norms |d_i| of the task vectors of M models (Figure 2): a tree of [M, *unit shape].

    `how` is `num_heads` and `filter_axis`, as `model_stock`.

    Example:
      >>> norms({"w": jnp.zeros(2)}, {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])})["w"].tolist()
      [5.0, 1.0]
    """
    grams = unit_grams(pretrained, models, unit=unit, **how)
    return jax.tree.map(lambda g: geometry.positive_sqrt(geometry.squared_norms(g)), grams)


def cosines(pretrained: PyTree, models: PyTree, unit: str = "tensor", **how: Any):
    """Cosines between the task vectors of all pairs of M models (Figure 2).

    Args:
      pretrained: w0, a tree of arrays.
      models: the same tree with a leading axis M.
      unit: merge unit.
      **how: `num_heads` and `filter_axis`, as `model_stock`.

    Returns:
      A tree of [M, M, *unit shape]; `COSINE_UNDEFINED` for a model that did not move.
      `geometry.angle` turns cosines into degrees.

    Example:
      >>> pairs = cosines({"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [1.0, 1.0]])})
      >>> round(float(geometry.angle(pairs["w"][0, 1])), 3)
      45.0
    """

    def cosine(gram):
        active = geometry.is_moved(gram)
        size = jnp.sqrt(jnp.where(active, geometry.squared_norms(gram), 1.0))
        pairs = jnp.clip(gram / size[:, None] / size[None], -1.0, 1.0)
        return jnp.where(active[:, None] & active[None], pairs, geometry.COSINE_UNDEFINED)

    return jax.tree.map(cosine, unit_grams(pretrained, models, unit=unit, **how))


def thin_shell(pretrained: PyTree, models: PyTree, unit: str | None = None, **how: Any):
    """Radii and angles of M >= 4 models about their center (section 2.1): see `geometry.shell`.

    Args:
      pretrained: w0, a tree of arrays.
      models: the same tree with a leading axis M.
      unit: merge unit; None for the whole model.
      **how: `num_heads` and `filter_axis`, as `model_stock`.

    Returns:
      A `Shell` of the whole model, or a tree of them.

    Example:
      >>> noise = {"w": jnp.eye(4, 5) + 2 * jnp.eye(5)[4:]}
      >>> [round(float(r), 3) for r in thin_shell({"w": jnp.zeros(5)}, noise).radius]
      [1.0, 1.0, 1.0, 1.0]
    """
    measure = jax.jit(geometry.shell)
    if unit is None:
        return measure(sum(jax.tree.leaves(unit_grams(pretrained, models))))
    return jax.tree.map(measure, unit_grams(pretrained, models, unit=unit, **how))


# Points around models in weight space: the plane through three (Figure 3), noise (Figure 4).


class Plane(NamedTuple):
    """The plane through three models, with orthonormal axes; made by `plane_through`."""

    origin: PyTree
    through: Any  # the other two, [2, ...] a leaf
    axes: jax.Array  # [2, 2], e_k = sum_j axes[k, j] (through_j - origin)


def plane_through(origin: PyTree, first: PyTree, second: PyTree) -> Plane:
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
    axes = in_float64(_axes)(_total_gram(origin, through))
    if on_this_host(axes) and not bool((jnp.diag(axes) > 0).all()):
        raise UserError("the three models lie on one line, or two are the same: they span no plane")
    return Plane(origin, through, axes)


def plane_coordinates(plane: Plane, models: PyTree) -> jax.Array:
    """Coordinates [M, 2] of M models ([M, ...] a leaf), projected onto the plane."""
    both = jax.tree.map(
        lambda a, b: jnp.concatenate([jnp.asarray(a), jnp.asarray(b)]), plane.through, models
    )
    products = _total_gram(plane.origin, both)[:2, 2:]
    return jnp.sum(plane.axes[:, :, None] * products[None], axis=1).T


def plane_point(plane: Plane, x: Any, y: Any) -> Any:
    """The model at (x, y); under jit and vmap too, for a grid."""
    shares = jnp.stack([jnp.asarray(v, plane.axes.dtype) for v in (x, y)])
    shares = jnp.sum(shares[:, None] * plane.axes, axis=0)
    return merge(rules.fixed_coefficients, plane.origin, plane.through, shared=(shares,))[0]


def random_point(
    key: jax.Array,
    center: PyTree,
    distances: Any,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
) -> Any:
    """A random model at given distances from a center, unit by unit (Observation 4, Figure 4).

    The center plus Gaussian noise, brought in every merge unit to the distance asked for. The
    paper gives its noise the standard deviation of fine-tuned weights about the center; that is
    their mean distance, `jax.tree.map(lambda d: d.mean(0), norms(center, models, unit))`.

    Args:
      key: of `jax.random`.
      center: a tree of arrays.
      distances: the same tree with arrays of the units' shapes.
      unit: as `model_stock`.
      num_heads: as `model_stock`.
      filter_axis: as `model_stock`.

    Returns:
      A tree in the dtypes of the center; what is not floating is the center's.

    Example:
      >>> point = random_point(jax.random.key(0), {"w": jnp.ones(5)}, {"w": jnp.array(2.0)})
      >>> round(float(jnp.linalg.norm(point["w"] - 1)), 4)
      2.0
    """
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, center))
    keys = jax.random.split(key, len(leaves))
    noisy = [
        (w + jax.random.normal(k, w.shape).astype(w.dtype) if is_float(w) else w)[None]
        for k, w in zip(keys, leaves, strict=True)
    ]
    return merge(
        rules.rescale_to_norm,
        treedef.unflatten(leaves),
        treedef.unflatten(noisy),
        distances,
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        min_replicas=1,
    )[0]


def _total_gram(origin: PyTree, models: PyTree) -> jax.Array:
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
    axes = jnp.stack(
        [jnp.stack([one, jnp.zeros_like(one)]), jnp.stack([-along / height, 1.0 / height])]
    )
    return jnp.where(clear, axes, 0.0)
