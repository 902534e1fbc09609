"""Solutions of all units at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.merging import geometry
from modelstock_jax.merging.policy import Policy
from modelstock_jax.merging.precision import widened
from modelstock_jax.merging.replicas import is_float
from modelstock_jax.merging.solution import Solution

Method = Callable[..., Solution]


def solve_units(
    method: Method, grams: list, single: Sequence[bool], own: list, shared: tuple
) -> list[Solution]:
    """Solve every unit by `method(gram, single, *own, *shared)`.

    Args:
      method: a module-level function; it is static under jit.
      grams: for each unit a list of its tensors' Gram matrices, [N, N, *unit shape]; their sum is
        the unit's.
      single: for each unit, whether it holds fewer than two numbers.
      own: for each unit its own further inputs, of the unit's shape.
      shared: further inputs that are the same for all units.

    Returns:
      A `Solution` for each unit, of its shape and dtype.
    """
    row = _solve(grams, own, shared, method=method, single=tuple(single))
    if on_this_host(row):
        row = jax.device_get(row)  # cut without compiling a slice for each number
    return _cut(row, grams)


@functools.partial(jax.jit, static_argnames=("method", "single"))
def _solve(grams, own, shared, *, method: Method, single: tuple[bool, ...]) -> Solution:
    """All units as one row, so that the algebra is compiled once and not once a tensor."""
    totals = [functools.reduce(jnp.add, group) for group in grams] or [jnp.zeros((2, 2, 0))]
    gram = jnp.concatenate([t.reshape(*t.shape[:2], -1) for t in totals], axis=-1)
    own = [jnp.concatenate([jnp.ravel(x) for x in rows]) for rows in zip(*own, strict=True)]
    sizes = [math.prod(total.shape[2:]) for total in totals]
    alone = np.repeat(np.array(single, bool), sizes if grams else 0)
    finite = jnp.isfinite(geometry.squared_norms(gram)).all(axis=0)

    def solve(gram, *args):
        row = widened(method)(gram, *args)
        return row._replace(
            coefficient=jnp.where(finite[None], row.coefficient, 0.0),
            exact=row.exact & finite[None],
            hold=row.hold | ~finite,
            ratio=jnp.where(finite, row.ratio, 0.0),
            policy=jnp.where(finite, row.policy, jnp.int8(Policy.NON_FINITE)),
        )

    inputs = (jnp.where(finite[None, None], gram, 0.0), jnp.asarray(alone), *own, *shared)
    nothing = _nothing(jax.eval_shape(solve, *inputs))
    # A branch, for the compiler would fuse a copy of the algebra into every slice of its result.
    return jax.lax.cond(finite.any(), solve, lambda *_: nothing, *inputs)


def _cut(row: Solution, grams) -> list[Solution]:
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


def on_this_host(tree: Any) -> bool:
    """Whether every array is concrete, and here to be read."""
    return all(
        not isinstance(x, jax.core.Tracer) and x.is_fully_addressable for x in jax.tree.leaves(tree)
    )


def _nothing(shapes: Solution) -> Solution:
    """The answer where no unit is finite."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return zeros._replace(
        hold=jnp.ones_like(zeros.hold),
        cosine=jnp.full_like(zeros.cosine, geometry.COSINE_UNDEFINED),
        policy=jnp.full_like(zeros.policy, Policy.NON_FINITE),
    )
