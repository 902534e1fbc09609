"""Weights of the checkpoints of one run: against the run that they imitate, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from modelstock_jax import UserError, decay_weights, ema, ema_weights, weighted_average

RATES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
}
STEPS = [3, 10, 11, 40, 70]
NUMBERS = st.lists(st.integers(1, 50), min_size=1, max_size=8)


@pytest.mark.parametrize("schedule", RATES)
@pytest.mark.parametrize("length", [None, 67, 50, 29, 5])
def test_the_average_is_the_run_with_a_decay(schedule, length):
    """Updates that do not depend on the weights, each at the rate of its time."""
    rng = np.random.default_rng(0)
    updates = {pair: rng.standard_normal(4) for pair in zip(STEPS, STEPS[1:], strict=False)}
    decay = STEPS[-1] - STEPS[0] if length is None else length
    start = STEPS[-1] - decay

    def rate(step):
        return 1.0 if step < start else RATES[schedule]((step - start) / decay)

    models, decayed = [np.zeros(4)], np.zeros(4)
    for (a, b), update in updates.items():
        models.append(models[-1] + update)
        mean_rate = quad(rate, a, b, points=[start] if a < start < b else None)[0] / (b - a)
        decayed = decayed + mean_rate * update
    weights = decay_weights(schedule, STEPS, length)
    np.testing.assert_allclose(weights @ np.array(models), decayed, rtol=1e-7, atol=1e-9)
    assert ((weights == 0) == [b <= start for b in (*STEPS[1:], np.inf)]).all()


@given(st.sampled_from(list(RATES)), NUMBERS, st.floats(0.01, 2))
def test_weights_are_a_mean(schedule, gaps, fraction):
    steps = np.cumsum([0, *gaps])
    weights = decay_weights(schedule, steps, fraction * steps[-1])
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1)


@given(st.integers(1, 12), st.floats(0, 0.999))
def test_ema_weights_are_those_of_the_running_average(number, decay):
    average = ema(decay)
    models = np.eye(number, dtype=np.float32)
    state = average.init({"w": jnp.asarray(models[0])})
    for model in models[1:]:
        state = average.update(state, {"w": jnp.asarray(model)})
    np.testing.assert_allclose(state.mean["w"], ema_weights(decay, number), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weights", [[0, 0, 1, 2], [1, 1, 1, 1], [0.1, 0, 0, 0.9], [3]])
def test_weighted_average(weights):
    models = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
    average = weighted_average(weights)
    state = average.init({"w": jnp.asarray(models[0]), "n": jnp.int32(0)})
    update = jax.jit(average.update)
    for number, model in enumerate(models[1:], 1):
        params = {"w": jnp.asarray(model), "n": jnp.int32(number)}
        state = update(state, params)
    value = average.value(state, params)
    expected = np.average(models[: len(weights)].astype(np.float64), axis=0, weights=weights)
    # Each update rounds once to float32.
    np.testing.assert_allclose(value["w"], expected, rtol=1e-6, atol=1e-6)
    assert value["n"] == 3 and value["w"].dtype == np.float32


@pytest.mark.parametrize(("call", "pattern"), [
    (lambda: ema_weights(1.0, 2), "decay .*1"),
    (lambda: ema_weights(float("nan"), 2), "decay .*nan"),
    (lambda: decay_weights("cosin", [0, 1]), "'cosin' .*'cosine'"),
    (lambda: decay_weights("cosine", [0, 2, 1]), "increase"),
    (lambda: decay_weights("cosine", [0, 1], 0), "length .*0"),
    (lambda: weighted_average([0.0, 0.0]), "weights "),
    (lambda: weighted_average([1.0, -1.0]), "weights "),
    (lambda: weighted_average([1.0, float("inf")]), "weights "),
    (lambda: weighted_average(1.0), "weights "),
])  # fmt: skip
def test_invalid_arguments(call, pattern):
    with pytest.raises(UserError, match=pattern):
        call()
