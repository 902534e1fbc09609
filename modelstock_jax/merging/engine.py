"""The engine of every merge: Gram matrices, coefficients a_i, then w0 + sum_i a_i d_i.

A merge method is a rule that maps the Gram matrix of a unit to a `UnitSolution`. A method whose
result is not a sum of task vectors also has a `Combine` function. The engine handles everything
else: merge units, dtypes, tensors that are copied, and non-finite weights, which never reach the
merged weights.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry, units
from modelstock_jax.merging.anchor_rounding import is_coarser, started_from_rounded
from modelstock_jax.merging.gram import (
    Leaves,
    PyTree,
    add_task_vectors,
    cast,
    gram_matrix,
    in_float64,
    is_float,
    pair_leaves,
    rounding_energy,
)
from modelstock_jax.merging.rules import (
    NonFiniteError,
    UnitOutcome,
    UnitSolution,
    unit_row,
    without_rounding,
)

# (gram, is_scalar, *extras of the unit, *shared) -> solution
MergeRule = Callable[..., UnitSolution]
# (anchor tensors, replica tensors, solution of their unit, unit views, dtype) -> merged tensors
Combine = Callable[[list, list, UnitSolution, list[units.UnitView], Any], list]

ANCHOR_ROUNDING = ("keep", "correct")


def merge(
    method: MergeRule,
    pretrained: PyTree,
    finetuned: PyTree,
    *extras: Any,
    shared: tuple = (),
    unit: str | units.UnitFunction = "tensor",
    dtype: Any = None,
    min_replicas: int = 2,
    combine: Combine | None = None,
    anchor_rounding: str = "keep",
    **unit_options: Any,
) -> tuple[PyTree, Stats, PyTree]:
    """Merge replicas with the anchor by `method(gram, is_scalar, *extras of the unit, *shared)`.

    Args:
      method: a module-level function; static under jit
      pretrained: w0, a tree of arrays
      finetuned: the same tree with a leading axis N on every array
      *extras: trees with the structure of `pretrained` and the shapes of its units
      shared: arrays that are the same for all units
      unit: merge unit, see `units.assign`
      dtype: dtype of the merged floating tensors (default: the anchor's)
      min_replicas: minimum number of replicas
      combine: computes the merged tensors of a unit from its tensors and its solution (default:
        w0 + sum_i a_i d_i for each tensor).
      anchor_rounding: "correct" subtracts the rounding error of a coarser anchor from the Gram
        matrices; `method` must have no extras then.
      **unit_options: further arguments of `units.assign`

    Returns:
      The merged tree, `Stats`, and the tree of states that the method carries to the next merge
      (zeros if it has none).
    """
    leaves = pair_leaves(pretrained, finetuned, min_replicas)
    dtype = _check_options(dtype, anchor_rounding)
    views = _unit_views(leaves, unit, **unit_options)
    changing, groups = _group_by_unit(views)
    extra_leaves = [leaves.treedef.flatten_up_to(extra) for extra in extras]
    per_unit = [[extra[group[0]] for extra in extra_leaves] for group in groups]

    grams, finite = _compute_grams(leaves, changing, groups)
    if anchor_rounding == "correct" and any(_is_coarser(leaves, k) for k in changing):
        energies, started = _rounding_energies(leaves, groups, changing, grams)
        method, per_unit, shared = without_rounding(method), [[e] for e in energies], (started,)
    is_scalar = [sum(changing[k].count for k in group) < 2 for group in groups]
    unit_solutions = solve_units(method, grams, is_scalar, per_unit, shared)

    merged: list[Any] = [
        None if k in changing else _copy_anchor(w0, dtype) for k, w0 in enumerate(leaves.pretrained)
    ]
    solutions = [_copied_solution(leaves.num_replicas)] * len(views)
    for group, solution in zip(groups, unit_solutions, strict=True):
        tensors = (combine or _add_up)(
            [leaves.pretrained[k] for k in group],
            [leaves.finetuned[k] for k in group],
            solution,
            [changing[k] for k in group],
            dtype,
        )
        for k, tensor in zip(group, tensors, strict=True):
            solutions[k], merged[k] = solution, tensor

    stats = _collect(leaves, views, solutions, finite, unit)
    if on_this_host((merged, stats)):
        check_finite(stats, pretrained)
    carry = leaves.treedef.unflatten(
        [jnp.zeros((), s.norm.dtype) if s.carry is None else s.carry for s in solutions]
    )
    return leaves.treedef.unflatten(merged), stats, carry


def _check_options(dtype: Any, anchor_rounding: str) -> Any:
    """Return `dtype` as a NumPy dtype (None stays None), or raise a UserError."""
    if dtype is not None:
        try:
            dtype = jnp.dtype(dtype)
        except TypeError:
            raise UserError(
                f"unknown dtype {dtype!r}; pass a floating dtype, for example 'bfloat16'"
            ) from None
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"dtype must be a floating dtype, not {dtype}")
    if anchor_rounding not in ANCHOR_ROUNDING:
        raise UserError(
            f"anchor_rounding must be one of {', '.join(ANCHOR_ROUNDING)}, not {anchor_rounding!r}"
        )
    return dtype


def _compute_grams(
    leaves: Leaves, changing: Mapping[int, units.UnitView], groups: Sequence[Sequence[int]]
) -> tuple[list[list[Any]], list[Any]]:
    """Return each unit's list of Gram matrices, one per tensor, and which tensors are finite."""
    finite: list[Any] = [jnp.ones(leaves.num_replicas, bool)] * len(leaves.names)
    grams: list[list[Any]] = []
    for group in groups:
        tensor_grams = []
        for k in group:
            gram, finite[k] = _gram(
                leaves.pretrained[k], leaves.finetuned[k], unit_view=changing[k]
            )
            tensor_grams.append(gram)
        grams.append(tensor_grams)
    return grams, finite


def _is_coarser(leaves: Leaves, k: int) -> bool:
    return is_coarser(leaves.pretrained[k].dtype, [leaves.finetuned[k].dtype])


def _rounding_energies(leaves: Leaves, groups, changing, grams) -> tuple[list, Any]:
    """Return the rounding energy E of each unit, and whether training started from the rounding."""
    energies, coarse, counts = [], [], []
    for group, tensor_grams in zip(groups, grams, strict=True):
        energy = jnp.zeros(changing[group[0]].unit_shape)
        for k, gram in zip(group, tensor_grams, strict=True):
            if _is_coarser(leaves, k):
                tensor_energy = _energy(leaves.pretrained[k], unit_view=changing[k])
                energy = energy + tensor_energy
                coarse.append((gram, tensor_energy))
                counts.append(leaves.pretrained[k].size)
        energies.append(energy)
    started = _started(coarse, counts=tuple(counts))
    if on_this_host(started) and bool(started):
        raise UserError(
            "anchor_rounding='correct': the task vectors have less in common than the rounding "
            "error of pretrained, so training started from the rounded weights and there is "
            "nothing to correct; use anchor_rounding='keep'"
        )
    return energies, started


@functools.partial(jax.jit, static_argnames=("counts",))
def _started(tensors, *, counts: tuple[int, ...]):
    totals = [gram.reshape(*gram.shape[:2], -1).sum(axis=-1) for gram, _ in tensors]
    gram = jnp.stack(totals, axis=-1)
    energy = jnp.stack([energy.sum() for _, energy in tensors])
    finite = jnp.isfinite(geometry.squared_norms(gram)).all(axis=0)
    gram = jnp.where(finite[None, None], gram, 0.0)
    energy = jnp.where(finite, energy, 0.0)  # tensors of energy 0 are not counted
    products = geometry.mean_pairs(gram, geometry.is_moved(gram))
    return started_from_rounded(products, energy, np.array(counts, np.float64))


def unit_grams(
    pretrained: PyTree,
    models: PyTree,
    *,
    unit: str | units.UnitFunction = "tensor",
    **unit_options: Any,
) -> PyTree:
    """Return the Gram matrices of M >= 1 models, a tree of [M, M, *unit shape].

    Tensors that a merge copies (integers, booleans, empty tensors) get zeros, [M, M].
    """
    leaves = pair_leaves(pretrained, models, 1)
    views = _unit_views(leaves, unit, **unit_options)
    grams: dict[str, Any] = {}
    for view, w0, w in zip(views, leaves.pretrained, leaves.finetuned, strict=True):
        if view is not None:
            gram, _ = _gram(w0, w, unit_view=_without_key(view))
            grams[view.key] = grams[view.key] + gram if view.key in grams else gram
    zeros = jnp.zeros((leaves.num_replicas, leaves.num_replicas))
    return leaves.treedef.unflatten([zeros if v is None else grams[v.key] for v in views])


def unit_zeros(
    pretrained: PyTree, unit: str | units.UnitFunction = "tensor", **unit_options: Any
) -> PyTree:
    """Return a tree of zeros with the shapes of the units, for state between merges."""

    def zeros(pretrained):
        models = jax.tree.map(lambda x: jnp.asarray(x)[None], pretrained)
        leaves = pair_leaves(pretrained, models, 1)
        views = _unit_views(leaves, unit, **unit_options)
        shapes = [() if view is None else view.unit_shape for view in views]
        return leaves.treedef.unflatten([jnp.zeros(shape) for shape in shapes])

    shapes = jax.eval_shape(zeros, pretrained)  # needs only names and shapes: copies no weights
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _unit_views(leaves: Leaves, unit, **unit_options: Any) -> list[units.UnitView | None]:
    """Return the unit view of each tensor; None for tensors that a merge copies."""
    changes = [is_float(w) and w.size > 0 for w in leaves.pretrained]
    shapes = [
        (name, w.shape)
        for name, w, change in zip(leaves.names, leaves.pretrained, changes, strict=True)
        if change
    ]
    if not shapes:
        return [None] * len(changes)
    views = iter(units.assign(shapes, unit, **unit_options))
    return [next(views) if change else None for change in changes]


def _group_by_unit(
    views: Sequence[units.UnitView | None],
) -> tuple[dict[int, units.UnitView], list[list[int]]]:
    """Return {tensor index: view} of the tensors that change, and the indices of each unit."""
    changing: dict[int, units.UnitView] = {}
    groups: dict[str, list[int]] = {}
    for k, view in enumerate(views):
        if view is not None:
            changing[k] = _without_key(view)
            groups.setdefault(view.key, []).append(k)
    return changing, list(groups.values())


def _without_key(view: units.UnitView) -> units.UnitView:
    """Remove the key, so that tensors of equal shape share one compiled function."""
    return dataclasses.replace(view, key="")


def _add_up(pretrained, finetuned, solution, views, dtype) -> list:
    return [
        _apply(
            w0,
            w,
            solution.coefficient,
            solution.copy_replica,
            solution.keep_anchor,
            unit_view=view,
            dtype=dtype,
        )
        for w0, w, view in zip(pretrained, finetuned, views, strict=True)
    ]


_energy = jax.jit(rounding_energy, static_argnames=("unit_view",))
_apply = jax.jit(add_task_vectors, static_argnames=("unit_view", "dtype"))


@functools.partial(jax.jit, static_argnames=("unit_view",))
def _gram(pretrained, finetuned, *, unit_view: units.UnitView):
    gram = gram_matrix(pretrained, finetuned, unit_view)
    return gram, jnp.isfinite(geometry.squared_norms(gram))


def _copy_anchor(array, dtype):
    return cast(array, dtype) if is_float(array) and dtype is not None else array


def _copied_solution(num_replicas: int) -> UnitSolution:
    zero, zeros = jnp.zeros(()), jnp.zeros(num_replicas)
    undefined = jnp.full((), geometry.DISTANCE_UNDEFINED)
    return UnitSolution(
        coefficient=zeros,
        copy_replica=zeros > 0,
        keep_anchor=zero == 0,
        cosine=jnp.full((), geometry.COSINE_UNDEFINED),
        ratio=zero,
        norm=zeros,
        distance=geometry.Distances(undefined, undefined, undefined),
        outcome=jnp.int8(UnitOutcome.COPIED),
    )


def _collect(leaves: Leaves, views, solutions, finite, unit: str) -> Stats:
    tree = leaves.treedef.unflatten
    keys = tuple(n if v is None else v.key for n, v in zip(leaves.names, views, strict=True))
    return Stats(
        cosine=tree([s.cosine for s in solutions]),
        ratio=tree([s.ratio for s in solutions]),
        norm=tree([s.norm for s in solutions]),
        predicted_distance=geometry.Distances(
            *(tree([s.distance[k] for s in solutions]) for k in range(3))
        ),
        outcome=tree([s.outcome for s in solutions]),
        finite=tree(finite),
        units=UnitTable(unit, leaves.names, keys),
    )


def solve_units(
    method: MergeRule, grams: list, is_scalar: Sequence[bool], per_unit: list, shared: tuple
) -> list[UnitSolution]:
    """Solve every unit by `method(gram, is_scalar, *inputs of the unit, *shared)`.

    Args:
      method: a module-level function; static under jit
      grams: for each unit, the list of the Gram matrices of its tensors, [N, N, *unit shape]; the
        Gram matrix of the unit is their sum.
      is_scalar: for each unit, whether it has fewer than two elements
      per_unit: for each unit, its further inputs, of the unit's shape
      shared: further inputs that are the same for all units

    Returns:
      one `UnitSolution` per unit, of its shape and dtype
    """
    row = _solve(grams, per_unit, shared, method=method, is_scalar=tuple(is_scalar))
    if on_this_host(row):
        row = jax.device_get(row)  # slicing on the host compiles nothing
    return _split_row(row, grams)


@functools.partial(jax.jit, static_argnames=("method", "is_scalar"))
def _solve(
    grams, per_unit, shared, *, method: MergeRule, is_scalar: tuple[bool, ...]
) -> UnitSolution:
    """Solve all units as one row, so that the rule is compiled once and not once per tensor."""
    totals = [functools.reduce(jnp.add, group) for group in grams] or [jnp.zeros((2, 2, 0))]
    gram = jnp.concatenate([t.reshape(*t.shape[:2], -1) for t in totals], axis=-1)
    extras = [jnp.concatenate([jnp.ravel(x) for x in rows]) for rows in zip(*per_unit, strict=True)]
    sizes = [math.prod(total.shape[2:]) for total in totals]
    scalar_row = np.repeat(np.array(is_scalar, bool), sizes if grams else 0)
    finite = jnp.isfinite(geometry.squared_norms(gram)).all(axis=0)

    def solve(gram, *args):
        row = in_float64(method)(gram, *args)
        return row._replace(
            coefficient=jnp.where(finite[None], row.coefficient, 0.0),
            copy_replica=row.copy_replica & finite[None],
            keep_anchor=row.keep_anchor | ~finite,
            ratio=jnp.where(finite, row.ratio, 0.0),
            distance=geometry.Distances(
                *(jnp.where(finite, d, geometry.DISTANCE_UNDEFINED) for d in row.distance)
            ),
            outcome=jnp.where(finite, row.outcome, jnp.int8(UnitOutcome.NON_FINITE)),
        )

    inputs = (jnp.where(finite[None, None], gram, 0.0), jnp.asarray(scalar_row), *extras, *shared)
    all_non_finite = _non_finite_solution(jax.eval_shape(solve, *inputs))
    # A branch, because XLA would otherwise fuse a copy of the rule into every slice of the row.
    return jax.lax.cond(finite.any(), solve, lambda *_: all_non_finite, *inputs)


def _split_row(row: UnitSolution, grams) -> list[UnitSolution]:
    """Split a row of solutions into units, each in the unit's shape and dtype."""
    solutions, start = [], 0
    for group in grams:
        shape, dtype = group[0].shape[2:], jnp.result_type(*group)
        stop = start + math.prod(shape)

        def take(x, columns=slice(start, stop), shape=shape, dtype=dtype):
            x = x[..., columns].reshape((*x.shape[:-1], *shape))
            return jnp.asarray(x, dtype if is_float(x) else None)

        solutions.append(jax.tree.map(take, row))
        start = stop
    return solutions


def on_this_host(tree: PyTree) -> bool:
    """Return whether every array is concrete and fully addressable by this process."""
    return all(
        not isinstance(x, jax.core.Tracer) and x.is_fully_addressable for x in jax.tree.leaves(tree)
    )


def _non_finite_solution(shapes: UnitSolution) -> UnitSolution:
    """Return the solution if no unit is finite: the anchor."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return zeros._replace(
        keep_anchor=jnp.ones_like(zeros.keep_anchor),
        cosine=jnp.full_like(zeros.cosine, geometry.COSINE_UNDEFINED),
        distance=geometry.Distances(
            *(jnp.full_like(d, geometry.DISTANCE_UNDEFINED) for d in zeros.distance)
        ),
        outcome=jnp.full_like(zeros.outcome, UnitOutcome.NON_FINITE),
    )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class UnitTable:
    """Names of the tensors and of their merge units, in the order of the tree's leaves.

    Attributes:
      unit: one of `units.UNITS`
      names: name of each tensor
      keys: name of the merge unit of each tensor
    """

    unit: str
    names: tuple[str, ...]
    keys: tuple[str, ...]


class Stats(NamedTuple):
    """Measures of a merge, each a pytree with the structure of `pretrained`.

    A leaf has the shape of the unit: `()`; `[F]`, the output channels, under `filter`; `[H]`, the
    heads, under `head`. Tensors that share a unit have the same values. The dtype is float32
    (float64 for float64 weights) unless noted.

    Attributes:
      cosine: mean pairwise cosine, or COSINE_UNDEFINED (2.0)
      ratio: t, from 0 (the anchor) to 1 (the mean); the sum of the a_i
      norm: |d_i| of each replica, [N, ...]
      predicted_distance: from the center, or DISTANCE_UNDEFINED (-1.0)
      outcome: int8 codes of `UnitOutcome`
      finite: whether the tensor itself, not its unit, is finite, [N, ...] bool
      units: names of tensors and units; static, no arrays
    """

    cosine: Any
    ratio: Any
    norm: Any
    predicted_distance: geometry.Distances
    outcome: Any
    finite: Any
    units: UnitTable


def report(stats: Stats) -> list[dict[str, Any]]:
    """Return one row per tensor for tables and JSON: plain Python values, None if undefined.

    Under `filter` and `head` a row has the means over its units of cosine, angle (degrees) and
    ratio, and root-sum-squares of norms; `outcomes` counts the units. Means of cosine and angle
    leave out the units whose cosine is undefined.

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> w0, w = np.zeros(2, np.float32), np.array([[1, 0], [1, 1]], np.float32)
      >>> row, = report(model_stock({"w": w0}, {"w": w})[1])
      >>> row["name"], row["outcome"], round(row["angle"], 3), round(row["ratio"], 3)
      ('w', 'interpolated', 45.0, 0.828)
    """
    return [
        unit_row(leaf.name, leaf.key, leaf.cosine, leaf.ratio, leaf.norm, leaf.outcome)
        for leaf in _leaf_stats(stats)
    ]


def total_distance(stats: Stats) -> geometry.Distances:
    """Return the predicted distances of the complete model from the center.

    These are root-sum-squares over units. Each unit counts once, even if several tensors share it.
    Units whose distance is unknown (one replica changed, copied tensors) are left out.

    Returns:
      `Distances` of Python floats, in the units of the weights; None if it is unknown in every
      unit.

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> w0, w = np.zeros(2, np.float32), np.array([[1, 0], [1, 1]], np.float32)
      >>> round(total_distance(model_stock({"w": w0}, {"w": w})[1]).mean, 3)
      0.469
    """
    unit_stats = {leaf.key: leaf for leaf in _leaf_stats(stats)}.values()

    def total(distances):
        arrays = [np.asarray(d, np.float64).ravel() for d in distances]
        known = [d[d != geometry.DISTANCE_UNDEFINED] for d in arrays]
        if not any(d.size for d in known):
            return None
        # Summed unit by unit: the last bits of results depend on this order.
        return float(np.sqrt(sum(np.sum(d[d > 0] ** 2) for d in known)))

    return geometry.Distances(*(total(leaf.distance[k] for leaf in unit_stats) for k in range(3)))


def outcome_counts(stats: Stats) -> dict[str, int]:
    """Return the number of units per outcome, {name in lower case: count}, without zeros.

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> outcome_counts(model_stock({"w": np.zeros(2)}, {"w": np.zeros((2, 2))})[1])
      {'unchanged': 1}
    """
    counts = collections.Counter()
    for leaf in {leaf.key: leaf for leaf in _leaf_stats(stats)}.values():
        counts.update(UnitOutcome(int(code)).name.lower() for code in leaf.outcome.flat)
    return dict(counts)


def check_finite(stats: Stats, pretrained: PyTree = None) -> None:
    """Raise an error if weights were not finite. Call this after a jitted merge.

    A merge outside jit calls it automatically.

    Args:
      stats: statistics of the merge
      pretrained: the anchor, to distinguish a non-finite anchor from non-finite replicas; optional

    Raises:
      NonFiniteError: the message names the replica, counted from 0, and the tensor
    """
    anchors = jax.tree.leaves(pretrained)
    for index, leaf in enumerate(_leaf_stats(stats)):
        finite = leaf.finite.reshape(len(leaf.finite), -1).all(axis=1)
        if finite.all():
            continue
        anchor = anchors[index] if anchors else None
        if not finite.any() and (anchor is None or not bool(jnp.isfinite(anchor).all())):
            replica = "pretrained"
            who = "pretrained" if anchor is not None else "pretrained, or every replica"
        else:
            replica = int(np.argmin(finite))
            who = f"replica {replica} (counted from 0)"
        raise NonFiniteError(
            f"{who}: tensor {leaf.name!r} contains NaN or infinity, or an update too large for "
            "float32; repair the tensor or leave it out",
            replica,
            leaf.name,
        )


class _LeafStats(NamedTuple):
    name: str
    key: str
    cosine: np.ndarray
    ratio: np.ndarray
    norm: np.ndarray
    distance: tuple[np.ndarray, ...]
    outcome: np.ndarray
    finite: np.ndarray


def _leaf_stats(stats: Stats) -> list[_LeafStats]:
    *measures, distances, outcome, finite = jax.device_get(tuple(stats)[:-1])
    columns: list[Any] = [jax.tree.leaves(column) for column in measures]
    columns.append(zip(*(jax.tree.leaves(distance) for distance in distances), strict=True))
    columns += [jax.tree.leaves(outcome), jax.tree.leaves(finite)]
    rows = zip(stats.units.names, stats.units.keys, *columns, strict=True)
    return [_LeafStats(*row) for row in rows]
