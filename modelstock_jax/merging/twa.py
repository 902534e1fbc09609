"""Trainable weight averaging (TWA): training in the span of given weights."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from modelstock_jax.errors import UserError
from modelstock_jax.merging.gram import cast, compute_dtype, in_float64
from modelstock_jax.merging.placement import colocate_replicas, on_this_host
from modelstock_jax.merging.summaries import summarize
from modelstock_jax.merging.trees import PyTree, is_float, to_arrays


class TWASubspace(NamedTuple):
    """Solutions w_1 .. w_n and an orthonormal basis e_k = sum_j basis[k, j] w_j of their span.

    Attributes:
      solutions: [n, ...] per leaf
      basis: [n, n], lower triangular
    """

    solutions: Any
    basis: jax.Array

    def __repr__(self) -> str:
        return summarize(self)


def twa_span(solutions: Any) -> TWASubspace:
    """Return the subspace of trainable weight averaging (Li et al. 2023, arXiv 2205.13104).

    Algorithm 1 of that paper orthonormalizes the solutions of one run (Gram-Schmidt, in the given
    order), P = [e_k]. Training then starts from their mean and stays in their span:

        w <- w - lr P P^T grad L(w)

    This is gradient descent on the n coordinates c of w = sum_k c_k e_k, whose gradient is
    P^T grad L. A training loop therefore needs no projection: differentiate
    `loss(twa_params(span, c))` with respect to c and pass the gradient to any optax optimizer. That
    paper uses SGD, with or without momentum. `twa_coefficients` converts c to the averaging weights
    of the solutions.

    Args:
      solutions: weights along a run, `stack_replicas([...])`: [n, ...] per leaf

    Raises:
      UserError: solutions that are not linearly independent

    Example:
      >>> span = twa_span({"w": jnp.array([[3.0, 0.0], [3.0, 4.0]])})
      >>> c = twa_init(span)
      >>> c.tolist(), twa_params(span, c)["w"].tolist()
      ([3.0, 2.0], [3.0, 2.0])
      >>> [round(float(b), 3) for b in twa_coefficients(span, c)]
      [0.5, 0.5]
    """
    solutions = to_arrays(solutions, "solutions")
    arrays = jax.tree.leaves(solutions)
    leaves = [w.astype(compute_dtype(w.dtype)) for w in arrays if is_float(w) and w.size]
    lengths = {w.shape[:1] for w in arrays}
    if not leaves or len(lengths) > 1 or () in lengths:
        raise UserError(
            "solutions must be floating arrays with leading axes of equal length; pass "
            "stack_replicas([...])"
        )
    with jax.debug_nans(False):  # NaN means linear dependence, and is checked here
        basis = _orthonormal([colocate_replicas(None, w)[1] for w in leaves])
    if on_this_host(basis) and not np.isfinite(jax.device_get(basis)).all():
        raise UserError(
            "the solutions are not finite or not linearly independent (are two of them equal?); "
            "leave some out"
        )
    return TWASubspace(solutions, basis)


def twa_init(span: TWASubspace) -> jax.Array:
    """Return the coordinates [n] of the mean of the solutions, where training starts."""
    return _mean_coordinates(span.basis)


@jax.jit
def _mean_coordinates(basis) -> jax.Array:
    # e = C w, so the coordinates of the mean of w are the mean of the rows of C^-1.
    count = len(basis)
    return in_float64(lambda c: jnp.linalg.solve(c.T, jnp.full(count, 1.0 / count, c.dtype)))(basis)


def twa_params(span: TWASubspace, coordinates: Any) -> PyTree:
    """Return the weights at coordinates [n]; differentiable with respect to the coordinates.

    Arrays that are not floating are copied from the last solution.
    """
    coefficients = twa_coefficients(span, coordinates)
    solutions = jax.tree.map(lambda w: colocate_replicas(None, w)[1], span.solutions)
    return jax.tree.map(lambda w: _combine(w, coefficients), solutions)


@jax.jit
def _combine(solutions, coefficients) -> jax.Array:
    if not is_float(solutions):
        return solutions[-1]
    wide = solutions.astype(compute_dtype(solutions.dtype, coefficients.dtype))
    return cast(in_float64(_weighted_sum)(wide, coefficients), solutions.dtype)


def twa_coefficients(span: TWASubspace, coordinates: Any) -> jax.Array:
    """Return the averaging weights beta [n] of w = sum_j beta_j w_j at coordinates [n].

    Raises:
      UserError: coordinates of another shape
    """
    coordinates = to_arrays(coordinates, "coordinates")
    count = len(span.basis)
    if np.shape(coordinates) != (count,):
        raise UserError(
            f"coordinates must have shape ({count},), one per solution, not {np.shape(coordinates)}"
        )
    return _coefficients(coordinates, span.basis)


@jax.jit
def _coefficients(coordinates, basis) -> jax.Array:
    return in_float64(lambda c, basis: jnp.sum(c[:, None] * basis, axis=0))(
        coordinates.astype(basis.dtype), basis
    )


def _weighted_sum(solutions, coefficients):
    return sum(c * w for c, w in zip(coefficients, solutions, strict=True))


@jax.jit
def _orthonormal(leaves: list) -> jax.Array:
    """Return Gram-Schmidt coefficients from products alone: W W^T = L L^T, the basis is L^-1 W."""

    def invert(leaves):
        gram = functools.reduce(
            jnp.add,
            [jnp.sum(w[:, None] * w[None], axis=tuple(range(2, w.ndim + 1))) for w in leaves],
        )
        factor = jnp.linalg.cholesky(gram)
        identity = jnp.eye(len(gram), dtype=gram.dtype)
        return jax.scipy.linalg.solve_triangular(factor, identity, lower=True)

    return in_float64(invert)(leaves)


# `jax.export` can serialize functions of it.
export.register_namedtuple_serialization(TWASubspace, serialized_name="modelstock_jax.TWASubspace")
