"""Averages along a run, compared with closed forms and literal versions of the algorithms."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstock_jax.errors import UserError
from modelstock_jax.merging import (
    ema,
    stack_replicas,
    swa,
    swad,
    twa_coefficients,
    twa_init,
    twa_params,
    twa_span,
)

rng = np.random.default_rng(0)
STEPS = 24
RUN = rng.standard_normal((STEPS, 5)).cumsum(axis=0).astype(np.float32)
quick = settings(max_examples=60, deadline=None)


def tree(k):
    return {"w": jnp.asarray(RUN[k]), "step": jnp.int32(k)}


def along(average, steps):
    """Return the average of a run, computed in one jitted loop."""

    def step(state, params):
        return average.update(state, params), None

    rest = {"w": RUN[1:steps], "step": np.arange(1, steps)}
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, rest))(average.init(tree(0)))
    return average.value(state, tree(0))


def test_ema_in_closed_form():
    powers = 0.9 ** np.arange(STEPS - 1, -1, -1)
    weights = np.where(np.arange(STEPS) == 0, powers, 0.1 * powers)
    averaged = along(ema(0.9), STEPS)
    # float32 rounding at each of 24 steps.
    np.testing.assert_allclose(averaged["w"], weights @ RUN.astype(np.float64), rtol=2e-6)
    assert int(averaged["step"]) == STEPS - 1


@pytest.mark.parametrize("start,period", [(0, 1), (5, 3)])
def test_swa_is_the_mean_of_every_period_from_the_start(start, period):
    expected = RUN[start::period].mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(along(swa(start, period), STEPS)["w"], expected, rtol=2e-6)


def test_swa_of_many_steps_does_not_drift():
    # Values near 1 are rounded by 3e-8 at each of 10^5 steps; about sqrt(n / 3) errors remain.
    noise = rng.standard_normal(100_000).astype(np.float32) * np.float32(1e-3) + 1
    average = swa()
    update = jax.jit(
        lambda s, x: jax.lax.scan(lambda s, w: (average.update(s, {"w": w}), None), s, x)[0]
    )
    state = update(average.init({"w": noise[0]}), noise[1:])
    assert float(state.mean["w"]) == pytest.approx(noise.mean(dtype=np.float64), abs=6e-6)
    assert int(state.count) == 100_000


def test_averages_preserve_dtypes_and_replicas():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16)}
    for average in (ema(0.5), swa(), swad(1, 1)):
        state = average.init(params)
        for factor in (1, 2, 4):
            state = average.update(state, jax.tree.map(lambda x, f=factor: x * f, params))
        assert state[0]["w"].dtype == jnp.float32
        averaged = average.value(state, params)
        assert averaged["w"].dtype == jnp.bfloat16 and averaged["w"].shape == (2, 3)


def algorithm_1(losses, n_s, n_e, r):
    """Return the first and last iteration that SWAD's algorithm 1 averages, counted from 1."""
    first, last, level = 1, len(losses), None
    for i in range(1, len(losses) + 1):

        def back(k, i=i):
            return losses[i - k - 1] if i - k >= 1 else np.inf

        if level is None:
            if i >= n_s and back(n_s - 1) == min(back(k) for k in range(n_s)):
                first = i - n_s + 1
                level = r * np.mean([back(k) for k in range(n_s)])
        elif level < min(back(k) for k in range(n_e)):
            last = i - n_e
            break
    return first, last


@cache
def swad_run(n_s, n_e, r):
    """Return a jitted run for one setting; it validates after the steps marked in `validates`."""
    average = swad(n_s, n_e, r)

    def step(state, row):
        w, loss, validates = row
        state = average.update(state, {"w": w})
        validated = average.validate(state, loss)
        return jax.tree.map(lambda a, b: jnp.where(validates, a, b), validated, state), None

    def run(losses, validates):
        state = average.init({"w": jnp.zeros(5)})
        state, _ = jax.lax.scan(step, state, (RUN, losses, validates))
        return average.value(state, {"w": jnp.zeros(5)})["w"], state.start, state.end, state.done

    return jax.jit(run)


valley = st.lists(st.integers(1, 12), min_size=STEPS, max_size=STEPS)


@quick
@given(valley, st.sampled_from([(3, 6, 1.25), (3, 1, 1.0)]))
def test_swad_follows_its_algorithm(losses, setting):
    losses = (
        np.array(losses, np.float32) / 4
    )  # exact in float32, and so are comparisons of means of three
    mean, start, end, done = swad_run(*setting)(losses, np.ones(STEPS, bool))
    first, last = algorithm_1(losses.astype(np.float64), *setting)
    np.testing.assert_allclose(
        mean, RUN[first - 1 : last].mean(axis=0, dtype=np.float64), rtol=0, atol=3e-6
    )
    assert int(start) == first - 1
    assert int(end) == (last if bool(done) else -1)


def test_swad_with_steps_between_validations():
    losses = np.array([3, 2, 1, 1, 1, 1, 9, 9], np.float32)
    first, last = algorithm_1(losses, 3, 1, 1.0)
    assert (first, last) == (3, 6)
    every = np.arange(STEPS) % 3 == 2  # eight validations, three steps each
    mean, start, end, _ = swad_run(3, 1, 1.0)(np.repeat(losses, 3), every)
    np.testing.assert_allclose(mean, RUN[6:18].mean(axis=0, dtype=np.float64), rtol=2e-6)
    assert (int(start), int(end)) == (6, 18)


def test_weights_outside_the_average_have_no_effect():
    """Even non-finite weights after the valley, or at a skipped step, have no effect."""
    average = swad(1, 1, 1.5)
    state = average.init({"w": jnp.zeros(1)})
    for w, loss in [(1.0, 1.0), (2.0, 1.2), (6.0, 1.1), (np.inf, np.nan), (np.nan, np.nan)]:
        state = average.validate(average.update(state, {"w": jnp.array([w])}), loss)
    assert bool(state.done) and (int(state.start), int(state.end)) == (0, 3)
    assert average.value(state, {"w": jnp.zeros(1)})["w"].tolist() == [3.0]
    # Neither do weights from before the loss converged.
    average = swad(2, 1, 1.5)
    state = average.init({"w": jnp.zeros(1)})
    for w, loss in [(np.nan, 5.0), (2.0, 1.0), (4.0, 1.1)]:
        state = average.validate(average.update(state, {"w": jnp.array([w])}), loss)
    assert average.value(state, {"w": jnp.zeros(1)})["w"].tolist() == [3.0]

    every_second = swa(start=0, period=2)
    state = every_second.init({"w": jnp.ones(1)})
    for w in (np.inf, 3.0):
        state = every_second.update(state, {"w": jnp.array([w])})
    assert every_second.value(state, {"w": jnp.zeros(1)})["w"].tolist() == [2.0]


def gram_schmidt(solutions):
    """Orthonormalize as in the paper: subtract the components along the earlier vectors."""
    basis = []
    for w in np.asarray(solutions, np.float64):
        for e in basis:
            w = w - (w @ e) * e
        basis.append(w / np.linalg.norm(w))
    return np.array(basis)


def test_twa_is_projected_gradient_descent():
    solutions = RUN[:4] + 10  # nearly parallel, as the weights of one run are
    span = twa_span(stack_replicas([{"w": w} for w in solutions]))
    basis = gram_schmidt(solutions)
    goal, learning_rate = rng.standard_normal(5), 0.05

    def loss(c):
        return jnp.sum((twa_params(span, c)["w"] - goal) ** 2 * jnp.arange(1.0, 6.0)) / 2

    slope = jax.jit(jax.grad(loss))
    c, w = twa_init(span), solutions.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(twa_params(span, c)["w"], w, rtol=1e-6)
    for _ in range(5):
        c = c - learning_rate * slope(c)
        w = w - learning_rate * basis.T @ (basis @ ((w - goal) * np.arange(1, 6)))
    # Coefficients of vectors of length 10 with differences of 1: float32 has 1e-6 of the weights.
    np.testing.assert_allclose(twa_params(span, c)["w"], w, rtol=2e-5)
    beta = np.asarray(twa_coefficients(span, c), np.float64)
    np.testing.assert_allclose(beta @ solutions, w, rtol=2e-5)


def test_twa_preserves_dtypes_and_copies_the_last_non_floating_arrays():
    models = [
        {"a": jnp.bfloat16(x), "b": jnp.full((2, 2), y), "n": jnp.int32(x)}
        for x, y in [(1, 5.0), (2, 1.0)]
    ]
    span = twa_span(stack_replicas(models))
    mean = twa_params(span, twa_init(span))
    assert mean["a"].dtype == jnp.bfloat16 and float(mean["a"]) == 1.5 and int(mean["n"]) == 2
    np.testing.assert_allclose(mean["b"], 3.0, rtol=1e-6)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: ema(1.0), r"decay .*\[0, 1\)"),
        (lambda: swa(-1), "start .*0"),
        (lambda: swad(n_s=0), "n_s and n_e"),
        (lambda: swad(r=0.9), " 0.9"),
        (lambda: twa_span(stack_replicas([{"w": RUN[0]}] * 2)), "linearly"),
        (lambda: twa_span({"n": np.ones(2, int)}), "stack_replicas"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()
