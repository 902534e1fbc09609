"""Measures of models and points around them, for the analyses of the paper's section 2.

Angles, norms, distances and shells; the plane through three models (Figure 3); noise around a model
(Figure 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry, rules
from modelstock_jax.merging.engine import merge, total, unit_grams
from modelstock_jax.merging.gram import compute_dtype, in_float64
from modelstock_jax.merging.placement import (
    colocate_replicas,
    on_this_host,
    place_like,
    replicate,
    settled,
)
from modelstock_jax.merging.trees import (
    PyTree,
    is_float,
    pair_leaves,
    stack_replicas,
    to_array,
    to_arrays,
)
from modelstock_jax.merging.units import UnitFunction


def distance(a: PyTree, b: PyTree):
    """Return the L2 distance |a - b| of two models over all floating tensors, a scalar array.

    Example:
      >>> float(distance({"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}))
      5.0
    """
    return _first(distances(a, jax.tree.map(_with_axis, to_arrays(b, "b"))))


_first = jax.jit(lambda x: x[0])
_with_axis = jax.jit(lambda x: x[None])


def distances(center: PyTree, models: PyTree):
    """Return the L2 distance |w_i - center| of M models, over all floating tensors (Table 1).

    Args:
      center: a tree of arrays; the anchor, or the pseudo-center `mean_model(models)`
      models: the same tree with a leading axis M

    Returns:
      [M]

    Example:
      >>> distances({"w": jnp.zeros(2)}, {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}).tolist()
      [5.0, 1.0]
    """
    leaves = pair_leaves(center, models, 1)
    squares = [jax.device_put(np.zeros(leaves.num_replicas, np.float32))] + [
        replicate(settled(_squares(*colocate_replicas(w0, w))))
        for w0, w in zip(leaves.pretrained, leaves.finetuned, strict=True)
        if is_float(w0)
    ]
    return _sqrt(total(squares))


_sqrt = jax.jit(geometry.positive_sqrt)


@jax.jit
def _squares(center, models):
    """Return the squared distance of each model, [...] and [M, ...] -> [M]."""

    def squares(center, models):
        return jnp.stack([jnp.sum(jnp.square(model - center)) for model in models])

    return in_float64(squares)(center, models)


def mean_model(models: PyTree):
    """Return the mean over the leading axis of every floating tensor: the pseudo-center.

    See section 2.2 of the paper. The sum is in float32 (float64 for float64 weights), and the mean
    is rounded to the tensor's dtype. Tensors that are not floating are copied from the first model.

    Args:
      models: a tree of arrays [M, ...]

    Raises:
      UserError: a leaf without a leading axis, or that is not an array

    Example:
      >>> mean_model({"w": jnp.array([[3.0, 4.0], [1.0, 0.0]])})["w"].tolist()
      [2.0, 2.0]
    """
    models = to_arrays(models, "models")
    if any(w.ndim == 0 for w in jax.tree.leaves(models)):
        raise UserError("models must have a leading axis; pass stack_replicas([a, b])")
    return jax.tree.map(_mean, models)


@jax.jit
def _mean(w):
    wide = compute_dtype(w.dtype)
    return jnp.mean(w, axis=0, dtype=wide).astype(w.dtype) if is_float(w) else w[0]


def norms(
    pretrained: PyTree, models: PyTree, *, unit: str | UnitFunction = "tensor", **unit_options: Any
):
    """Return the norms |d_i| of the task vectors of M models (Figure 2).

    Args:
      pretrained: w0, a tree of arrays
      models: the same tree with a leading axis M
      unit: merge unit
      **unit_options: `num_heads`, `filter_axis` and `scan_axes`, as in `model_stock`

    Returns:
      a tree of [M, *unit shape]

    Example:
      >>> norms({"w": jnp.zeros(2)}, {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])})["w"].tolist()
      [5.0, 1.0]
    """
    grams = unit_grams(pretrained, models, unit=unit, **unit_options)
    return jax.tree.map(_norms, grams)


@jax.jit
def _norms(gram):
    return geometry.positive_sqrt(geometry.squared_norms(gram))


def cosines(
    pretrained: PyTree, models: PyTree, *, unit: str | UnitFunction = "tensor", **unit_options: Any
):
    """Return the cosines between the task vectors of all pairs of M models (Figure 2).

    Args:
      pretrained: w0, a tree of arrays
      models: the same tree with a leading axis M
      unit: merge unit
      **unit_options: `num_heads`, `filter_axis` and `scan_axes`, as in `model_stock`

    Returns:
      A tree of [M, M, *unit shape]; `COSINE_UNDEFINED` for a model that did not change.
      `geometry.angle` converts cosines to degrees.

    Example:
      >>> pairs = cosines({"w": jnp.zeros(2)}, {"w": jnp.array([[1.0, 0.0], [1.0, 1.0]])})
      >>> round(float(geometry.angle(pairs["w"][0, 1])), 3)
      45.0
    """
    return jax.tree.map(_cosines, unit_grams(pretrained, models, unit=unit, **unit_options))


@jax.jit
def _cosines(gram):
    active = geometry.is_moved(gram)
    norm = jnp.sqrt(jnp.where(active, geometry.squared_norms(gram), 1.0))
    pairs = jnp.clip(gram / norm[:, None] / norm[None], -1.0, 1.0)
    return jnp.where(active[:, None] & active[None], pairs, geometry.COSINE_UNDEFINED)


def thin_shell(
    pretrained: PyTree,
    models: PyTree,
    *,
    unit: str | UnitFunction | None = None,
    **unit_options: Any,
):
    """Return radii and angles of M >= 4 models about their center (section 2.1).

    See `geometry.shell` for the estimates.

    Args:
      pretrained: w0, a tree of arrays
      models: the same tree with a leading axis M
      unit: merge unit; None for the complete model
      **unit_options: `num_heads`, `filter_axis` and `scan_axes`, as in `model_stock`

    Returns:
      a `Shell` of the complete model, or a tree with one `Shell` per tensor

    Example:
      >>> noise = {"w": jnp.eye(4, 5) + 2 * jnp.eye(5)[4:]}
      >>> [round(float(r), 3) for r in thin_shell({"w": jnp.zeros(5)}, noise).radius]
      [1.0, 1.0, 1.0, 1.0]
    """
    shell = jax.jit(geometry.shell)
    if unit is None:
        return shell(total(jax.tree.leaves(unit_grams(pretrained, models))))
    return jax.tree.map(shell, unit_grams(pretrained, models, unit=unit, **unit_options))


class Plane(NamedTuple):
    """A plane through three models; see `plane_through`.

    Attributes:
      origin: the model at (0, 0)
      through: the other two models, [2, ...] per leaf
      axes: [2, 2], e_k = sum_j axes[k, j] (through_j - origin)
    """

    origin: PyTree
    through: Any
    axes: jax.Array


def plane_through(origin: PyTree, first: PyTree, second: PyTree) -> Plane:
    """Return the plane through three models.

    The paper's Figure 3 shows w0, one fine-tuned model and the mean of 50. Distances in the plane
    equal distances in weight space, over all floating tensors.

    Args:
      origin: the model at (0, 0)
      first: the model on the positive x axis
      second: the model with positive y

    Raises:
      UserError: three collinear models, or trees that differ

    Example:
      >>> o, a, b = ({"w": jnp.array(w)} for w in ([1.0, 1.0], [3.0, 1.0], [2.0, 5.0]))
      >>> plane = plane_through(o, a, b)
      >>> plane_coordinates(plane, stack_replicas([o, a, b])).tolist()
      [[0.0, 0.0], [2.0, 0.0], [1.0, 4.0]]
      >>> plane_point(plane, 1.0, 4.0)["w"].tolist()
      [2.0, 5.0]
    """
    through = stack_replicas([first, second])
    axes = _axes(_total_gram(origin, through))
    if on_this_host(axes) and not (np.diag(jax.device_get(axes)) > 0).all():
        raise UserError("the three models are collinear or two are equal; a plane needs others")
    return Plane(origin, through, axes)


def plane_coordinates(plane: Plane, models: PyTree) -> jax.Array:
    """Return the coordinates [M, 2] of M models ([M, ...] per leaf), projected onto the plane."""
    joined = jax.tree.map(_join, plane.origin, plane.through, models)
    return _project(_total_gram(plane.origin, joined), plane.axes)


def _join(origin, through, models):
    """Return all models as one array [2 + M, ...], after moving their replicas together."""
    origin = to_array(origin)
    through = colocate_replicas(origin, to_array(through))[1]
    models = colocate_replicas(origin, to_array(models))[1]
    return _concatenate(through, place_like(models, through))


_concatenate = jax.jit(lambda *arrays: jnp.concatenate(arrays))


@jax.jit
def _project(gram, axes):
    return jnp.sum(axes[:, :, None] * gram[:2, 2:][None], axis=1).T


def plane_point(plane: Plane, x: Any, y: Any) -> PyTree:
    """Return the model at (x, y). For a grid, use it under jit and vmap."""
    coefficients = _coefficients(plane.axes, to_array(x), to_array(y))
    return merge(rules.fixed_coefficients, plane.origin, plane.through, shared=(coefficients,))[0]


@jax.jit
def _coefficients(axes, x, y):
    return x.astype(axes.dtype) * axes[0] + y.astype(axes.dtype) * axes[1]


def random_point(
    key: jax.Array,
    center: PyTree,
    distances: Any,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
) -> PyTree:
    """Return a random model at given distances from a center (Observation 4, Figure 4).

    The model is the center plus Gaussian noise, scaled in every merge unit to the given distance.
    The paper's noise has the standard deviation of fine-tuned weights about the center. This
    corresponds to their mean distance,
    `jax.tree.map(lambda d: d.mean(0), norms(center, models, unit=unit))`.

    Args:
      key: a `jax.random` key
      center: a tree of arrays
      distances: the same tree with arrays of the shapes of the units
      unit: as in `model_stock`
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`

    Returns:
      A tree in the dtypes of the center. Arrays that are not floating are copied from the center.

    Example:
      >>> point = random_point(jax.random.key(0), {"w": jnp.ones(5)}, {"w": jnp.array(2.0)})
      >>> round(float(jnp.linalg.norm(point["w"] - 1)), 4)
      2.0
    """
    center = to_arrays(center, "center")
    return merge(
        rules.rescale_to_norm,
        center,
        _add_noise(key, center),
        distances,
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        scan_axes=scan_axes,
        min_replicas=1,
    )[0]


@jax.jit
def _add_noise(key, center):
    """Return the center plus Gaussian noise, with a leading axis of length 1."""
    leaves, treedef = jax.tree.flatten(center)
    keys = jax.random.split(key, len(leaves))

    def add_noise(w, key):
        if not is_float(w):
            return w[None]
        return (w + jax.random.normal(key, w.shape, compute_dtype(w.dtype)).astype(w.dtype))[None]

    return treedef.unflatten([add_noise(w, k) for w, k in zip(leaves, keys, strict=True)])


def _total_gram(origin: PyTree, models: PyTree) -> jax.Array:
    """Return the Gram matrix of the task vectors from the origin over all tensors, [M, M]."""
    return total(jax.tree.leaves(unit_grams(origin, models)))


@jax.jit
@in_float64
def _axes(gram):
    """Return Gram-Schmidt coefficients of two vectors; zeros if they are dependent."""
    length = jnp.sqrt(gram[0, 0])
    height_square = gram[1, 1] - gram[0, 1] ** 2 / jnp.where(length > 0, gram[0, 0], 1.0)
    # Below the rounding error of float32 products, no second direction remains.
    independent = (height_square > 1e-6 * gram[1, 1]) & (length > 0)
    height = jnp.sqrt(jnp.where(independent, height_square, 1.0))
    inverse = 1.0 / jnp.where(length > 0, length, 1.0)
    slope = gram[0, 1] * inverse**2
    axes = jnp.stack(
        [jnp.stack([inverse, jnp.zeros_like(inverse)]), jnp.stack([-slope / height, 1.0 / height])]
    )
    return jnp.where(independent, axes, 0.0)


# `jax.export` can serialize functions that return a plane.
export.register_namedtuple_serialization(Plane, serialized_name="modelstock_jax.Plane")
