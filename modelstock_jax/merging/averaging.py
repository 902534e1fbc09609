"""Averages of the weights along one run: EMA, SWA, SWAD, and trainable averaging (TWA).

The first three are functions init, update and value, usable in any jitted loop; TWA trains in the
span of weights that are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging.engine import on_this_host
from modelstock_jax.merging.gram import PyTree, cast, compute_dtype, in_float64, is_float


class Average(NamedTuple):
    """A running average of weights; pure functions, for use inside or outside of jit.

    `init(params) -> state`, `update(state, params) -> state` after each step, and
    `value(state, params) -> averaged weights` in the dtypes of `params`. What is not floating is
    the last seen. All work on replicas as well: a leading axis is averaged along with the rest.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    value: Callable[[Any, Any], Any]


class EmaState(NamedTuple):
    """The average, float32 or float64."""

    mean: PyTree


def ema(decay: Any) -> Average:
    """Exponential moving average of the weights, from the first ones on.

        e_0 = w_0,    e_n = decay e_{n-1} + (1 - decay) w_n

    WARP's anchor in training (arXiv 2406.16768, section 3.1) is this one with decay 1 - mu.

    Args:
      decay: in [0, 1), a number or a traced array.

    Raises:
      UserError: another decay.

    Example:
      >>> average = ema(0.9)
      >>> state = average.init({"w": jnp.zeros(1)})
      >>> state = average.update(state, {"w": jnp.ones(1)})
      >>> round(float(average.value(state, {"w": jnp.ones(1)})["w"][0]), 3)
      0.1
    """
    if not isinstance(decay, jax.core.Tracer) and not 0.0 <= float(decay) < 1.0:
        raise UserError(f"decay must lie in [0, 1), not {float(decay):g}")

    def update(state: EmaState, params: PyTree) -> EmaState:
        return EmaState(toward(state.mean, params, 1.0 - decay))

    return Average(
        init=lambda params: EmaState(widest(params)),
        update=update,
        value=lambda state, params: rounded(state.mean, params),
    )


class SwaState(NamedTuple):
    """The mean, how many models it is of, and how many steps there were."""

    mean: PyTree
    count: jax.Array
    step: jax.Array


def swa(start: int = 0, period: int = 1) -> Average:
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407, algorithm 1).

        w_swa <- (n w_swa + w) / (n + 1),    n <- n + 1        every `period` steps from `start` on

    The weights given to `init` are step 0, so with the defaults they are the first model of the
    mean, as in the algorithm. The learning rate is the loop's own: the paper's is constant or
    cyclical, a period of the average being one cycle. Models with batch normalization need its
    statistics computed anew for the mean.

    Args:
      start: step from which weights are averaged.
      period: c, steps from one averaged model to the next.

    Raises:
      UserError: a negative start or a period below 1.

    Example:
      >>> average = swa(start=1)
      >>> state = average.init({"w": jnp.zeros(1)})
      >>> for w in (2.0, 4.0, 9.0):
      ...     state = average.update(state, {"w": jnp.array([w])})
      >>> average.value(state, {"w": jnp.zeros(1)})["w"].tolist()
      [5.0]
    """
    if start < 0 or period < 1:
        raise UserError(f"start must be 0 or more and period 1 or more, not {start} and {period}")

    def init(params: PyTree) -> SwaState:
        return SwaState(widest(params), jnp.int32(start == 0), jnp.int32(0))

    def update(state: SwaState, params: PyTree) -> SwaState:
        step = state.step + 1
        taken = (step >= start) & ((step - start) % period == 0)
        count = state.count + taken
        share = jnp.where(taken, 1.0 / jnp.maximum(count, 1), 0.0)
        return SwaState(toward(state.mean, params, share), count, step)

    def value(state: SwaState, params: PyTree) -> Any:
        return rounded(state.mean, params)

    return Average(init, update, value)


def widest(params: PyTree) -> Any:
    """A tree with its floating arrays in the dtype of averages, float32 or float64."""
    return jax.tree.map(
        lambda w: w.astype(compute_dtype(w.dtype)) if is_float(w) else w,
        jax.tree.map(jnp.asarray, params),
    )


def toward(mean: PyTree, params: PyTree, share: Any) -> Any:
    """Move every floating array a share of the way to params'; the rest is params' own."""

    def step(mean, w):
        w = jnp.asarray(w)
        return blend(mean, w.astype(mean.dtype), share) if is_float(w) else w

    return jax.tree.map(step, mean, params)


def blend(a: jax.Array, b: jax.Array, share: Any) -> jax.Array:
    """The line a + share (b - a); an end of share 0 does not count, be it NaN."""
    share = jnp.asarray(share, a.dtype)
    return jnp.where(share <= 0, a, jnp.where(share >= 1, b, a + share * (b - a)))


def rounded(mean: PyTree, params: PyTree) -> Any:
    """An average in the dtypes of params."""
    return jax.tree.map(
        lambda m, w: cast(m, jnp.result_type(w)) if is_float(m) else m, mean, params
    )


# SWAD: a dense average of one run's weights over the valley of its validation loss.


class SWAD(NamedTuple):
    """`swad`'s functions; as `Average`, and `validate(state, loss) -> state`."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    validate: Callable[[Any, Any], Any]
    value: Callable[[Any, Any], Any]


class Segments(NamedTuple):
    """Means of the weights between validations, with the number of weights in each."""

    mean: PyTree  # [K, ...] a leaf
    count: jax.Array  # [K] int32
    loss: jax.Array  # [K], at the segment's end


class SwadState(NamedTuple):
    """What SWAD must remember: max(n_s, n_e) + 2 models."""

    open: Any  # mean of the weights since the last validation
    open_count: jax.Array
    last: Segments  # the last max(n_s, n_e) segments, oldest first
    total: Any  # mean of the segments before those that are averaged
    total_count: jax.Array
    step: jax.Array  # updates so far
    validations: jax.Array
    threshold: jax.Array  # l; infinite until the loss has converged
    start: jax.Array  # weights start <= k < end of the updates, counted from 0, are averaged
    end: jax.Array  # -1 while it is not known
    converged: jax.Array
    done: jax.Array


def swad(n_s: int = 3, n_e: int = 6, r: float = 1.3) -> SWAD:
    """Stochastic weight averaging densely (Cha et al. 2021, arXiv 2102.08604, algorithm 1).

    Every step's weights are averaged, from t_s to t_e, which the validation losses E_i give:

        t_s   the first i whose loss is the least of E_i .. E_{i + n_s - 1}
        l     = r mean(E_{t_s} .. E_{t_s + n_s - 1})
        t_e   = i - n_e at the first later i with l < min(E_{i - n_e + 1} .. E_i)

    Where the loss never converged all weights are averaged, and where it never rose again all
    from t_s on: the algorithm's own defaults. The algorithm validates after every step; here it
    may be more seldom: an i is then a validation, and stands for the weights since the one
    before. `state.start` and `state.end` say which updates were taken. A loss that is NaN counts as
    infinite: a run that diverges has left the valley.

    Args:
      n_s: optimum patience, in validations; 3 in the paper.
      n_e: overfit patience; 6 in the paper.
      r: tolerance, at least 1; 1.3 in the paper (1.2 for one data set). Losses must be positive.

    Raises:
      UserError: a patience below 1 or a tolerance below 1.

    Example:
      >>> average = swad(n_s=1, n_e=1, r=1.5)
      >>> state = average.init({"w": jnp.zeros(1)})
      >>> for w, loss in [(1.0, 1.0), (2.0, 1.2), (6.0, 1.1), (50.0, 9.0)]:
      ...     state = average.validate(average.update(state, {"w": jnp.array([w])}), loss)
      >>> average.value(state, {"w": jnp.zeros(1)})["w"].tolist(), int(state.start), int(state.end)
      ([3.0], 0, 3)
    """
    if n_s < 1 or n_e < 1:
        raise UserError(f"n_s and n_e must be 1 or more, not {n_s} and {n_e}")
    if not r >= 1.0:
        raise UserError(f"r must be at least 1, not {r:g}: the valley would end before its floor")
    length = max(n_s, n_e)

    def init(params: PyTree) -> SwadState:
        params, zero = widest(params), jnp.int32(0)
        no = jnp.asarray(False)
        mean = jax.tree.map(lambda w: jnp.zeros((length, *w.shape), w.dtype), params)
        last = Segments(mean, jnp.zeros(length, jnp.int32), jnp.full(length, jnp.inf))
        return SwadState(
            params,
            zero,
            last,
            params,
            zero,
            zero,
            zero,
            jnp.asarray(jnp.inf),
            zero,
            jnp.int32(-1),
            no,
            no,
        )

    def validate(state: SwadState, loss: Any) -> SwadState:
        oldest = jax.tree.map(lambda x: x[0], state.last.mean)
        total, total_count = _joined(state.total, state.total_count, oldest, state.last.count[0])
        loss = jnp.asarray(loss, state.last.loss.dtype)
        losses = _pushed(state.last.loss, jnp.where(jnp.isnan(loss), jnp.inf, loss))
        count = _pushed(state.last.count, state.open_count)
        mean = jax.tree.map(_pushed, state.last.mean, state.open)
        validations, slot = state.validations + 1, jnp.arange(length)

        recent = losses[length - n_s :]
        found = ~state.converged & (validations >= n_s) & (recent[0] <= recent.min())
        ended = state.converged & (state.threshold < losses[length - n_e :].min())
        count = jnp.where(found & (slot < length - n_s), 0, count)
        count = jnp.where(ended & (slot >= length - n_e), 0, count)
        start = jnp.where(found, state.step - count[length - n_s :].sum(), state.start)
        total_count = jnp.where(found, 0, total_count)
        new = state._replace(
            open_count=jnp.zeros_like(state.open_count),
            last=Segments(mean, count, losses),
            total=total,
            total_count=total_count,
            validations=validations,
            threshold=jnp.where(found, r * recent.mean(), state.threshold),
            start=start,
            end=jnp.where(ended, start + total_count + count.sum(), state.end),
            converged=state.converged | found,
            done=ended,
        )
        return jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, new)

    return SWAD(init, _swad_update, validate, _swad_value)


def _swad_update(state: SwadState, params: PyTree) -> SwadState:
    more = jnp.logical_not(state.done)
    count = state.open_count + more
    share = jnp.where(more, 1.0 / jnp.maximum(count, 1), 0.0)
    return state._replace(
        open=toward(state.open, params, share), open_count=count, step=state.step + 1
    )


def _swad_value(state: SwadState, params: PyTree) -> Any:
    counts = jnp.concatenate([state.total_count[None], state.last.count, state.open_count[None]])
    nothing = counts.sum() == 0
    shares = counts.at[0].add(nothing) / jnp.maximum(counts.sum(), 1)

    def mean(total, last, latest):
        if not is_float(total):
            return latest
        every = jnp.concatenate([total[None], last, latest[None]])
        share = shares.astype(total.dtype).reshape(shares.shape + (1,) * total.ndim)
        return jnp.sum(jnp.where(share > 0, share * every, 0), axis=0)

    return rounded(jax.tree.map(mean, state.total, state.last.mean, state.open), params)


def _joined(a: PyTree, a_count, b: PyTree, b_count):
    """Mean and number of two groups of models."""
    count = a_count + b_count
    share = b_count / jnp.maximum(count, 1)

    def join(a, b):
        return blend(a, b, share) if is_float(a) else jnp.where(b_count > 0, b, a)

    return jax.tree.map(join, a, b), count


def _pushed(row, new):
    return jnp.concatenate([row[1:], new[None]])


# Trainable weight averaging: the span of a run's weights, as a space of few coordinates.


class TWASubspace(NamedTuple):
    """Solutions w_1 .. w_n and the orthonormal basis e_k = sum_j basis[k, j] w_j of their span."""

    solutions: Any  # [n, ...] a leaf
    basis: jax.Array  # [n, n], lower triangular


def twa_span(solutions: Any) -> TWASubspace:
    """Trainable weight averaging (Li et al. 2023, arXiv 2205.13104, algorithm 1): its subspace.

    The solutions of one run are orthonormalized (Gram-Schmidt, in the order given), P = [e_k],
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
        raise UserError(
            "solutions must be floating arrays with one leading axis of one length: "
            "pass stack_replicas([...])"
        )
    basis = _orthonormal([w.astype(jnp.promote_types(w.dtype, jnp.float32)) for w in leaves])
    if on_this_host(basis) and not bool(jnp.isfinite(basis).all()):
        raise UserError(
            "the solutions are not linearly independent (two of them equal?), or not "
            "finite; leave some out"
        )
    return TWASubspace(solutions, basis)


def twa_init(span: TWASubspace) -> jax.Array:
    """Coordinates [n] of the mean of the solutions, where training starts."""
    number = len(span.basis)
    # e = C w, so w's mean is the mean of the rows of C^-1.
    return in_float64(lambda c: jnp.linalg.solve(c.T, jnp.full(number, 1.0 / number, c.dtype)))(
        span.basis
    )


def twa_params(span: TWASubspace, coordinates: Any) -> Any:
    """Weights at coordinates [n]; differentiable in them. The rest is the last solution's."""
    coefficients = twa_coefficients(span, coordinates)

    def combine(solutions):
        solutions = jnp.asarray(solutions)
        if not is_float(solutions):
            return solutions[-1]
        wide = solutions.astype(jnp.promote_types(solutions.dtype, coefficients.dtype))
        return cast(in_float64(_weighted)(wide, coefficients), solutions.dtype)

    return jax.tree.map(combine, span.solutions)


def twa_coefficients(span: TWASubspace, coordinates: Any) -> jax.Array:
    """Averaging weights beta [n] of w = sum_j beta_j w_j at coordinates [n]."""
    return in_float64(lambda c, basis: jnp.sum(c[:, None] * basis, axis=0))(
        jnp.asarray(coordinates, span.basis.dtype), span.basis
    )


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

    return in_float64(invert)(leaves)
