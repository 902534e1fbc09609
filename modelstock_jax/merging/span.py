"""Trainable weight averaging: the span of a run's weights, as a space of few coordinates."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging.gram import cast
from modelstock_jax.merging.precision import widened
from modelstock_jax.merging.replicas import is_float
from modelstock_jax.merging.solver import on_this_host


class Span(NamedTuple):
    """Solutions w_1 .. w_n and the orthonormal basis e_k = sum_j basis[k, j] w_j of their span."""

    solutions: Any  # [n, ...] a leaf
    basis: jax.Array  # [n, n], lower triangular


def twa_span(solutions: Any) -> Span:
    """Trainable weight averaging (Li et al. 2023, arXiv 2205.13104, algorithm 1): its subspace.

    The solutions of one run are orthonormalised (Gram-Schmidt, in the order given), P = [e_k],
    and from their mean on training goes on inside their span alone:

        w <- w - lr P P^T grad L(w)

    That is gradient descent on the n coordinates c of w = sum_k c_k e_k, whose gradient is
    P^T grad L. So a loop needs no projection: it differentiates `loss(twa_params(span, c))` in c
    and hands the gradient to any optax optimizer; SGD, with momentum or without, is the paper's.
    `twa_coefficients` turns c into the averaging weights of the solutions.

    Args:
      solutions: weights along a run, `stack_replicas([...])`: [n, ...] a leaf.

    Raises:
      UserError: solutions that are not linearly independent.

    Example:
      >>> span = twa_span({"w": jnp.array([[3.0, 0.0], [3.0, 4.0]])})
      >>> c = twa_init(span)
      >>> c.tolist(), twa_params(span, c)["w"].tolist()
      ([3.0, 2.0], [3.0, 2.0])
      >>> [round(float(b), 3) for b in twa_coefficients(span, c)]
      [0.5, 0.5]
    """
    leaves = [jnp.asarray(w) for w in jax.tree.leaves(solutions)]
    leaves = [w for w in leaves if is_float(w) and w.size]
    if not leaves or any(len(w) != len(leaves[0]) for w in leaves):
        raise UserError("solutions must be floating arrays with one leading axis of one length: "
                        "pass stack_replicas([...])")
    basis = _orthonormal([w.astype(jnp.promote_types(w.dtype, jnp.float32)) for w in leaves])
    if on_this_host(basis) and not bool(jnp.isfinite(basis).all()):
        raise UserError("the solutions are not linearly independent (two of them equal?), or not "
                        "finite; leave some out")
    return Span(solutions, basis)


def twa_init(span: Span) -> jax.Array:
    """Coordinates [n] of the mean of the solutions, where training starts."""
    number = len(span.basis)
    # e = C w, so w's mean is the mean of the rows of C^-1.
    return widened(lambda c: jnp.linalg.solve(c.T, jnp.full(number, 1.0 / number, c.dtype)))(
        span.basis)


def twa_params(span: Span, coordinates: Any) -> Any:
    """Weights at coordinates [n]; differentiable in them. The rest is the last solution's."""
    coefficients = twa_coefficients(span, coordinates)

    def combine(solutions):
        solutions = jnp.asarray(solutions)
        if not is_float(solutions):
            return solutions[-1]
        wide = solutions.astype(jnp.promote_types(solutions.dtype, coefficients.dtype))
        return cast(widened(_weighted)(wide, coefficients), solutions.dtype)

    return jax.tree.map(combine, span.solutions)


def twa_coefficients(span: Span, coordinates: Any) -> jax.Array:
    """Averaging weights beta [n] of w = sum_j beta_j w_j at coordinates [n]."""
    return widened(lambda c, basis: jnp.sum(c[:, None] * basis, axis=0))(
        jnp.asarray(coordinates, span.basis.dtype), span.basis)


def _weighted(solutions, coefficients):
    return sum(c * w for c, w in zip(coefficients, solutions, strict=True))


@jax.jit
def _orthonormal(leaves: list) -> jax.Array:
    """Gram-Schmidt from products alone: with W W^T = L L^T the basis is L^-1 W."""
    def invert(leaves):
        gram = functools.reduce(
            jnp.add,
            [jnp.sum(w[:, None] * w[None], axis=tuple(range(2, w.ndim + 1))) for w in leaves],
        )
        factor = jnp.linalg.cholesky(gram)
        identity = jnp.eye(len(gram), dtype=gram.dtype)
        return jax.scipy.linalg.solve_triangular(factor, identity, lower=True)

    return widened(invert)(leaves)
