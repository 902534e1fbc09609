"""One engine for every merge: Gram matrix, coefficients a_i, then w0 + sum_i a_i d_i.

A method is a function from a unit's Gram matrix to a `UnitSolution`, and where it is no sum of task
vectors, a `Combine` too. All else is here: units, dtypes, what is kept as it is, and that nothing
non-finite reaches the merged weights.
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

MergeRule = Callable[..., UnitSolution]
# (tensors of the anchor, of the replicas, the unit's solution, its parts, dtype) -> merged tensors
Combine = Callable[[list, list, UnitSolution, list[units.UnitView], Any], list]

ANCHOR_ROUNDING = ("keep", "correct")


def merge(
    method: MergeRule,
    pretrained: PyTree,
    finetuned: PyTree,
    *extras: Any,
    shared: tuple = (),
    unit: str = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
    min_replicas: int = 2,
    combine: Combine | None = None,
    anchor_rounding: str = "keep",
) -> tuple[PyTree, Stats, PyTree]:
    """Merge replicas with the anchor by `method(gram, is_scalar, *extras of the unit, *shared)`.

    Args:
      method: a module-level function; it is static under jit.
      pretrained: w0, a tree of arrays.
      finetuned: the same tree with a leading axis N on every array.
      *extras: trees with the structure of `pretrained` and the shapes of its units.
      shared: arrays that are the same for all units.
      unit: merge unit, see `units.assign`.
      num_heads: see `units.assign`.
      filter_axis: see `units.assign`.
      dtype: of the merged floating tensors; by default each keeps the anchor's.
      min_replicas: least number of replicas.
      combine: makes a unit's merged tensors of its tensors and its solution; by default
        w0 + sum_i a_i d_i of each.
      anchor_rounding: "correct" subtracts the rounding error of a coarser anchor from the Gram
        matrices; `method` has no extras then.

    Returns:
      merged tree, `Stats`, and the tree of what the method carries on (of zeros where nothing).
    """
    leaves = pair_leaves(pretrained, finetuned, min_replicas)
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise UserError(f"dtype must be a floating dtype, not {jnp.dtype(dtype)}")
    if anchor_rounding not in ANCHOR_ROUNDING:
        raise UserError(
            f"anchor_rounding must be one of {', '.join(ANCHOR_ROUNDING)}, not {anchor_rounding!r}"
        )
    parts = _assign(leaves, unit, num_heads, filter_axis)
    inputs = [leaves.treedef.flatten_up_to(extra) for extra in extras]
    merged: list[Any] = [None] * len(leaves.names)
    solutions: list[Any] = merged.copy()
    finite: list[Any] = merged.copy()

    for k, part in enumerate(parts):
        if part is None:
            merged[k] = _kept(leaves.pretrained[k], dtype)
            solutions[k] = _kept_solution(leaves.num_replicas)
            finite[k] = jnp.ones(leaves.num_replicas, bool)

    moved, members = _by_unit(parts)
    grams: list[list[Any]] = []
    for group in members.values():
        pairs = [
            _gram(leaves.pretrained[k], leaves.finetuned[k], unit_view=moved[k]) for k in group
        ]
        grams.append([gram for gram, _ in pairs])
        for k, (_, every) in zip(group, pairs, strict=True):
            finite[k] = every
    own = [[extra[group[0]] for extra in inputs] for group in members.values()]
    if anchor_rounding == "correct" and any(_coarser(leaves, k) for k in moved):
        energies, started = _rounding(leaves, members, moved, grams)
        method, own, shared = without_rounding(method), [[e] for e in energies], (started,)
    solved = solve_units(
        method,
        grams,
        [sum(moved[k].count for k in group) < 2 for group in members.values()],
        own,
        shared,
    )
    for group, solution in zip(members.values(), solved, strict=True):
        tensors = (combine or _add_up)(
            [leaves.pretrained[k] for k in group],
            [leaves.finetuned[k] for k in group],
            solution,
            [moved[k] for k in group],
            None if dtype is None else jnp.dtype(dtype),
        )
        for k, tensor in zip(group, tensors, strict=True):
            solutions[k], merged[k] = solution, tensor

    stats = _collect(leaves, parts, solutions, finite, unit)
    if on_this_host((merged, stats)):
        check_finite(stats, pretrained)
    carry = leaves.treedef.unflatten(
        [jnp.zeros((), s.norm.dtype) if s.carry is None else s.carry for s in solutions]
    )
    return leaves.treedef.unflatten(merged), stats, carry


def _coarser(leaves: Leaves, k: int) -> bool:
    return is_coarser(leaves.pretrained[k].dtype, [leaves.finetuned[k].dtype])


def _rounding(leaves: Leaves, members, moved, grams) -> tuple[list, Any]:
    """Rounding energy of each unit, and whether training started from the rounded anchor."""
    energies, tensors, counts = [], [], []
    for group, own in zip(members.values(), grams, strict=True):
        energy = jnp.zeros(moved[group[0]].unit_shape)
        for k, gram in zip(group, own, strict=True):
            if _coarser(leaves, k):
                part = _energy(leaves.pretrained[k], unit_view=moved[k])
                energy = energy + part
                tensors.append((gram, part))
                counts.append(leaves.pretrained[k].size)
        energies.append(energy)
    started = _started(tensors, counts=tuple(counts))
    if on_this_host(started) and bool(started):
        raise UserError(
            "anchor_rounding='correct': the task vectors have less in common than the rounding "
            "error of pretrained, so training started from the rounded weights and there is "
            "nothing to correct; drop the option"
        )
    return energies, started


@functools.partial(jax.jit, static_argnames=("counts",))
def _started(tensors, *, counts: tuple[int, ...]):
    totals = [gram.reshape(*gram.shape[:2], -1).sum(axis=-1) for gram, _ in tensors]
    gram = jnp.stack(totals, axis=-1)
    energy = jnp.stack([energy.sum() for _, energy in tensors])
    finite = jnp.isfinite(geometry.squared_norms(gram)).all(axis=0)
    gram = jnp.where(finite[None, None], gram, 0.0)
    energy = jnp.where(finite, energy, 0.0)  # such a tensor does not count
    products = geometry.mean_pairs(gram, geometry.is_moved(gram))
    return started_from_rounded(products, energy, np.array(counts, np.float64))


def unit_grams(
    pretrained: PyTree,
    models: PyTree,
    *,
    unit: str = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
) -> Any:
    """Tree of the Gram matrices [M, M, *unit shape] of M >= 1 models; zeros for what is kept."""
    leaves = pair_leaves(pretrained, models, 1)
    parts = _assign(leaves, unit, num_heads, filter_axis)
    grams: dict[str, Any] = {}
    for part, w0, w in zip(parts, leaves.pretrained, leaves.finetuned, strict=True):
        if part is not None:
            gram, _ = _gram(w0, w, unit_view=_nameless(part))
            grams[part.key] = grams[part.key] + gram if part.key in grams else gram
    nothing = jnp.zeros((leaves.num_replicas, leaves.num_replicas))
    return leaves.treedef.unflatten([nothing if p is None else grams[p.key] for p in parts])


def unit_zeros(
    pretrained: PyTree,
    unit: str = "tensor",
    *,
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
) -> Any:
    """A tree of zeros of each tensor's unit shape: state that is kept between merges."""

    def zeros(pretrained):
        one = jax.tree.map(lambda x: jnp.asarray(x)[None], pretrained)
        leaves = pair_leaves(pretrained, one, 1)
        parts = _assign(leaves, unit, num_heads, filter_axis)
        shapes = [() if part is None else part.unit_shape for part in parts]
        return leaves.treedef.unflatten([jnp.zeros(shape) for shape in shapes])

    shapes = jax.eval_shape(zeros, pretrained)  # names and shapes suffice: no copy of the weights
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _assign(leaves: Leaves, unit, num_heads, filter_axis) -> list[units.UnitView | None]:
    """Parts of the tensors that a merge moves; None for those that it keeps."""
    moves = [is_float(w) and w.size > 0 for w in leaves.pretrained]
    shapes = [
        (name, w.shape)
        for name, w, m in zip(leaves.names, leaves.pretrained, moves, strict=True)
        if m
    ]
    if not shapes:
        return [None] * len(moves)
    found = iter(units.assign(shapes, unit, num_heads=num_heads, filter_axis=filter_axis))
    return [next(found) if m else None for m in moves]


def _by_unit(
    parts: Sequence[units.UnitView | None],
) -> tuple[dict[int, units.UnitView], dict[str, list[int]]]:
    """Parts of the tensors that move, by their numbers, and the numbers of each unit's tensors."""
    moved: dict[int, units.UnitView] = {}
    members: dict[str, list[int]] = {}
    for k, part in enumerate(parts):
        if part is not None:
            moved[k] = _nameless(part)
            members.setdefault(part.key, []).append(k)
    return moved, members


def _nameless(part: units.UnitView) -> units.UnitView:
    """Tensors of like shape share one compiled function."""
    return dataclasses.replace(part, key="")


def _add_up(pretrained, finetuned, solution, parts, dtype) -> list:
    return [
        _apply(
            w0,
            w,
            solution.coefficient,
            solution.copy_replica,
            solution.keep_anchor,
            unit_view=part,
            dtype=dtype,
        )
        for w0, w, part in zip(pretrained, finetuned, parts, strict=True)
    ]


_energy = jax.jit(rounding_energy, static_argnames=("unit_view",))
_apply = jax.jit(add_task_vectors, static_argnames=("unit_view", "dtype"))


@functools.partial(jax.jit, static_argnames=("unit_view",))
def _gram(pretrained, finetuned, *, unit_view: units.UnitView):
    gram = gram_matrix(pretrained, finetuned, unit_view)
    return gram, jnp.isfinite(geometry.squared_norms(gram))


def _kept(array, dtype):
    return cast(array, jnp.dtype(dtype)) if is_float(array) and dtype is not None else array


def _kept_solution(num_replicas: int) -> UnitSolution:
    zero, none = jnp.zeros(()), jnp.zeros(num_replicas)
    undefined = jnp.full((), geometry.DISTANCE_UNDEFINED)
    return UnitSolution(
        none,
        none > 0,
        zero == 0,
        jnp.full((), geometry.COSINE_UNDEFINED),
        zero,
        none,
        geometry.Distances(undefined, undefined, undefined),
        jnp.int8(UnitOutcome.COPIED),
        None,
    )


def _collect(leaves: Leaves, parts, solutions, finite, unit: str) -> Stats:
    tree = leaves.treedef.unflatten
    keys = tuple(n if p is None else p.key for n, p in zip(leaves.names, parts, strict=True))
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


# Solutions of all units at once.


def solve_units(
    method: MergeRule, grams: list, is_scalar: Sequence[bool], per_unit: list, shared: tuple
) -> list[UnitSolution]:
    """Solve every unit by `method(gram, is_scalar, *own, *shared)`.

    Args:
      method: a module-level function; it is static under jit.
      grams: for each unit a list of its tensors' Gram matrices, [N, N, *unit shape]; their sum is
        the unit's.
      is_scalar: for each unit, whether it holds fewer than two numbers.
      per_unit: for each unit its own further inputs, of the unit's shape.
      shared: further inputs that are the same for all units.

    Returns:
      A `UnitSolution` for each unit, of its shape and dtype.
    """
    row = _solve(grams, per_unit, shared, method=method, is_scalar=tuple(is_scalar))
    if on_this_host(row):
        row = jax.device_get(row)  # cut without compiling a slice for each number
    return _cut(row, grams)


@functools.partial(jax.jit, static_argnames=("method", "is_scalar"))
def _solve(
    grams, per_unit, shared, *, method: MergeRule, is_scalar: tuple[bool, ...]
) -> UnitSolution:
    """All units as one row, so that the algebra is compiled once and not once a tensor."""
    totals = [functools.reduce(jnp.add, group) for group in grams] or [jnp.zeros((2, 2, 0))]
    gram = jnp.concatenate([t.reshape(*t.shape[:2], -1) for t in totals], axis=-1)
    own = [jnp.concatenate([jnp.ravel(x) for x in rows]) for rows in zip(*per_unit, strict=True)]
    sizes = [math.prod(total.shape[2:]) for total in totals]
    alone = np.repeat(np.array(is_scalar, bool), sizes if grams else 0)
    finite = jnp.isfinite(geometry.squared_norms(gram)).all(axis=0)

    def solve(gram, *args):
        row = in_float64(method)(gram, *args)
        return row._replace(
            coefficient=jnp.where(finite[None], row.coefficient, 0.0),
            copy_replica=row.copy_replica & finite[None],
            keep_anchor=row.keep_anchor | ~finite,
            ratio=jnp.where(finite, row.ratio, 0.0),
            outcome=jnp.where(finite, row.outcome, jnp.int8(UnitOutcome.NON_FINITE)),
        )

    inputs = (jnp.where(finite[None, None], gram, 0.0), jnp.asarray(alone), *own, *shared)
    nothing = _nothing(jax.eval_shape(solve, *inputs))
    # A branch, for the compiler would fuse a copy of the algebra into every slice of its result.
    return jax.lax.cond(finite.any(), solve, lambda *_: nothing, *inputs)


def _cut(row: UnitSolution, grams) -> list[UnitSolution]:
    """The row's solutions unit by unit, in each unit's shape and dtype."""
    solutions, start = [], 0
    for group in grams:
        shape, dtype = group[0].shape[2:], jnp.result_type(*group)
        stop = start + math.prod(shape)

        def own_part(x, cut=slice(start, stop), shape=shape, dtype=dtype):
            x = x[..., cut].reshape((*x.shape[:-1], *shape))
            return jnp.asarray(x, dtype if is_float(x) else None)

        solutions.append(jax.tree.map(own_part, row))
        start = stop
    return solutions


def on_this_host(tree: PyTree) -> bool:
    """Whether every array is concrete, and here to be read."""
    return all(
        not isinstance(x, jax.core.Tracer) and x.is_fully_addressable for x in jax.tree.leaves(tree)
    )


def _nothing(shapes: UnitSolution) -> UnitSolution:
    """The answer where no unit is finite."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return zeros._replace(
        keep_anchor=jnp.ones_like(zeros.keep_anchor),
        cosine=jnp.full_like(zeros.cosine, geometry.COSINE_UNDEFINED),
        outcome=jnp.full_like(zeros.outcome, UnitOutcome.NON_FINITE),
    )


# What a merge measured: per unit, as pytrees; and as rows and totals for tables.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class UnitTable:
    """Names of the tensors and the units that they lie in, in the order of the tree's leaves."""

    unit: str
    names: tuple[str, ...]
    keys: tuple[str, ...]


class Stats(NamedTuple):
    """Measures of a merge, each a pytree with the structure of `pretrained`.

    A leaf has the unit's shape: `()`, `[F]` output channels under `filter`, `[H]` heads under
    `head`. Tensors that share a unit hold the same values. All are float32 (float64 for float64
    weights) but where noted.
    """

    cosine: Any  # mean pairwise cosine, or COSINE_UNDEFINED (2.0)
    ratio: Any  # t: how far from the anchor (0) to the mean (1); the sum of a_i
    norm: Any  # [N, ...], |d_i| of each replica
    predicted_distance: geometry.Distances  # to the center; DISTANCE_UNDEFINED (-1.0) where unknown
    outcome: Any  # int8 codes of `UnitOutcome`
    finite: Any  # [N, ...] bool, of the tensor itself, not of its unit
    units: UnitTable  # static: no arrays


def report(stats: Stats) -> list[dict[str, Any]]:
    """Rows for tables and JSON, one a tensor; plain Python values, None where undefined.

    Under `filter` and `head` a row holds the mean over its units of cosine, angle (degrees) and
    ratio, and root-sum-squares of norms; `outcomes` counts the units.

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> w0, w = np.zeros(2, np.float32), np.array([[1, 0], [1, 1]], np.float32)
      >>> row, = report(model_stock({"w": w0}, {"w": w})[1])
      >>> row["name"], row["outcome"], round(row["angle"], 3), round(row["ratio"], 3)
      ('w', 'interpolated', 45.0, 0.828)
    """
    return [
        unit_row(leaf.name, leaf.key, leaf.cosine, leaf.ratio, leaf.norm, leaf.outcome)
        for leaf in _leaves(stats)
    ]


def total_distance(stats: Stats) -> geometry.Distances:
    """Predicted distances from the center of the whole model: root-sum-squares over units.

    Each unit counts once, however many tensors share it; units whose distance is unknown (one
    replica left, cosine undefined) are left out.

    Returns:
      `Distances` of plain floats, in the units of the weights; None if no unit has one.

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> w0, w = np.zeros(2, np.float32), np.array([[1, 0], [1, 1]], np.float32)
      >>> round(total_distance(model_stock({"w": w0}, {"w": w})[1]).mean, 3)
      0.469
    """
    leaves = {leaf.key: leaf for leaf in _leaves(stats)}.values()

    def total(distances):
        values = np.concatenate([np.ravel(d).astype(np.float64) for d in distances] or [[]])
        known = values[values != geometry.DISTANCE_UNDEFINED]
        return float(np.sqrt(np.sum(known**2))) if known.size else None

    return geometry.Distances(*(total(leaf.distance[k] for leaf in leaves) for k in range(3)))


def outcome_counts(stats: Stats) -> dict[str, int]:
    """How many units each outcome met, by its name in lower case; only those that occur.

    Example:
      >>> from modelstock_jax.merging import model_stock
      >>> outcome_counts(model_stock({"w": np.zeros(2)}, {"w": np.zeros((2, 2))})[1])
      {'unchanged': 1}
    """
    counts = collections.Counter()
    for leaf in {leaf.key: leaf for leaf in _leaves(stats)}.values():
        counts.update(UnitOutcome(int(code)).name.lower() for code in leaf.outcome.flat)
    return dict(counts)


def check_finite(stats: Stats, pretrained: PyTree = None) -> None:
    """Raise where weights were not finite; for use after a jitted merge.

    A merge called eagerly does this by itself.

    Args:
      stats: of the merge.
      pretrained: the anchor, to tell a bad anchor from bad replicas; optional.

    Raises:
      NonFiniteError: naming the replica, counted from 0, and the tensor.
    """
    for k, leaf in enumerate(_leaves(stats)):
        ok = leaf.finite.reshape(len(leaf.finite), -1).all(axis=1)
        if ok.all():
            continue
        anchor = None if pretrained is None else jax.tree.leaves(pretrained)[k]
        if not ok.any() and (anchor is None or not bool(jnp.isfinite(anchor).all())):
            replica = "pretrained"
            who = "pretrained" if anchor is not None else "pretrained, or every replica"
        else:
            replica = int(np.argmin(ok))
            who = f"replica {replica} (counted from 0)"
        raise NonFiniteError(
            f"{who}: tensor {leaf.name!r} holds NaN or infinity, or a movement too large for "
            "float32; mend it or leave it out",
            replica,
            leaf.name,
        )


class _Leaf(NamedTuple):
    name: str
    key: str
    cosine: np.ndarray
    ratio: np.ndarray
    norm: np.ndarray
    distance: tuple[np.ndarray, ...]
    outcome: np.ndarray
    finite: np.ndarray


def _leaves(stats: Stats) -> list[_Leaf]:
    *measures, distances, outcome, finite = jax.device_get(tuple(stats)[:-1])
    columns: list[Any] = [jax.tree.leaves(column) for column in measures]
    columns.append(zip(*(jax.tree.leaves(part) for part in distances), strict=True))
    columns += [jax.tree.leaves(outcome), jax.tree.leaves(finite)]
    rows = zip(stats.units.names, stats.units.keys, *columns, strict=True)
    return [_Leaf(*row) for row in rows]
