"""Greedy soup, compared with a brute-force version of its recipe."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstock_jax.errors import UserError
from modelstock_jax.merging import NonFiniteError, greedy_soup

SIZE = 3
quick = settings(max_examples=60, deadline=None)
weights = st.lists(
    st.lists(st.integers(-4, 4), min_size=SIZE, max_size=SIZE), min_size=1, max_size=5
)


def brute_force(models, score, strict):
    """Recipe 1, literally: the average is recomputed from all ingredients in every trial."""

    def accuracy(members):
        return score(np.mean([models[i] for i in members], axis=0))

    order = sorted(range(len(models)), key=lambda i: accuracy([i]), reverse=True)
    ingredients = [order[0]]
    for i in order[1:]:
        without, with_it = accuracy(ingredients), accuracy([*ingredients, i])
        if with_it > without or (with_it == without and not strict):
            ingredients.append(i)
    return ingredients, np.mean([models[i] for i in ingredients], axis=0)


def accuracy_like(weights):
    """A held-out score with many ties, as on a small set: the number of close goals among four."""
    goals = np.array([[1, 0, 2], [0, 0, 0], [2, -1, 1], [-3, 3, 1]])
    # No mean of up to five integers is so close to 1.57 that rounding changes the comparison.
    return float((np.abs(goals - np.asarray(weights)).max(axis=1) < 1.57).sum())


@quick
@given(weights, st.booleans())
def test_against_brute_force(models, strict):
    models = np.array(models, np.float32)
    soup = greedy_soup(
        None, [{"w": m} for m in models], lambda t: accuracy_like(t["w"]), strict=strict
    )
    ingredients, params = brute_force(models.astype(np.float64), accuracy_like, strict)
    assert list(soup.ingredients) == ingredients
    # A running mean of small integers: float32 rounds it at each of four steps.
    np.testing.assert_allclose(soup.params["w"], params, rtol=0, atol=2e-6)
    assert soup.score == accuracy_like(params)
    assert [t.candidate for t in soup.trials if t.accepted] == ingredients
    assert len(soup.trials) == len(models)


def _tree(value, dtype=np.float32):
    return {
        "tower": {"w": np.full((4, 2), value, dtype)},
        "head": np.full(3, value, dtype),
        "count": np.int32(value),
    }


def _near(goal):
    return lambda tree: -abs(float(jnp.mean(tree["head"])) - goal)


def test_equal_scores_are_accepted_only_if_not_strict():
    same = [_tree(1.0), _tree(1.0)]
    assert greedy_soup(None, same, _near(2.0)).ingredients == (0,)
    assert greedy_soup(None, same, _near(2.0), strict=False).ingredients == (0, 1)


def test_loaders_are_called_one_at_a_time_with_two_models_in_memory():
    values, loaded, alive = [4.0, 1.0, 3.0, 2.0, 9.0], [], []
    size = 2**16

    def load(i):
        loaded.append(i)
        return {"w": jnp.full(size, values[i])}

    def score(tree):
        # Count only models, not arrays of other tests.
        alive.append(sum(x.size == size for x in jax.live_arrays()))
        return -abs(float(tree["w"][0]) - 2.5)

    soup = greedy_soup(None, (lambda i=i: load(i) for i in range(5)), score)
    assert loaded == [0, 1, 2, 3, 4, *(t.candidate for t in soup.trials)]
    assert soup.ingredients == (2, 3) and float(soup.params["w"][0]) == 2.5
    assert max(alive[:5]) == 1 and max(alive[5:]) == 2


def test_known_scores_are_not_computed_again():
    models, scored = [_tree(v) for v in (5.0, 1.0, 2.0)], []

    def score(tree):
        scored.append(float(tree["head"][0]))
        return _near(1.4)(tree)

    soup = greedy_soup(None, models, score, scores=[_near(1.4)(m) for m in models])
    assert soup.ingredients == (1, 2) and scored == pytest.approx([1.5, 8 / 3])
    assert [t.own_score for t in soup.trials] == pytest.approx([-0.4, -0.6, -3.6])
    assert [t.accepted for t in soup.trials] == [True, True, False]


def test_the_anchor_supplies_dtypes_and_non_floating_arrays():
    anchor = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x, _tree(7.0)
    )
    soup = greedy_soup(anchor, [_tree(1.0), _tree(3.0)], _near(2.0))
    assert soup.params["head"].dtype == jnp.bfloat16 and int(soup.params["count"]) == 7
    assert float(soup.params["head"][0]) == 2.0 and soup.ingredients == (0, 1)
    without_anchor = greedy_soup(None, [_tree(1.0), _tree(3.0)], _near(2.0)).params
    assert without_anchor["head"].dtype == np.float32 and int(without_anchor["count"]) == 1


def test_a_bfloat16_soup_is_a_float32_mean_rounded_once():
    # A running mean in bfloat16 ends at 1.0078125; the mean is 1.0125.
    values = [1.0, 1.0, 1.0, 1.0078125, 1.0546875]
    dtypes = []

    def score(tree):
        dtypes.append(tree["head"].dtype)
        return float(len(dtypes))  # every trial improves

    models = [_tree(v, jnp.bfloat16) for v in values]
    soup = greedy_soup(None, models, score, scores=[0.5, 0.4, 0.3, 0.2, 0.1])
    assert len(soup.ingredients) == 5 and set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    assert float(soup.params["head"][0]) == float(jnp.bfloat16(np.mean(values))) == 1.015625


@pytest.mark.parametrize(
    "candidates,score,message",
    [
        ([], _near(0), "one candidate"),
        ({"head": np.ones((2, 5), np.float32)}, _near(0), "candidates .*tree"),
        ([_tree(1.0)], lambda tree: float("nan"), "score of candidate 0 .*NaN"),
        ([_tree(1.0), {"head": np.ones(3, np.float32)}], lambda t: 0, "structure"),
    ],
)
def test_errors(candidates, score, message):
    with pytest.raises(UserError, match=message):
        greedy_soup(None, candidates, score)


def test_a_candidate_that_is_not_finite_is_named():
    bad = _tree(1.0)
    bad["head"][2] = np.nan
    with pytest.raises(NonFiniteError, match=r"candidate 1 .*'head'"):
        greedy_soup(None, [_tree(1.0), bad], _near(0.0))
    with pytest.raises(UserError, match="scores .*2 numbers"):
        greedy_soup(None, [_tree(1.0), _tree(2.0)], _near(0.0), scores=[1.0])
