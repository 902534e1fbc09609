"""Averages of the weights along one run: EMA, SWA, SWAD, and with given weights.

All are pure functions init, update and value for any jitted loop.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from modelstock_jax.errors import UserError
from modelstock_jax.merging.gram import cast, compute_dtype
from modelstock_jax.merging.summaries import summarize
from modelstock_jax.merging.trees import PyTree, check_alike, is_float, to_array, to_arrays


class Average(NamedTuple):
    """A running average of weights, as pure functions for use inside or outside jit.

    Floating arrays are averaged; other arrays are copied from the last `params`. A leading replica
    axis is allowed: every replica has its own average. States and values share no memory with
    `params`, so each may be donated. Trees or shapes other than those of `init` raise a UserError.

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

    def __repr__(self) -> str:
        return summarize(self)


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
    if isinstance(decay, jax.core.Tracer):
        weight = 1.0 - decay
    else:
        decay = float(decay)
        if not 0.0 <= decay < 1.0:
            raise UserError(f"decay must be in [0, 1), not {decay:g}")
        weight = np.float64(1.0 - decay)  # before it is rounded to float32

    def update(state: EmaState, params: PyTree) -> EmaState:
        return EmaState(toward(state.mean, params, to_array(weight)))

    return Average(lambda params: EmaState(_start(params)), update, _mean_value)


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

    def __repr__(self) -> str:
        return summarize(self)


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
    start, period = _integer("start", start), _integer("period", period)
    if start < 0 or period < 1:
        raise UserError(f"start must be at least 0 and period at least 1, not {start} and {period}")

    def init(params: PyTree) -> SwaState:
        return SwaState(_start(params), _int32(start == 0), _int32(0))

    def update(state: SwaState, params: PyTree) -> SwaState:
        count, step, weight = _count_model(state.count, state.step, start=start, period=period)
        return SwaState(toward(state.mean, params, weight), count, step)

    return Average(init, update, _mean_value)


@functools.partial(jax.jit, static_argnames=("start", "period"))
def _count_model(count, step, done=False, *, start: int = 0, period: int = 1):
    """Return the new count and step, and the weight of the model of this step in the mean."""
    step = step + 1
    include = jnp.logical_not(done) & (step >= start) & ((step - start) % period == 0)
    count = count + include.astype(count.dtype)
    return count, step, _fraction(include, count)


def _fraction(part, count):
    """Return part / count as the default floating dtype, 0 if both are 0."""
    return part.astype(float) / jnp.maximum(count, 1).astype(float)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)  # also NumPy integers and integer arrays of shape []
    except TypeError:
        raise UserError(f"{name} must be an integer, not {value!r}") from None


def _int32(value: int) -> jax.Array:
    return to_array(np.int32(value))


def _start(params: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, widest(params))


def _mean_value(state: EmaState | SwaState, params: PyTree) -> PyTree:
    """Return the mean of a state in the dtypes of `params`, as a copy."""
    _check_same_model(state.mean, params)
    return jax.tree.map(jnp.copy, rounded(state.mean, params))


def _check_same_model(mean: PyTree, params: PyTree) -> PyTree:
    """Return `params` as arrays, or raise a UserError if they do not have the shapes of `mean`."""
    params = to_arrays(params, "params")
    check_alike(mean, params, "the state", "params")
    return params


def widest(params: PyTree) -> PyTree:
    """Cast the floating arrays of a tree to the dtype of averages, float32 or float64."""
    return jax.tree.map(
        lambda w: w.astype(compute_dtype(w.dtype)) if is_float(w) else w,
        to_arrays(params, "params"),
    )


def toward(mean: PyTree, params: PyTree, weight: jax.Array) -> PyTree:
    """Interpolate every floating array from `mean` to `params`; copy other arrays from `params`.

    A tree `params` that differs from `mean` raises a UserError.
    """
    params = _check_same_model(mean, params)
    return jax.tree.map(
        lambda m, w: blend(m, w, weight) if is_float(w) else jnp.copy(w), mean, params
    )


@jax.jit
def blend(a: jax.Array, b: jax.Array, weight: jax.Array) -> jax.Array:
    """Return a + weight (b - a) in the dtype of a. An end with weight 0 has no effect, even NaN."""
    b, weight = b.astype(a.dtype), weight.astype(a.dtype)
    return jnp.where(weight <= 0, a, jnp.where(weight >= 1, b, a + weight * (b - a)))


def rounded(mean: PyTree, params: PyTree) -> PyTree:
    """Cast an average to the dtypes of `params`."""

    def step(mean, w):
        dtype = jnp.result_type(w)
        return _cast(mean, dtype) if is_float(mean) and mean.dtype != dtype else mean

    return jax.tree.map(step, mean, params)


_cast = jax.jit(cast, static_argnums=1)


class WeightedState(NamedTuple):
    """State of `weighted_average`.

    Attributes:
      mean: the average so far
      count: number of models in the average
    """

    mean: PyTree
    count: jax.Array

    def __repr__(self) -> str:
        return summarize(self)


def weighted_average(weights: Any) -> Average:
    """Return an average of the weights with given factors.

        sum_k c_k w_k / sum_k c_k

    The weights passed to `init` are w_1, those of the first `update` w_2, and so on; updates after
    the last factor change nothing. `decay_weights` and `ema_weights` return factors.

    Args:
      weights: c, [K], not negative

    Raises:
      UserError: a weight is negative or not finite, or all are 0

    Example:
      >>> average = weighted_average([1.0, 3.0])
      >>> state = average.init({"w": jnp.zeros(1)})
      >>> state = average.update(state, {"w": jnp.ones(1)})
      >>> average.value(state, {"w": jnp.ones(1)})["w"].tolist()
      [0.75]
    """
    factors = np.asarray(weights, np.float64)
    valid = factors.ndim == 1 and np.isfinite(factors).all() and (factors >= 0).all()
    if not valid or not factors.any():
        raise UserError(f"weights must be numbers, 0 or above, and not all 0; not {weights!r}")
    total = factors.cumsum()
    # The last entry is for updates after the last factor.
    moves = np.append(np.where(total > 0, factors / np.where(total > 0, total, 1), 1.0), 0.0)

    def update(state: WeightedState, params: PyTree) -> WeightedState:
        index = jnp.minimum(state.count, len(factors))
        mean = toward(state.mean, params, to_array(moves)[index])
        return WeightedState(mean, index + _int32(1))

    return Average(lambda params: WeightedState(_start(params), _int32(1)), update, _mean_value)


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

    def __repr__(self) -> str:
        return summarize(self)


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

    def __repr__(self) -> str:
        return summarize(self)


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
    n_s, n_e, r = _integer("n_s", n_s), _integer("n_e", n_e), float(r)
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
    params = to_arrays(params, "params")
    infinities = np.full(num_segments, np.inf, jnp.result_type(float))
    return SwadState(
        open=_start(params),
        open_count=_int32(0),
        last=Segments(
            jax.tree.map(lambda w: jnp.broadcast_to(w, (num_segments, *w.shape)), _start(params)),
            to_array(np.zeros(num_segments, np.int32)),
            to_array(infinities),
        ),
        total=_start(params),
        total_count=_int32(0),
        step=_int32(0),
        validations=_int32(0),
        threshold=to_array(infinities[0]),
        start=_int32(0),
        end=_int32(-1),
        converged=to_array(np.bool_(False)),
        done=to_array(np.bool_(False)),
    )


def _swad_validate(n_s: int, n_e: int, r: float, state: SwadState, loss: Any) -> SwadState:
    loss = to_arrays(loss, "loss")
    if np.shape(loss):
        raise UserError(f"loss must be a scalar, not an array of shape {np.shape(loss)}")
    scalars, weight = _swad_scalars(
        state._replace(open=None, last=state.last._replace(mean=None), total=None),
        loss,
        n_s=n_s,
        n_e=n_e,
        r=r,
    )
    mean = jax.tree.map(
        lambda last, latest: _push_unless(state.done, last, latest), state.last.mean, state.open
    )
    total = jax.tree.map(lambda a, last: _join(a, last, weight), state.total, state.last.mean)
    return scalars._replace(open=state.open, last=scalars.last._replace(mean=mean), total=total)


@functools.partial(jax.jit, static_argnames=("n_s", "n_e", "r"))
def _swad_scalars(state: SwadState, loss: jax.Array, *, n_s: int, n_e: int, r: float):
    """Return the new state without models, and the weight of the oldest segment in `total`."""
    num_segments = max(n_s, n_e)
    total_count = state.total_count + state.last.count[0]
    fraction = _fraction(state.last.count[0], total_count)
    loss = loss.astype(state.last.loss.dtype)
    losses = _push(state.last.loss, jnp.where(jnp.isnan(loss), jnp.inf, loss))
    count = _push(state.last.count, state.open_count)
    validations, slot = state.validations + 1, np.arange(num_segments)

    recent = losses[num_segments - n_s :]
    converges = ~state.converged & (validations >= n_s) & (recent[0] <= recent.min())
    ends = state.converged & (state.threshold < losses[num_segments - n_e :].min())
    count = jnp.where(converges & (slot < num_segments - n_s), 0, count)
    count = jnp.where(ends & (slot >= num_segments - n_e), 0, count)
    total_count = jnp.where(converges, 0, total_count)
    # Sums in int32, also if jax_enable_x64 is on: the state's dtypes never change.
    recent_count = count[num_segments - n_s :].sum(dtype=count.dtype)
    start = jnp.where(converges, state.step - recent_count, state.start)
    end = start + total_count + count.sum(dtype=count.dtype)
    new_state = state._replace(
        open_count=jnp.zeros_like(state.open_count),
        last=Segments(None, count, losses),
        total_count=total_count,
        validations=validations,
        threshold=jnp.where(converges, r * recent.mean(), state.threshold),
        start=start,
        end=jnp.where(ends, end, state.end),
        converged=state.converged | converges,
        done=ends,
    )
    new_state = jax.tree.map(lambda old, new: jnp.where(state.done, old, new), state, new_state)
    return new_state, jnp.where(state.done, 0.0, fraction)


def _swad_update(state: SwadState, params: PyTree) -> SwadState:
    count, step, weight = _count_model(state.open_count, state.step, state.done)
    return state._replace(open=toward(state.open, params, weight), open_count=count, step=step)


def _swad_value(state: SwadState, params: PyTree) -> PyTree:
    _check_same_model(state.open, params)
    weights = _segment_weights(state.total_count, state.last.count, state.open_count)

    def mean(total, last, latest):
        return _weigh(total, last, latest, weights) if is_float(total) else jnp.copy(latest)

    return rounded(jax.tree.map(mean, state.total, state.last.mean, state.open), params)


@jax.jit
def _segment_weights(total_count, counts, open_count) -> jax.Array:
    counts = jnp.concatenate([total_count[None], counts, open_count[None]])
    count = counts.sum(dtype=counts.dtype)
    counts = counts.at[0].add((count == 0).astype(counts.dtype))  # no model: the initial weights
    return _fraction(counts, count)


@jax.jit
def _weigh(total, last, latest, weights) -> jax.Array:
    means = jnp.concatenate([total[None], last, latest[None]])
    weights = weights.astype(total.dtype).reshape(weights.shape + (1,) * total.ndim)
    return jnp.sum(jnp.where(weights > 0, weights * means, 0), axis=0)


@jax.jit
def _join(total, last, weight) -> jax.Array:
    """Add the oldest segment to the mean of the segments before it."""
    if is_float(total):
        return blend(total, last[0], weight)
    return jnp.where(weight > 0, last[0], total)


def _push(row, new):
    return jnp.concatenate([row[1:], new[None]])


@jax.jit
def _push_unless(done, row, new):
    return jnp.where(done, row, _push(row, new))


# `jax.export` can serialize functions of these states.
for _state in (EmaState, SwaState, WeightedState, Segments, SwadState):
    export.register_namedtuple_serialization(
        _state, serialized_name=f"modelstock_jax.{_state.__name__}"
    )
