"""SWAD: a dense average of one run's weights over the valley of its validation loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging.replicas import is_float
from modelstock_jax.merging.trajectory import blend, rounded, toward, widest


class LossValley(NamedTuple):
    """`swad`'s functions; as `trajectory.Average`, and `validate(state, loss) -> state`."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    validate: Callable[[Any, Any], Any]
    value: Callable[[Any, Any], Any]


class Segments(NamedTuple):
    """Means of the weights between validations, with the number of weights in each."""

    mean: Any  # [K, ...] a leaf
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


def swad(n_s: int = 3, n_e: int = 6, r: float = 1.3) -> LossValley:
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

    def init(params: Any) -> SwadState:
        params, zero = widest(params), jnp.int32(0)
        no = jnp.asarray(False)
        mean = jax.tree.map(lambda w: jnp.zeros((length, *w.shape), w.dtype), params)
        last = Segments(mean, jnp.zeros(length, jnp.int32), jnp.full(length, jnp.inf))
        return SwadState(params, zero, last, params, zero, zero, zero,
                         jnp.asarray(jnp.inf), zero, jnp.int32(-1), no, no)

    def update(state: SwadState, params: Any) -> SwadState:
        more = jnp.logical_not(state.done)
        count = state.open_count + more
        share = jnp.where(more, 1.0 / jnp.maximum(count, 1), 0.0)
        return state._replace(open=toward(state.open, params, share), open_count=count,
                              step=state.step + 1)

    def validate(state: SwadState, loss: Any) -> SwadState:
        oldest = jax.tree.map(lambda x: x[0], state.last.mean)
        total, total_count = _joined(state.total, state.total_count, oldest, state.last.count[0])
        loss = jnp.asarray(loss, state.last.loss.dtype)
        losses = _pushed(state.last.loss, jnp.where(jnp.isnan(loss), jnp.inf, loss))
        count = _pushed(state.last.count, state.open_count)
        mean = jax.tree.map(_pushed, state.last.mean, state.open)
        validations, slot = state.validations + 1, jnp.arange(length)

        recent = losses[length - n_s:]
        found = (~state.converged & (validations >= n_s) & (recent[0] <= recent.min()))
        ended = state.converged & (state.threshold < losses[length - n_e:].min())
        count = jnp.where(found & (slot < length - n_s), 0, count)
        count = jnp.where(ended & (slot >= length - n_e), 0, count)
        start = jnp.where(found, state.step - count[length - n_s:].sum(), state.start)
        total_count = jnp.where(found, 0, total_count)
        new = state._replace(
            open_count=jnp.zeros_like(state.open_count), last=Segments(mean, count, losses),
            total=total, total_count=total_count, validations=validations,
            threshold=jnp.where(found, r * recent.mean(), state.threshold), start=start,
            end=jnp.where(ended, start + total_count + count.sum(), state.end),
            converged=state.converged | found, done=ended,
        )
        return jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, new)

    def value(state: SwadState, params: Any) -> Any:
        counts = jnp.concatenate(
            [state.total_count[None], state.last.count, state.open_count[None]])
        nothing = counts.sum() == 0
        shares = counts.at[0].add(nothing) / jnp.maximum(counts.sum(), 1)

        def mean(total, last, latest):
            if not is_float(total):
                return latest
            every = jnp.concatenate([total[None], last, latest[None]])
            share = shares.astype(total.dtype).reshape((length + 2,) + (1,) * total.ndim)
            return jnp.sum(jnp.where(share > 0, share * every, 0), axis=0)

        return rounded(jax.tree.map(mean, state.total, state.last.mean, state.open), params)

    return LossValley(init, update, validate, value)


def _joined(a: Any, a_count, b: Any, b_count):
    """Mean and number of two groups of models."""
    count = a_count + b_count
    share = b_count / jnp.maximum(count, 1)

    def join(a, b):
        return blend(a, b, share) if is_float(a) else jnp.where(b_count > 0, b, a)

    return jax.tree.map(join, a, b), count


def _pushed(row, new):
    return jnp.concatenate([row[1:], new[None]])
