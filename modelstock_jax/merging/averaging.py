"""Averages of the weights along one run: EMA, SWA, SWAD, and trainable averaging (TWA).

The first three are pure functions init, update and value for any jitted loop. TWA trains in the
span of given weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging.gram import PyTree, cast, compute_dtype, in_float64, is_float
from modelstock_jax.merging.placement import on_this_host


class Average(NamedTuple):
    """A running average of weights, as pure functions for use inside or outside jit.

    Floating arrays are averaged; other arrays are copied from the last `params`. A leading replica
    axis is allowed: every replica has its own average.

    Attributes:
      init: `init(params) -> state`
      update: `update(state, params) -> state`, after each step
      value: `value(state, params) -> averaged weights`, in the dtypes of `params`
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    value: Callable[[Any, Any], Any]


class EmaState(NamedTuple):
    """State of `ema`.

    Attributes:
      mean: the average, float32 or float64
    """

    mean: PyTree


def ema(decay: Any) -> Average:
    """Return an exponential moving average of the weights, starting at the first weights.

        e_0 = w_0,    e_n = decay e_{n-1} + (1 - decay) w_n

    WARP's anchor during training (arXiv 2406.16768, section 3.1) is this average with decay 1 - mu.

    Args:
      decay: in [0, 1), a scalar or a traced array

    Raises:
      UserError: a decay outside [0, 1)

    Example:
      >>> average = ema(0.9)
      >>> state = average.init({"w": jnp.zeros(1)})
      >>> state = average.update(state, {"w": jnp.ones(1)})
      >>> round(float(average.value(state, {"w": jnp.ones(1)})["w"][0]), 3)
      0.1
    """
    if not isinstance(decay, jax.core.Tracer) and not 0.0 <= float(decay) < 1.0:
        raise UserError(f"decay must be in [0, 1), not {float(decay):g}")

    def update(state: EmaState, params: PyTree) -> EmaState:
        return EmaState(toward(state.mean, params, 1.0 - decay))

    return Average(
        init=lambda params: EmaState(widest(params)),
        update=update,
        value=lambda state, params: rounded(state.mean, params),
    )


class SwaState(NamedTuple):
    """State of `swa`.

    Attributes:
      mean: mean of the models so far
      count: number of models in the mean
      step: number of steps so far
    """

    mean: PyTree
    count: jax.Array
    step: jax.Array


def swa(start: int = 0, period: int = 1) -> Average:
    """Return stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407, algorithm 1).

        w_swa <- (n w_swa + w) / (n + 1),    n <- n + 1        every `period` steps from `start` on

    The weights passed to `init` are step 0. With the defaults they are the first model of the mean,
    as in the algorithm. The training loop sets the learning rate: it is constant or cyclical in
    that paper, with one cycle per period. For models with batch normalization, recompute its
    statistics for the mean.

    Args:
      start: first step to average
      period: c, number of steps between averaged models

    Raises:
      UserError: a negative start or a period below 1

    Example:
      >>> average = swa(start=1)
      >>> state = average.init({"w": jnp.zeros(1)})
      >>> for w in (2.0, 4.0, 9.0):
      ...     state = average.update(state, {"w": jnp.array([w])})
      >>> average.value(state, {"w": jnp.zeros(1)})["w"].tolist()
      [5.0]
    """
    if start < 0 or period < 1:
        raise UserError(f"start must be at least 0 and period at least 1, not {start} and {period}")

    def init(params: PyTree) -> SwaState:
        return SwaState(widest(params), jnp.int32(start == 0), jnp.int32(0))

    def update(state: SwaState, params: PyTree) -> SwaState:
        step = state.step + 1
        include = (step >= start) & ((step - start) % period == 0)
        count = state.count + include
        weight = jnp.where(include, 1.0 / jnp.maximum(count, 1), 0.0)
        return SwaState(toward(state.mean, params, weight), count, step)

    def value(state: SwaState, params: PyTree) -> Any:
        return rounded(state.mean, params)

    return Average(init, update, value)


def widest(params: PyTree) -> PyTree:
    """Cast the floating arrays of a tree to the dtype of averages, float32 or float64."""
    return jax.tree.map(
        lambda w: w.astype(compute_dtype(w.dtype)) if is_float(w) else w,
        jax.tree.map(jnp.asarray, params),
    )


def toward(mean: PyTree, params: PyTree, weight: Any) -> PyTree:
    """Interpolate every floating array from `mean` to `params`; copy other arrays from `params`."""

    def step(mean, w):
        w = jnp.asarray(w)
        return blend(mean, w.astype(mean.dtype), weight) if is_float(w) else w

    return jax.tree.map(step, mean, params)


def blend(a: jax.Array, b: jax.Array, weight: Any) -> jax.Array:
    """Return a + weight (b - a). An end with weight 0 has no effect, even if it is NaN."""
    weight = jnp.asarray(weight, a.dtype)
    return jnp.where(weight <= 0, a, jnp.where(weight >= 1, b, a + weight * (b - a)))


def rounded(mean: PyTree, params: PyTree) -> PyTree:
    """Cast an average to the dtypes of `params`."""
    return jax.tree.map(
        lambda m, w: cast(m, jnp.result_type(w)) if is_float(m) else m, mean, params
    )


class SWAD(NamedTuple):
    """The functions of `swad`: as `Average`, and `validate`.

    Attributes:
      init: `init(params) -> state`
      update: `update(state, params) -> state`, after each step
      validate: `validate(state, loss) -> state`, after each validation
      value: `value(state, params) -> averaged weights`, in the dtypes of `params`
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    validate: Callable[[Any, Any], Any]
    value: Callable[[Any, Any], Any]


class Segments(NamedTuple):
    """Means of the weights between validations.

    Attributes:
      mean: [K, ...] per leaf
      count: number of weights in each mean, [K] int32
      loss: validation loss at the end of each segment, [K]
    """

    mean: PyTree
    count: jax.Array
    loss: jax.Array


class SwadState(NamedTuple):
    """State of `swad`, max(n_s, n_e) + 2 models.

    Attributes:
      open: mean of the weights since the last validation
      open_count: number of weights in `open`
      last: the last max(n_s, n_e) segments, oldest first
      total: mean of the averaged segments before `last`
      total_count: number of weights in `total`
      step: number of updates so far
      validations: number of validations so far
      threshold: l; infinite until the loss has converged
      start: first averaged update, counted from 0
      end: one past the last averaged update; -1 while unknown
      converged: whether t_s is known
      done: whether t_e is known
    """

    open: Any
    open_count: jax.Array
    last: Segments
    total: Any
    total_count: jax.Array
    step: jax.Array
    validations: jax.Array
    threshold: jax.Array
    start: jax.Array
    end: jax.Array
    converged: jax.Array
    done: jax.Array


def swad(n_s: int = 3, n_e: int = 6, r: float = 1.3) -> SWAD:
    """Return stochastic weight averaging densely (Cha et al. 2021, arXiv 2102.08604, algorithm 1).

    Every step's weights from t_s to t_e are averaged. The validation losses E_i determine both:

        t_s   the first i such that E_i is the minimum of E_i .. E_{i + n_s - 1}
        l     = r mean(E_{t_s} .. E_{t_s + n_s - 1})
        t_e   = i - n_e at the first later i with l < min(E_{i - n_e + 1} .. E_i)

    If the loss never converges, all weights are averaged. If it never rises again, all weights from
    t_s on are averaged. Both are the defaults of the algorithm. The algorithm validates after every
    step. This function allows fewer validations: i then counts validations and represents all
    weights since the previous one. `state.start` and `state.end` give the averaged updates. A NaN
    loss counts as infinite: a run that diverges has left the valley of the loss.

    Args:
      n_s: optimum patience, in validations; 3 in that paper
      n_e: overfit patience, in validations; 6 in that paper
      r: tolerance, at least 1; 1.3 in that paper (1.2 for one dataset). Losses must be positive.

    Raises:
      UserError: a patience below 1 or a tolerance below 1

    Example:
      >>> average = swad(n_s=1, n_e=1, r=1.5)
      >>> state = average.init({"w": jnp.zeros(1)})
      >>> for w, loss in [(1.0, 1.0), (2.0, 1.2), (6.0, 1.1), (50.0, 9.0)]:
      ...     state = average.validate(average.update(state, {"w": jnp.array([w])}), loss)
      >>> average.value(state, {"w": jnp.zeros(1)})["w"].tolist(), int(state.start), int(state.end)
      ([3.0], 0, 3)
    """
    if n_s < 1 or n_e < 1:
        raise UserError(f"n_s and n_e must be at least 1, not {n_s} and {n_e}")
    if not r >= 1.0:
        raise UserError(
            f"r must be at least 1, not {r:g}: a smaller tolerance is below the converged loss"
        )
    return SWAD(
        functools.partial(_swad_init, max(n_s, n_e)),
        _swad_update,
        functools.partial(_swad_validate, n_s, n_e, r),
        _swad_value,
    )


def _swad_init(num_segments: int, params: PyTree) -> SwadState:
    params, zero = widest(params), jnp.int32(0)
    false = jnp.asarray(False)
    mean = jax.tree.map(lambda w: jnp.zeros((num_segments, *w.shape), w.dtype), params)
    return SwadState(
        open=params,
        open_count=zero,
        last=Segments(mean, jnp.zeros(num_segments, jnp.int32), jnp.full(num_segments, jnp.inf)),
        total=params,
        total_count=zero,
        step=zero,
        validations=zero,
        threshold=jnp.asarray(jnp.inf),
        start=zero,
        end=jnp.int32(-1),
        converged=false,
        done=false,
    )


def _swad_validate(n_s: int, n_e: int, r: float, state: SwadState, loss: Any) -> SwadState:
    num_segments = max(n_s, n_e)
    oldest = jax.tree.map(lambda x: x[0], state.last.mean)
    total, total_count = _join(state.total, state.total_count, oldest, state.last.count[0])
    loss = jnp.asarray(loss, state.last.loss.dtype)
    losses = _push(state.last.loss, jnp.where(jnp.isnan(loss), jnp.inf, loss))
    count = _push(state.last.count, state.open_count)
    mean = jax.tree.map(_push, state.last.mean, state.open)
    validations, slot = state.validations + 1, jnp.arange(num_segments)

    recent = losses[num_segments - n_s :]
    converges = ~state.converged & (validations >= n_s) & (recent[0] <= recent.min())
    ends = state.converged & (state.threshold < losses[num_segments - n_e :].min())
    count = jnp.where(converges & (slot < num_segments - n_s), 0, count)
    count = jnp.where(ends & (slot >= num_segments - n_e), 0, count)
    start = jnp.where(converges, state.step - count[num_segments - n_s :].sum(), state.start)
    total_count = jnp.where(converges, 0, total_count)
    new_state = state._replace(
        open_count=jnp.zeros_like(state.open_count),
        last=Segments(mean, count, losses),
        total=total,
        total_count=total_count,
        validations=validations,
        threshold=jnp.where(converges, r * recent.mean(), state.threshold),
        start=start,
        end=jnp.where(ends, start + total_count + count.sum(), state.end),
        converged=state.converged | converges,
        done=ends,
    )
    return jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, new_state)


def _swad_update(state: SwadState, params: PyTree) -> SwadState:
    include = jnp.logical_not(state.done)
    count = state.open_count + include
    weight = jnp.where(include, 1.0 / jnp.maximum(count, 1), 0.0)
    return state._replace(
        open=toward(state.open, params, weight), open_count=count, step=state.step + 1
    )


def _swad_value(state: SwadState, params: PyTree) -> PyTree:
    counts = jnp.concatenate([state.total_count[None], state.last.count, state.open_count[None]])
    is_empty = counts.sum() == 0
    weights = counts.at[0].add(is_empty) / jnp.maximum(counts.sum(), 1)

    def mean(total, last, latest):
        if not is_float(total):
            return latest
        means = jnp.concatenate([total[None], last, latest[None]])
        weight = weights.astype(total.dtype).reshape(weights.shape + (1,) * total.ndim)
        return jnp.sum(jnp.where(weight > 0, weight * means, 0), axis=0)

    return rounded(jax.tree.map(mean, state.total, state.last.mean, state.open), params)


def _join(a: PyTree, a_count, b: PyTree, b_count):
    """Return the mean and the number of two groups of models."""
    count = a_count + b_count
    weight = b_count / jnp.maximum(count, 1)

    def join(a, b):
        return blend(a, b, weight) if is_float(a) else jnp.where(b_count > 0, b, a)

    return jax.tree.map(join, a, b), count


def _push(row, new):
    return jnp.concatenate([row[1:], new[None]])


class TWASubspace(NamedTuple):
    """Solutions w_1 .. w_n and an orthonormal basis e_k = sum_j basis[k, j] w_j of their span.

    Attributes:
      solutions: [n, ...] per leaf
      basis: [n, n], lower triangular
    """

    solutions: Any
    basis: jax.Array


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
    leaves = [jnp.asarray(w) for w in jax.tree.leaves(solutions)]
    leaves = [w for w in leaves if is_float(w) and w.size]
    if not leaves or any(len(w) != len(leaves[0]) for w in leaves):
        raise UserError(
            "solutions must be floating arrays with leading axes of equal length; pass "
            "stack_replicas([...])"
        )
    basis = _orthonormal([w.astype(jnp.promote_types(w.dtype, jnp.float32)) for w in leaves])
    if on_this_host(basis) and not bool(jnp.isfinite(basis).all()):
        raise UserError(
            "the solutions are not finite or not linearly independent (are two of them equal?); "
            "leave some out"
        )
    return TWASubspace(solutions, basis)


def twa_init(span: TWASubspace) -> jax.Array:
    """Return the coordinates [n] of the mean of the solutions, where training starts."""
    count = len(span.basis)
    # e = C w, so the coordinates of the mean of w are the mean of the rows of C^-1.
    return in_float64(lambda c: jnp.linalg.solve(c.T, jnp.full(count, 1.0 / count, c.dtype)))(
        span.basis
    )


def twa_params(span: TWASubspace, coordinates: Any) -> PyTree:
    """Return the weights at coordinates [n]; differentiable with respect to the coordinates.

    Arrays that are not floating are copied from the last solution.
    """
    coefficients = twa_coefficients(span, coordinates)

    def combine(solutions):
        solutions = jnp.asarray(solutions)
        if not is_float(solutions):
            return solutions[-1]
        wide = solutions.astype(jnp.promote_types(solutions.dtype, coefficients.dtype))
        return cast(in_float64(_weighted_sum)(wide, coefficients), solutions.dtype)

    return jax.tree.map(combine, span.solutions)


def twa_coefficients(span: TWASubspace, coordinates: Any) -> jax.Array:
    """Return the averaging weights beta [n] of w = sum_j beta_j w_j at coordinates [n]."""
    return in_float64(lambda c, basis: jnp.sum(c[:, None] * basis, axis=0))(
        jnp.asarray(coordinates, span.basis.dtype), span.basis
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
