"""Averages of the weights along one run, as init, update and value: usable in any jitted loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.merging.gram import cast
from modelstock_jax.merging.precision import compute_dtype
from modelstock_jax.merging.replicas import is_float


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

    mean: Any


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

    def update(state: EmaState, params: Any) -> EmaState:
        return EmaState(toward(state.mean, params, 1.0 - decay))

    return Average(
        init=lambda params: EmaState(widest(params)),
        update=update,
        value=lambda state, params: rounded(state.mean, params),
    )


class SwaState(NamedTuple):
    """The mean, how many models it is of, and how many steps there were."""

    mean: Any
    count: jax.Array
    step: jax.Array


def swa(start: int = 0, period: int = 1) -> Average:
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407, algorithm 1).

        w_swa <- (n w_swa + w) / (n + 1),    n <- n + 1        every `period` steps from `start` on

    The weights given to `init` are step 0, so with the defaults they are the first model of the
    mean, as in the algorithm. The learning rate is the loop's own: the paper's is constant or
    cyclical, a period of the average being one cycle. Models with batch normalisation need its
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

    def init(params: Any) -> SwaState:
        return SwaState(widest(params), jnp.int32(start == 0), jnp.int32(0))

    def update(state: SwaState, params: Any) -> SwaState:
        step = state.step + 1
        taken = (step >= start) & ((step - start) % period == 0)
        count = state.count + taken
        share = jnp.where(taken, 1.0 / jnp.maximum(count, 1), 0.0)
        return SwaState(toward(state.mean, params, share), count, step)

    def value(state: SwaState, params: Any) -> Any:
        return rounded(state.mean, params)

    return Average(init, update, value)


def widest(params: Any) -> Any:
    """A tree with its floating arrays in the dtype of averages, float32 or float64."""
    return jax.tree.map(
        lambda w: w.astype(compute_dtype(w.dtype)) if is_float(w) else w,
        jax.tree.map(jnp.asarray, params))


def toward(mean: Any, params: Any, share: Any) -> Any:
    """Move every floating array a share of the way to params'; the rest is params' own."""
    def step(mean, w):
        w = jnp.asarray(w)
        return blend(mean, w.astype(mean.dtype), share) if is_float(w) else w

    return jax.tree.map(step, mean, params)


def blend(a: jax.Array, b: jax.Array, share: Any) -> jax.Array:
    """The line a + share (b - a); an end of share 0 does not count, be it NaN."""
    share = jnp.asarray(share, a.dtype)
    return jnp.where(share <= 0, a, jnp.where(share >= 1, b, a + share * (b - a)))


def rounded(mean: Any, params: Any) -> Any:
    """An average in the dtypes of params."""
    return jax.tree.map(
        lambda m, w: cast(m, jnp.result_type(w)) if is_float(m) else m, mean, params)
