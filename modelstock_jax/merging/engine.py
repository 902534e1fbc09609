"""One engine for every merge: Gram matrix, coefficients a_i, then w0 + sum_i a_i d_i.

A method is a function from a unit's Gram matrix to a `Solution`. All else is here: units, dtypes,
what is kept as it is, and that nothing non-finite reaches the merged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging import geometry, units
from modelstock_jax.merging.gram import add_task_vectors, cast, gram_matrix
from modelstock_jax.merging.precision import widened
from modelstock_jax.merging.replicas import Leaves, is_float, pair_leaves
from modelstock_jax.merging.solution import Solution
from modelstock_jax.merging.stats import Policy, Stats, UnitTable, check_finite

Method = Callable[..., Solution]


def merge(
    method: Method,
    pretrained: Any,
    finetuned: Any,
    *extras: Any,
    shared: tuple = (),
    unit: str = "tensor",
    num_heads: int | Mapping[str, int] | None = None,
    filter_axis: int = -1,
    dtype: Any = None,
    least: int = 2,
) -> tuple[Any, Stats, Any]:
    """Merge replicas with the anchor by `method(gram, single, *extras of the unit, *shared)`.

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
      least: least number of replicas.

    Returns:
      merged tree, `Stats`, and the tree of what the method carries on (of zeros where nothing).
    """
    leaves = pair_leaves(pretrained, finetuned, least)
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise UserError(f"dtype must be a floating dtype, not {jnp.dtype(dtype)}")
    parts = _assign(leaves, unit, num_heads, filter_axis)
    extras = [leaves.treedef.flatten_up_to(extra) for extra in extras]
    merged, solutions, finite = [[None] * len(leaves.names) for _ in range(3)]

    members: dict[str, list[int]] = {}
    for k, part in enumerate(parts):
        if part is None:
            merged[k] = _kept(leaves.pretrained[k], dtype)
            solutions[k] = _kept_solution(leaves.num_replicas)
            finite[k] = jnp.ones(leaves.num_replicas, bool)
        else:
            members.setdefault(part.key, []).append(k)

    for group in members.values():
        grams = [gram_matrix(leaves.pretrained[k], leaves.finetuned[k], parts[k]) for k in group]
        wide = jnp.result_type(*grams)
        single = sum(parts[k].count for k in group) < 2
        own = [extra[group[0]] for extra in extras]
        solution = _solve(method, sum(g.astype(wide) for g in grams), single, *own, *shared)
        for k, gram in zip(group, grams, strict=True):
            finite[k] = jnp.isfinite(geometry.squared_norms(gram))
            solutions[k] = solution
            merged[k] = add_task_vectors(
                leaves.pretrained[k], leaves.finetuned[k],
                solution.coefficient, solution.exact, solution.hold,
                part=parts[k], dtype=dtype,
            )

    stats = _collect(leaves, parts, solutions, finite, unit)
    if not any(isinstance(x, jax.core.Tracer) for x in (*merged, *jax.tree.leaves(stats))):
        check_finite(stats, pretrained)
    carry = leaves.treedef.unflatten(
        [jnp.zeros((), s.norm.dtype) if s.carry is None else s.carry for s in solutions]
    )
    return leaves.treedef.unflatten(merged), stats, carry


def unit_grams(
    pretrained: Any,
    models: Any,
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
            grams[part.key] = grams.get(part.key, 0.0) + gram_matrix(w0, w, part)
    nothing = jnp.zeros((leaves.num_replicas, leaves.num_replicas))
    return leaves.treedef.unflatten([nothing if p is None else grams[p.key] for p in parts])


def unit_zeros(
    pretrained: Any,
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


def _assign(leaves: Leaves, unit, num_heads, filter_axis) -> list[units.Part | None]:
    """Parts of the tensors that a merge moves; None for those that it keeps."""
    moves = [is_float(w) and w.size > 0 for w in leaves.pretrained]
    shapes = [(name, w.shape) for name, w, m in
              zip(leaves.names, leaves.pretrained, moves, strict=True) if m]
    if not shapes:
        return [None] * len(moves)
    found = iter(units.assign(shapes, unit, num_heads=num_heads, filter_axis=filter_axis))
    return [next(found) if m else None for m in moves]


@partial(jax.jit, static_argnums=(0, 2))
def _solve(method: Method, gram, single: bool, *args) -> Solution:
    """Solve where the Gram matrix is finite; elsewhere hold the anchor."""
    finite = jnp.isfinite(geometry.squared_norms(gram)).all(axis=0)
    gram = jnp.where(finite[None, None], gram, 0.0)
    solution = widened(lambda gram, *args: method(gram, single, *args))(gram, *args)
    return solution._replace(
        coefficient=jnp.where(finite[None], solution.coefficient, 0.0),
        exact=solution.exact & finite[None],
        hold=solution.hold | ~finite,
        ratio=jnp.where(finite, solution.ratio, 0.0),
        policy=jnp.where(finite, solution.policy, jnp.int8(Policy.NON_FINITE)),
    )


def _kept(array, dtype):
    return cast(array, jnp.dtype(dtype)) if is_float(array) and dtype is not None else array


def _kept_solution(num_replicas: int) -> Solution:
    zero, none = jnp.zeros(()), jnp.zeros(num_replicas)
    undefined = jnp.full((), geometry.DISTANCE_UNDEFINED)
    return Solution(
        none, none > 0, zero == 0, jnp.full((), geometry.COSINE_UNDEFINED), zero, none,
        geometry.Distances(undefined, undefined, undefined), jnp.int8(Policy.KEPT), None,
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
        policy=tree([s.policy for s in solutions]),
        finite=tree(finite),
        units=UnitTable(unit, leaves.names, keys),
    )
