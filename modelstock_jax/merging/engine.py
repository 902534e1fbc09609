"""The engine of every merge: Gram matrices, coefficients a_i, then w0 + sum_i a_i d_i.

A merge method is a rule that maps the Gram matrix of a unit to a `UnitSolution`. A method whose
result is not a sum of task vectors also has a `Combine` function. The engine handles everything
else: merge units, dtypes, tensors that are copied, shardings, and non-finite weights, which never
reach the merged weights.

The rule runs once for all units, as rows with one entry per unit: outside of jit in NumPy, so that
it is not compiled at all; under jit as one piece of the program.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry, units
from modelstock_jax.merging.anchor_rounding import is_coarser, started_from_rounded
from modelstock_jax.merging.gram import (
    COMPUTED,
    Update,
    add_task_vectors,
    cast,
    gram_matrix,
    gram_products,
    in_float64,
    rounding_energy,
)
from modelstock_jax.merging.placement import (
    colocate_replicas,
    on_this_host,
    place_like,
    put_near,
    replicate,
    settled,
    varying_type,
)
from modelstock_jax.merging.rules import UnitOutcome, UnitSolution, without_rounding
from modelstock_jax.merging.stats import Rows, Stats, TensorUnits, check_finite
from modelstock_jax.merging.trees import Leaves, PyTree, check_leaves, is_float, pair_leaves

# (gram, is_scalar, *extras of the unit, *shared) -> solution; NumPy or JAX arrays, float64
MergeRule = Callable[..., UnitSolution]
# (names, anchor tensors, replica tensors, packed update of each, views, dtype) -> merged tensors
Combine = Callable[[list[str], list, list, list, list[units.UnitView], Any], list]

ANCHOR_ROUNDING = ("keep", "correct")


class Exact(NamedTuple):
    """A float64 number as the sum of two float32, for programs without float64.

    Attributes:
      value: the number, rounded to float32
      rest: the rounding error
    """

    value: Any
    rest: Any


def exact(number: Any) -> Exact:
    """Return a number or an array of numbers in float64, also if jax_enable_x64 is off.

    Example:
      >>> number = exact(0.1)
      >>> float(np.float64(number.value) + np.float64(number.rest) - 0.1) < 1e-15
      True
    """
    dtype = jnp.result_type(float)
    if isinstance(number, jax.Array):
        number = number.astype(dtype)
        return Exact(number, jax.device_put(np.zeros(number.shape, dtype)))
    wide = np.asarray(number, np.float64)
    with np.errstate(invalid="ignore"):  # Infinity has no rest.
        value = wide.astype(dtype)
        rest = (wide - value).astype(dtype)
    return Exact(*jax.device_put((value, rest)))


def merge(
    rule: MergeRule,
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
    """Merge replicas with the anchor by `rule(gram, is_scalar, *extras of the unit, *shared)`.

    Args:
      rule: a module-level function; static under jit
      pretrained: w0, a tree of arrays
      finetuned: the same tree with a leading axis N on every array
      *extras: trees with the structure of `pretrained` and the shapes of its units
      shared: arrays, or `exact` numbers, that are the same for all units
      unit: merge unit, see `units.assign`
      dtype: dtype of the merged floating tensors (default: the anchor's)
      min_replicas: minimum number of replicas
      combine: computes the merged tensors of a unit from its tensors and its packed `Update`
        (default: w0 + sum_i a_i d_i for each tensor).
      anchor_rounding: "correct" subtracts the rounding error of a coarser anchor from the Gram
        matrices; `rule` must have no extras then.
      **unit_options: see `units.assign`

    Returns:
      The merged tree, `Stats`, and the tree of states that the rule carries to the next merge
      (zeros if it has none).
    """
    leaves = pair_leaves(pretrained, finetuned, min_replicas)
    dtype = _check_options(dtype, anchor_rounding)
    views = _unit_views(leaves, unit, unit_options)
    changing, groups = _group_by_unit(views)
    extra_leaves = [leaves.treedef.flatten_up_to(extra) for extra in extras]
    per_unit = [[extra[group[0]] for extra in extra_leaves] for group in groups]

    products = {k: _unit_products(leaves, k, view) for k, view in changing.items()}
    if anchor_rounding == "correct" and any(_is_coarser(leaves, k) for k in changing):
        energies, started = _rounding_energies(leaves, groups, changing, products)
        rule, per_unit, shared = without_rounding(rule), [[e] for e in energies], (started,)
    to_solve = [
        _Unit(group, [products[k] for k in group], [changing[k] for k in group], extra)
        for group, extra in zip(groups, per_unit, strict=True)
    ]
    rows, packed, tensors = _solve(rule, to_solve, shared, leaves, views)

    merged: list[Any] = [
        None if k in changing else _copy_anchor(w0, dtype) for k, w0 in enumerate(leaves.pretrained)
    ]
    for u in to_solve:
        pairs = [colocate_replicas(leaves.pretrained[k], leaves.finetuned[k]) for k in u.tensors]
        anchors, replicas = (list(side) for side in zip(*pairs, strict=True))
        updates = [packed[k] for k in u.tensors]
        names = [leaves.names[k] for k in u.tensors]
        combined = (combine or _add_up)(names, anchors, replicas, updates, u.views, dtype)
        for k, tensor in zip(u.tensors, combined, strict=True):
            merged[k] = place_like(settled(tensor), leaves.pretrained[k])

    tree = leaves.treedef.unflatten
    stats = Stats(rows, tree(tensors), units.unit_name(unit), leaves.num_replicas)
    if on_this_host((merged, rows)):
        check_finite(stats, pretrained)
    carry: list[Any] = [jax.device_put(np.float32(0.0))] * len(views)
    for k, update in packed.items():
        if len(update) > _num_rows(leaves.num_replicas):
            carry[k] = _last_row(update)
    return tree(merged), stats, tree(carry) if extras else None


_last_row = jax.jit(lambda array: array[-1])


class _Unit(NamedTuple):
    """A merge unit before it is solved.

    Attributes:
      tensors: indices of its tensors
      products: products of each tensor, [N (N + 1) / 2, *unit shape]
      views: view of each tensor
      extras: further inputs of the rule, each [*unit shape]
    """

    tensors: list[int]
    products: list
    views: list[units.UnitView]
    extras: list

    @property
    def shape(self) -> tuple[int, ...]:
        return self.views[0].unit_shape

    @property
    def is_scalar(self) -> bool:
        return sum(view.count for view in self.views) < 2


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


def _unit_products(leaves: Leaves, k: int, view: units.UnitView):
    """Return the products of the task vectors of tensor k, [N (N + 1) / 2, *unit shape]."""
    pretrained, finetuned = colocate_replicas(leaves.pretrained[k], leaves.finetuned[k])
    return replicate(settled(_products(pretrained, finetuned, unit_view=view)))


_products = jax.jit(gram_products, static_argnames=("unit_view",))
_energy = jax.jit(rounding_energy, static_argnames=("unit_view",))


def _is_coarser(leaves: Leaves, k: int) -> bool:
    return is_coarser(leaves.pretrained[k].dtype, [leaves.finetuned[k].dtype])


def _rounding_energies(leaves: Leaves, groups, changing, products) -> tuple[list, Any]:
    """Return the rounding energy E of each unit, and whether training started from the rounding."""
    energies, coarse, counts = [], [], []
    for group in groups:
        energy = jax.device_put(np.zeros(changing[group[0]].unit_shape, np.float32))
        for k in group:
            if _is_coarser(leaves, k):
                tensor_energy = _energy(leaves.pretrained[k], unit_view=changing[k])
                energy = energy + tensor_energy
                coarse.append((products[k], tensor_energy))
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
    totals = [products.reshape(len(products), -1).sum(axis=-1) for products, _ in tensors]
    gram = gram_matrix(jnp.stack(totals, axis=-1))
    energy = jnp.stack([energy.sum() for _, energy in tensors])
    finite = jnp.isfinite(geometry.squared_norms(gram)).all(axis=0)
    gram = jnp.where(finite[None, None], gram, 0.0)
    energy = jnp.where(finite, energy, 0.0)  # tensors of energy 0 are not counted
    products = geometry.mean_pairs(gram, geometry.is_moved(gram))
    return started_from_rounded(products, energy, np.array(counts, np.float64))


def _solve(
    rule: MergeRule, solved_units: list[_Unit], shared: tuple, leaves: Leaves, views: Sequence
) -> tuple[tuple[Rows, ...], dict[int, Any], list[TensorUnits]]:
    """Solve every unit by `rule(gram, is_scalar, *extras of the unit, *shared)`.

    Units of one dtype (and, under `jax.shard_map`, of one varying type) are solved as one row.

    Returns:
      The rows; for each tensor that changes, the packed `Update` of its unit, [K, *unit shape], see
      `_pack`; and the place of every tensor's units in the rows.
    """
    concrete = on_this_host([(u.products, u.extras) for u in solved_units] + [shared])
    by_row: dict[Any, list[_Unit]] = {}
    for u in solved_units:
        dtype = jnp.result_type(*u.products)
        by_row.setdefault((dtype, None if concrete else _varying_type(u)), []).append(u)

    rows, packed = [], {}
    tensors = [TensorUnits(name, name) for name in leaves.names]
    for (dtype, _), in_row in by_row.items():
        arguments = [u.products for u in in_row], [u.extras for u in in_row], shared
        is_scalar = np.repeat(
            [u.is_scalar for u in in_row], [math.prod(u.shape) for u in in_row]
        ).astype(bool)
        if concrete:
            host = jax.device_get(arguments)
            with np.errstate(all="ignore"):  # infinity is reported as `finite`, not by NumPy
                solution, update = _solve_row(np, rule, np.dtype(dtype), is_scalar, *host)
            solution = jax.device_put(solution)
            parts = _split(update, [math.prod(u.shape) for u in in_row])
        else:
            solution, parts = _solve_traced(
                *arguments, rule=rule, is_scalar=tuple(is_scalar.tolist())
            )
        start = tensor_start = 0
        for u, part in zip(in_row, parts, strict=True):
            for k in u.tensors:
                packed[k] = part.reshape((len(part), *u.shape))
                tensors[k] = TensorUnits(
                    leaves.names[k], views[k].key, u.shape, len(rows), start, tensor_start
                )
                tensor_start += math.prod(u.shape)
            start += math.prod(u.shape)
        rows.append(solution)
    if concrete:
        packed = put_near(packed, {k: leaves.pretrained[k] for k in packed})
    return tuple(rows), packed, tensors


def _varying_type(u: _Unit):
    return tuple(dict.fromkeys(varying_type(x) for x in (*u.products, *u.extras)))


@functools.partial(jax.jit, static_argnames=("rule", "is_scalar"))
def _solve_traced(products, extras, shared, *, rule: MergeRule, is_scalar: tuple[bool, ...]):
    """Return the rows, and the packed update of each unit, [K, size]."""
    dtype = jnp.result_type(*products[0])
    rows, update = _solve_row(jnp, rule, dtype, np.array(is_scalar, bool), products, extras, shared)
    return rows, _split_apart(update, [math.prod(group[0].shape[1:]) for group in products])


def _solve_row(xp, rule, dtype, is_scalar, products: list, extras: list, shared: tuple):
    """Solve all units as one row, with NumPy or jax.numpy.

    Args:
      xp: NumPy or jax.numpy
      rule: see `merge`
      dtype: dtype of the results, float32 or float64
      is_scalar: [U] bool
      products: for each unit, the products of its tensors, [N (N + 1) / 2, *unit shape]
      extras: for each unit, its further inputs, [*unit shape]
      shared: further inputs of the rule

    Returns:
      `Rows`, and the packed update, [K, U]
    """

    def join(arrays):
        return xp.concatenate([x.reshape(len(x), -1) for x in arrays], axis=1).astype(dtype)

    gram = gram_matrix(join([functools.reduce(xp.add, group) for group in products]))
    valid = xp.isfinite(geometry.squared_norms(gram)).all(axis=0)
    if all(len(group) == 1 for group in products):
        by_tensor = gram
    else:
        by_tensor = gram_matrix(join([x for group in products for x in group]))
    columns = [
        xp.concatenate([x.reshape(1, -1) for x in c], axis=1)[0] for c in zip(*extras, strict=True)
    ]
    inputs = (
        xp.where(valid[None, None], gram, 0.0), valid, xp.asarray(is_scalar), columns, shared
    )  # fmt: skip

    def solve(gram, valid, is_scalar, extras, shared, *, narrow):
        shared = [x.value + x.rest if isinstance(x, Exact) else x for x in shared]
        solution = rule(gram, is_scalar, *extras, *shared)
        return _without_non_finite(solution, valid), _pack(solution, valid, narrow=narrow)

    solve_wide = functools.partial(solve, narrow=dtype == np.float32)
    if xp is np:
        solution, update = _in_numpy_float64(solve_wide, inputs, dtype)
    else:
        solution, update = in_float64(
            solve_wide, derivative_of=functools.partial(solve, narrow=False), dtype=dtype
        )(*inputs)
    finite = xp.isfinite(geometry.squared_norms(by_tensor))
    rows = Rows(
        solution.cosine,
        solution.ratio,
        solution.norm,
        solution.distance,
        solution.outcome,
        finite,
    )
    return rows, update


def _in_numpy_float64(function: Callable, arguments: tuple, dtype: Any):
    """Evaluate a function in float64 and convert its floating results to `dtype`."""

    def convert(x, dtype):
        x = np.asarray(x)
        return x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x

    result = function(*jax.tree.map(lambda x: convert(x, np.float64), arguments))
    return jax.tree.map(lambda x: convert(x, dtype), result)


def _without_non_finite(solution: UnitSolution, valid) -> UnitSolution:
    """Return the solution of a row with the anchor in units that are not finite."""
    xp = geometry.namespace(solution.ratio)
    return solution._replace(
        ratio=xp.where(valid, solution.ratio, 0.0),
        distance=geometry.Distances(
            *(xp.where(valid, d, geometry.DISTANCE_UNDEFINED) for d in solution.distance)
        ),
        outcome=xp.where(valid, solution.outcome, np.int8(UnitOutcome.NON_FINITE)),
    )


def _pack(solution: UnitSolution, valid, *, narrow: bool):
    """Return what the weights of a unit follow from, as one array [2 N + 1 or 2 N + 2, U].

    The rows are the fields of `Update` and the carried state, if there is one. One array per unit
    is one output of the branch in `_split_apart`.

    Args:
      solution: of a row of units, in float64
      valid: whether the unit is finite, [U]
      narrow: whether the result is rounded to float32 afterwards
    """
    xp = geometry.namespace(solution.ratio)
    coefficient = xp.where(valid[None], solution.coefficient, 0.0)
    if not narrow:
        rounded = coefficient
    elif xp is np:
        rounded = coefficient.astype(np.float32).astype(np.float64)
    else:  # XLA may leave out a pair of conversions
        rounded = jax.lax.reduce_precision(coefficient, exponent_bits=8, mantissa_bits=23)
    copied = solution.copy_replica & valid[None]
    index = xp.arange(len(copied), dtype=coefficient.dtype)[:, None]
    source = xp.where(copied.any(axis=0), xp.sum(xp.where(copied, index, 0.0), axis=0), COMPUTED)
    source = xp.where(solution.keep_anchor | ~valid, float(len(copied)), source)
    rows = [rounded, coefficient - rounded, source[None]]
    if solution.carry is not None:
        rows.append(solution.carry[None])
    return xp.concatenate(rows)


def _split(row, sizes: Sequence[int]) -> list:
    """Split an array [K, U] into arrays [K, size]."""
    ends = np.cumsum([0, *sizes])
    pairs = zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    if isinstance(row, np.ndarray):
        return [row[:, start:stop] for start, stop in pairs]
    return [jax.lax.slice_in_dim(row, start, stop, axis=1) for start, stop in pairs]


def _split_apart(row, sizes: Sequence[int]) -> list:
    """Split an array [K, U] into arrays [K, size], each a separate array in the program.

    XLA would fuse each slice into the functions that read it, and compile one of them per tensor,
    because every slice starts elsewhere. It does not fuse through a branch, so that the tensors of
    one shape share one compiled function. Both branches are the same: the condition has no effect.
    In chunks, because the slices of all chunks are alike, too.
    """

    def apart(row, sizes):
        split = functools.partial(_split, sizes=sizes)
        return jax.lax.cond(row[-1, 0] == row[-1, 0], split, split, row)

    length = math.isqrt(len(sizes)) + 1
    chunks = [sizes[first : first + length] for first in range(0, len(sizes), length)]
    joined = apart(row, [sum(chunk) for chunk in chunks])
    return [part for x, chunk in zip(joined, chunks, strict=True) for part in apart(x, chunk)]


def _add_up(names, pretrained, finetuned, updates, views, dtype) -> list:
    del names
    return [
        _apply(w0, w, update, unit_view=view, dtype=dtype)
        for w0, w, update, view in zip(pretrained, finetuned, updates, views, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("unit_view", "dtype"))
def _apply(pretrained, finetuned, packed, *, unit_view: units.UnitView, dtype):
    update = unpack(packed, len(finetuned))
    return add_task_vectors(pretrained, finetuned, update, unit_view=unit_view, dtype=dtype)


def or_anchor(merged, pretrained, packed, num_replicas: int, unit_view: units.UnitView):
    """Return the merged weights of a tensor, with the anchor's in the units that keep them.

    Args:
      merged: [...], or in the shape of the view
      pretrained: w0, [...]
      packed: packed `Update` of the tensor's units
      num_replicas: N
      unit_view: how the tensor is split into units
    """
    anchor = cast(pretrained, merged.dtype).reshape(unit_view.view)
    keep_anchor = unpack(packed, num_replicas).source == num_replicas
    keep_anchor = jnp.expand_dims(unit_view.swap(keep_anchor), unit_view.axes)
    merged = jnp.where(keep_anchor, anchor, merged.reshape(unit_view.view))
    return merged.reshape(pretrained.shape)


def _num_rows(num_replicas: int) -> int:
    """Return the number of rows of a packed `Update` without carried state."""
    return 2 * num_replicas + 1


def unpack(packed: Any, num_replicas: int) -> Update:
    """Return the `Update` of a unit from its packed form."""
    n = num_replicas
    return Update(packed[:n], packed[n : 2 * n], packed[2 * n])


def _copy_anchor(array, dtype):
    return cast(array, dtype) if is_float(array) and dtype is not None else array


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
    changing, groups = _group_by_unit(_unit_views(leaves, unit, unit_options))
    zeros = np.zeros((leaves.num_replicas,) * 2, np.float32)
    grams: list[Any] = [jax.device_put(zeros)] * len(leaves.names)
    for group in groups:
        gram = total([_unit_products(leaves, k, changing[k]) for k in group])
        for k in group:
            grams[k] = _gram_matrix(gram)
    return leaves.treedef.unflatten(grams)


_gram_matrix = jax.jit(gram_matrix)


def total(arrays: Sequence[Any]) -> Any:
    """Return the sum of arrays of one shape, which may be on different devices."""
    if len(arrays) == 1:
        return arrays[0]
    if on_this_host(arrays):
        with np.errstate(all="ignore"):  # as JAX does
            return jax.device_put(functools.reduce(np.add, jax.device_get(list(arrays))))
    return functools.reduce(jnp.add, [replicate(x) for x in arrays])


def unit_zeros(
    pretrained: PyTree, unit: str | units.UnitFunction = "tensor", **unit_options: Any
) -> PyTree:
    """Return a tree of zeros with the shapes of the units, for state between merges."""
    check_leaves(pretrained, "pretrained", allow_shapes=True)

    def zeros(pretrained):
        models = jax.tree.map(lambda x: jnp.asarray(x)[None], pretrained)
        leaves = pair_leaves(pretrained, models, 1)
        views = _unit_views(leaves, unit, unit_options)
        shapes = [() if view is None else view.unit_shape for view in views]
        return leaves.treedef.unflatten([jnp.zeros(shape) for shape in shapes])

    shapes = jax.eval_shape(zeros, pretrained)  # needs only names and shapes: copies no weights
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), shapes)


def _unit_views(leaves: Leaves, unit, unit_options) -> list[units.UnitView | None]:
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
