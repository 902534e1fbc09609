"""`repr` of statistics and states: one screen for any model, and still pytrees that jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax import (
    ema,
    greedy_soup,
    model_stock,
    stack_replicas,
    swa,
    swad,
    twa_span,
    weighted_average,
)

W0 = {f"block_{k:03d}": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)} for k in range(20)}
KEYS = jax.random.split(jax.random.key(0), 3)
MODELS = [jax.tree.map(lambda x, k=k: x + 3 + jax.random.normal(k, x.shape), W0) for k in KEYS[:2]]
BOTH = stack_replicas(MODELS)
SWAD = swad(2, 2)


def check_size(text):
    lines = text.split("\n")
    assert len(lines) <= 25 and max(map(len, lines)) <= 100, text
    assert "Array" not in text


def test_statistics():
    stats = model_stock(W0, BOTH)[1]
    cosines = np.array(jax.tree.leaves(stats.cosine))
    text = repr(stats)
    check_size(text)
    for words in ("2 replicas", "40 tensors", "'tensor'", f"cosine: mean {cosines.mean():.3f}",
                  f"to {cosines.max():.3f}", "interpolated", "ratio: mean"):  # fmt: skip
        assert words in text, (words, text)
    assert "not finite" not in text


def test_norms_are_those_of_the_complete_task_vectors():
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(MODELS[0])))
    for unit in ("tensor", "filter", "global"):
        assert f"task vectors: {norm:.4g}, " in repr(model_stock(W0, BOTH, unit=unit)[1])


def test_statistics_without_values():
    texts = []

    @jax.jit
    def merge(both):
        stats = model_stock(W0, both)[1]
        texts.append(repr(stats))
        return stats

    stats = merge(BOTH)
    assert "no values" in texts[0] and "cosine: mean" in repr(stats)
    several = jax.vmap(lambda w: model_stock(W0, w)[1])(jax.tree.map(lambda x: x[None], BOTH))
    for other in (several, jax.eval_shape(merge, BOTH), jax.tree.map(lambda x: None, stats)):
        assert "40 tensors" in repr(other)
    shorter = jax.tree.map(lambda x: x[..., :1], stats)
    assert "40 tensors" in repr(shorter)


def test_statistics_with_a_non_finite_tensor():
    bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), BOTH)
    stats = jax.jit(lambda both: model_stock(W0, both)[1])(bad)
    assert "check_finite" in repr(stats)


def test_non_finite_tensor_of_a_unit_of_several_tensors_is_reported():
    bad = jax.tree.map(jnp.array, BOTH)
    bad["block_000"]["bias"] = bad["block_000"]["bias"].at[0].set(jnp.nan)
    for unit in ("tensor", "global"):
        stats = jax.jit(lambda both, unit=unit: model_stock(W0, both, unit=unit)[1])(bad)
        assert "check_finite" in repr(stats), unit


def test_ratios_are_those_of_tensors_that_were_merged():
    counters = {"step": jnp.arange(3), "frozen": jnp.ones(4)}
    both = BOTH | {name: jnp.stack([x, x]) for name, x in counters.items()}
    lines = repr(model_stock(W0, BOTH)[1]).split("\n")
    more = repr(model_stock(W0 | counters, both)[1]).split("\n")
    assert more[2:] == lines[2:], "cosine, ratio, norms"


STATES = {
    "ema": lambda: ema(0.9).init(W0),
    "swa": lambda: swa().init(W0),
    "weighted": lambda: weighted_average([1.0, 2.0]).init(W0),
    "swad": lambda: SWAD.validate(SWAD.update(SWAD.init(W0), W0), 0.25),
    "twa": lambda: twa_span(BOTH),
}


@pytest.mark.parametrize("name", STATES)
def test_states(name):
    state = STATES[name]()
    check_size(repr(state))
    assert "<40 tensors, " in repr(state) and type(state).__name__ in repr(state)
    texts = []
    again = jax.jit(lambda state: (texts.append(repr(state)), state)[1])(state)
    check_size(texts[0])
    assert repr(again) == repr(state)


def test_arrays_that_were_donated():
    values = (model_stock(W0, BOTH)[1], STATES["swa"](), STATES["swad"](), STATES["twa"]())
    for value in jax.tree.map(jnp.array, values):
        jax.tree.map(lambda x: x.delete(), value)
        assert "40 tensors" in repr(value)


def test_values_of_a_state_are_shown():
    text = repr(STATES["swad"]())
    assert "count=[0, 1]" in text and "loss=[inf, 0.25]" in text and "step=1" in text


def test_greedy_soup():
    soup = greedy_soup(W0, MODELS, lambda params: 0.5)
    check_size(repr(soup))
    assert "score=0.5" in repr(soup) and "2 trials" in repr(soup)
