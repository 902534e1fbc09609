"""Methods for one fine-tuned model, or one merged model: MonoSoup and LiNeS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.merging import rules
from modelstock_jax.merging.attention_names import projections
from modelstock_jax.merging.baselines import finite_scale
from modelstock_jax.merging.engine import exact, merge, or_anchor
from modelstock_jax.merging.gram import cast, compute_dtype, in_float64
from modelstock_jax.merging.stats import Stats
from modelstock_jax.merging.stock import check_coefficient, no_third_position
from modelstock_jax.merging.trees import Leaves, PyTree, pair_leaves
from modelstock_jax.merging.units import UnitFunction, UnitView, assign, layer_axes, output_axis
from modelstock_jax.merging.update_scaling import (
    UNMOVED,
    layer_positions,
    monosoup_factors,
    singular_values,
)


@no_third_position
def monosoup(
    pretrained: PyTree,
    finetuned: PyTree,
    *,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Scale the singular directions of one model's update (MonoSoup, arXiv 2602.09689).

    For each matrix, with D = mean_i(w_i) - w0 = U S V^T and its effective rank r, the first
    k = ceil(r) directions get one factor and the others a smaller one:

        w = w0 + high D_(<= k) + low D_(> k)

    `update_scaling.monosoup_factors` has the formulas of k, high and low. If the effective rank is
    full, or 1, w is the fine-tuned model. Tensors of one axis, and matrices whose update is shorter
    than 10^-6 of w0, are those of the fine-tuned model too. A kernel of a convolution is the matrix
    [out, in * height * width].

    The matrix with the smaller side n is decomposed by the eigenvectors of D D^T or D^T D, in
    float64. The memory, for one tensor at a time, is about 2 copies of D and 3 arrays [n, n] in
    float64; sharded matrices are gathered.

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`, but N = 1 is allowed: the method as published. For a merged
        model, pass `stack_replicas([merged])`. N > 1 is the method on the mean of the replicas.
      unit: merge unit of the statistics; the merge does not depend on it
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`; the axis of the matrices' rows
      scan_axes: as in `model_stock`; each layer has its own matrix
      dtype: as in `model_stock`

    Returns:
      The merged tree, and `Stats` with ratio 1. The predicted distance of the merged weights is
      unknown: DISTANCE_UNDEFINED.

    Raises:
      UserError: as `model_stock`

    Example:
      >>> w = {"w": jnp.diag(jnp.array([1.0, 0.1, 0.01]))[None]}
      >>> merged, _ = monosoup({"w": jnp.zeros((3, 3))}, w)
      >>> [round(float(x), 6) for x in jnp.diag(merged["w"])]
      [0.989951, 0.098995, 0.0001]
    """
    leaves = pair_leaves(pretrained, finetuned, 1)
    matrices = _matrix_views(leaves, filter_axis, scan_axes)
    merged, stats, _ = merge(
        rules.ties_statistics,
        pretrained,
        finetuned,
        shared=(exact(1.0),),
        unit=unit,
        num_heads=num_heads,
        filter_axis=filter_axis,
        scan_axes=scan_axes,
        dtype=dtype,
        min_replicas=1,
        combine=partial(_scale_directions, matrices),
    )
    return merged, stats


class MatrixView(NamedTuple):
    """How a tensor is read as matrices.

    Attributes:
      layers: axis of stacked layers, or None
      rows: axis of the rows; the columns are all other axes
    """

    layers: int | None
    rows: int


def _matrix_views(
    leaves: Leaves, filter_axis: int, scan_axes: Mapping[str, int] | None
) -> dict[str, MatrixView]:
    """Return the view of each tensor that has at least two axes, besides that of its layers."""
    shapes = {
        name: tuple(jnp.shape(w0)) for name, w0 in zip(leaves.names, leaves.pretrained, strict=True)
    }
    axes = layer_axes(list(shapes.items()), scan_axes)
    of_layer = {
        name: shape if axis is None else shape[:axis] + shape[axis + 1 :]
        for (name, shape), axis in zip(shapes.items(), axes, strict=True)
    }
    found, views = projections(of_layer), {}
    for (name, shape), axis in zip(of_layer.items(), axes, strict=True):
        if len(shape) < 2:
            continue
        rows = output_axis(name, shape, filter_axis)
        # The kernel [D, H, head dim] of a query is the matrix [D, H * head dim].
        if (p := found.get(name)) and p.per_head and p.role != "out":
            rows = 0
        views[name] = MatrixView(axis, rows + (axis is not None and rows >= axis))
    return views


def _scale_directions(matrices, names, pretrained, finetuned, updates, views, dtype) -> list:
    return [
        _merge_matrix(
            w0, w, update, matrix=matrices.get(name), unit_view=view, dtype=dtype or w0.dtype
        )
        for name, w0, w, update, view in zip(
            names, pretrained, finetuned, updates, views, strict=True
        )
    ]


@partial(jax.jit, static_argnames=("matrix", "unit_view", "dtype"))
def _merge_matrix(
    pretrained, finetuned, packed, *, matrix: MatrixView | None, unit_view: UnitView, dtype
):
    """Return w0 + the scaled mean update of one tensor, rounded once to `dtype`."""

    def combine(anchor, tuned):
        update = tuned.mean(axis=0) - anchor
        if matrix is not None and update.size:
            update = scaled_update(anchor, update, matrix)
        return cast(anchor + update, dtype)

    wide = [x.astype(compute_dtype(x.dtype)) for x in (pretrained, finetuned)]
    merged = in_float64(combine)(*wide).astype(dtype)
    return or_anchor(merged, pretrained, packed, len(finetuned), unit_view)


def scaled_update(anchor, update, matrix: MatrixView):
    """Return the update high D_(<= k) + low D_(> k) of MonoSoup; its matrix is constant in grad.

    Args:
      anchor: w0, [...]
      update: D, [...]
      matrix: how both are read as matrices
    """
    front = (matrix.rows,) if matrix.layers is None else (matrix.layers, matrix.rows)
    order = [*front, *(axis for axis in range(update.ndim) if axis not in front)]
    num_layers = 1 if matrix.layers is None else update.shape[matrix.layers]

    def as_matrices(x):
        return x.transpose(order).reshape(num_layers, update.shape[matrix.rows], -1)

    d, w0 = as_matrices(update), as_matrices(jax.lax.stop_gradient(anchor))
    fixed = jax.lax.stop_gradient(d)
    columns = d.shape[1] > d.shape[2]  # The smaller side: of the columns or of the rows.
    side = 1 if columns else 2
    eigenvalues, vectors = jnp.linalg.eigh(_product(fixed, fixed, side, side))
    factors = monosoup_factors(singular_values(eigenvalues))
    high = jnp.where(factors.is_high[:, None], vectors, 0.0)
    projector = _product(high, high, 2, 2)
    first = _product(d, projector, 2, 1) if columns else _product(projector, d, 2, 1)
    low, high = (x[:, None, None] for x in (factors.low, factors.high))
    length, full_length = (jnp.sqrt((x * x).sum(axis=(1, 2), keepdims=True)) for x in (fixed, w0))
    scaled = jnp.where(length >= UNMOVED * full_length, low * d + (high - low) * first, d)
    shape = [update.shape[axis] for axis in order]
    return scaled.reshape(shape).transpose(np.argsort(order))


def _product(a, b, axis: int, other: int):
    """Return the matrix products of two stacks [L, ...] over an axis of each.

    `jnp.matmul` is not used: under vmap it loses 64-bit types where they are disabled outside.
    """
    return jax.lax.dot_general(a, b, (((axis,), (other,)), ((0,), (0,))))


def lines(
    pretrained: PyTree,
    finetuned: PyTree,
    alpha: Any,
    *,
    beta: Any = None,
    layer_of: Callable[[str], int] | None = None,
    unit: str | UnitFunction = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    scan_axes: Mapping[str, int] | None = None,
    dtype: Any = None,
) -> tuple[PyTree, Stats]:
    """Scale the update by a factor that grows with depth (LiNeS, arXiv 2410.17146).

    In layer l of L of a tower:

        w = w0 + (alpha + beta (l - 1) / (L - 1)) mean_i(d_i)

    A layer is a block, found by the number in the tensors' names or by `scan_axes`. Tensors before
    the blocks (embeddings) belong to the first layer, tensors after them (final norm, head) to the
    last.

    Args:
      pretrained: as in `model_stock`
      finetuned: as in `model_stock`, but N = 1 is allowed. For a merged model, pass
        `stack_replicas([merged])`.
      alpha: factor of the first layer; may be traced
      beta: what is added up to the last layer; None for 1 - alpha: the last layer is that of the
        fine-tuned model; may be traced
      layer_of: number of the layer of a tensor by name, for names without the numbers of blocks
      unit: merge unit of the statistics; all tensors of a unit must be in one layer
      num_heads: as in `model_stock`
      filter_axis: as in `model_stock`
      scan_axes: as in `model_stock`
      dtype: as in `model_stock`

    Returns:
      the merged tree, and `Stats` with this factor as ratio

    Raises:
      UserError: alpha or beta that is not a finite number; names without the number of a block; a
        unit with tensors of several layers; or an error of `model_stock`

    Example:
      >>> w0 = {"layers": [jnp.zeros(2)] * 3}
      >>> merged, _ = lines(w0, {"layers": [jnp.full((1, 2), 4.0)] * 3}, 0.5)
      >>> [float(w[0]) for w in merged["layers"]]
      [2.0, 3.0, 4.0]
    """
    if alpha is None:
        raise UserError("alpha must be a number, not None")
    check_coefficient("alpha", alpha)
    check_coefficient("beta", beta)
    options: dict[str, Any] = {"unit": unit, "num_heads": num_heads}
    options |= {"filter_axis": filter_axis, "scan_axes": scan_axes}
    index, last = _layers_of_units(pair_leaves(pretrained, finetuned, 1), layer_of, options)
    merged, stats, _ = merge(
        rules.ratio_by_layer,
        pretrained,
        finetuned,
        index,
        last,
        shared=tuple(
            finite_scale(x, name)
            for name, x in {"alpha": alpha, "beta": 1 - alpha if beta is None else beta}.items()
        ),
        min_replicas=1,
        dtype=dtype,
        **options,
    )
    return merged, stats


def _layers_of_units(
    leaves: Leaves, layer_of: Callable[[str], int] | None, options: Mapping[str, Any]
) -> tuple[PyTree, PyTree]:
    """Return l - 1 and L - 1 of each unit, as trees with the shapes of the units."""
    shapes = [tuple(jnp.shape(w0)) for w0 in leaves.pretrained]
    tensors = list(zip(leaves.names, shapes, strict=True))
    views = assign(tensors, **options)
    axes = layer_axes(tensors, options["scan_axes"])
    is_stacked = any(axis is not None for axis in axes)
    positions = layer_positions(tensors, layer_of, is_stacked=is_stacked)
    indices, lasts, layers = [], [], {}
    for (name, shape), view, axis, place in zip(tensors, views, axes, positions, strict=True):
        if axis is None:
            index, last = np.full(view.unit_shape, place.index), place.last
        else:
            index, last = _index_in_stack(shape, axis, view), max(shape[axis] - 1, 1)
        other, *same = layers.setdefault(view.key, (name, index, last))
        if last != same[1] or not np.array_equal(index, same[0]):
            raise UserError(
                f"LiNeS: unit {view.key!r} joins tensors of different layers, {other} and {name}; "
                "use unit='tensor'"
            )
        indices.append(index.astype(np.float32))
        lasts.append(np.full(view.unit_shape, last, np.float32))
    return leaves.treedef.unflatten(indices), leaves.treedef.unflatten(lasts)


def _index_in_stack(shape: tuple[int, ...], axis: int, view: UnitView) -> np.ndarray:
    """Return the index of the layer of each unit of a tensor that stacks layers."""
    one = [1] * len(shape)
    one[axis] = shape[axis]
    # A view with strides of 0: it needs no memory.
    index = np.broadcast_to(np.arange(shape[axis]).reshape(one), shape).reshape(view.view)
    chosen = tuple(0 if k in view.axes else slice(None) for k in range(index.ndim))
    return view.swap(index[chosen])
