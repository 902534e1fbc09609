"""Ratio rules: against the library, and against the formulas in float64."""

from __future__ import annotations

import chex
import numpy as np
import pytest

from modelstock_jax.merging import model_stock, uniform_mean
from modelstock_jax.merging.trees import named_leaves
from studies.catalog import STUDIES
from studies.expressions import Replica, stacked
from studies.measurements import Angles
from studies.ratio_rules import (
    RULES,
    RatioMerge,
    equation_3,
    gram_matrices,
    parts,
    ratios,
    stored_gram_matrices,
)
from studies.runs import Run
from studies.study import Setup
from tests.studies.context import DrawnContext

PAIR = (Replica(Run(0)), Replica(Run(1)))


@pytest.fixture(scope="module")
def context():
    return DrawnContext()


@pytest.fixture(scope="module")
def grams(context):
    return gram_matrices(context.anchor(), stacked(context, PAIR))


def test_gram_matrices(context, grams):
    anchor = named_leaves(context.anchor())
    for name, gram in grams.items():
        deltas = [
            np.float64(named_leaves(model.build(context))[name]).ravel() - anchor[name].ravel()
            for model in PAIR
        ]
        # Cosines and norms are stored in float32.
        np.testing.assert_allclose(gram, [[a @ b for b in deltas] for a in deltas], rtol=1e-5)


def test_stored_gram_matrices(context, grams):
    stored = stored_gram_matrices(Angles(PAIR).measure(context))
    for name, gram in grams.items():
        # Stored angles have four decimals, stored norms six digits.
        np.testing.assert_allclose(stored[name], gram, rtol=1e-4, atol=1e-6 * gram.max())
    frozen = {"a": {"angles": [], "norms": [0.0, 0.0], "size": 3}}
    assert not stored_gram_matrices(frozen)["a"].any()


@pytest.mark.parametrize(
    "rule,unit",
    [
        ("block", lambda name, shape: "head" if name.startswith("head") else "block"),
        ("tower", lambda name, shape: name.startswith("head")),
    ],
)
def test_pooled_rules_are_merge_units(rule, unit, context):
    """All tensors of the only block share a ratio, as by a unit function of the library."""
    expected, _ = model_stock(context.anchor(), stacked(context, PAIR), unit=unit)
    # One rounding of float32, of a ratio that is computed from cosines in float32.
    found = RatioMerge(PAIR, rule).build(context)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_lowered_part(context, grams):
    tower, by_part = ratios("tower", grams), parts(grams)
    assert set(by_part.values()) == {
        "query and key, first half",
        "value and output, first half",
        "norms, first half",
        "biases, first half",
        "head",
    }
    for name, ratio in ratios("lower query and key, first half", grams).items():
        lowered = "q_proj.kernel" in name or "k_proj.kernel" in name
        assert ratio == pytest.approx(tower[name] - 0.3 * lowered)
    with pytest.raises(KeyError, match="lower MLP"):
        ratios("lower MLP, first half", grams)


def test_halfway(grams):
    tower, halfway = ratios("tower", grams), ratios("halfway", grams)
    for name, gram in grams.items():
        own = tower[name] if name.startswith("head.") else equation_3(gram)
        assert halfway[name] == pytest.approx((tower[name] + own) / 2)


def test_one_ratio_is_a_point_of_the_curve(context, grams):
    (ratio,) = set(ratios("one", grams).values())
    anchor, mean = context.anchor(), uniform_mean(context.anchor(), stacked(context, PAIR))[0]
    for name, found in named_leaves(RatioMerge(PAIR, "one").build(context)).items():
        w0, w = named_leaves(anchor)[name], named_leaves(mean)[name]
        np.testing.assert_allclose(found, w0 + ratio * (w - w0), rtol=1e-5, atol=1e-6)


def test_ratios_along_depth():
    grams = {
        f"blocks.{k}.kernel": np.array([[1.0, cosine], [cosine, 1.0]])
        for k, cosine in enumerate((0.4, 0.5, 0.6))
    }
    rules = ("tower", "block", "reflected", "steeper")
    tower, block, reflected, steeper = (ratios(rule, grams) for rule in rules)
    assert list(block.values()) == pytest.approx([equation_3(gram) for gram in grams.values()])
    assert block["blocks.0.kernel"] < block["blocks.2.kernel"]
    for name in grams:
        assert reflected[name] + block[name] == pytest.approx(2 * tower[name])
        assert steeper[name] + tower[name] == pytest.approx(2 * block[name])


def test_interior():
    """One ratio in the blocks; the mean before and after them; the head by itself."""
    names = ("embedding.kernel", "blocks.0.kernel", "blocks.1.kernel", "head.kernel")
    grams = {
        name: np.array([[1.0, cosine], [cosine, 1.0]])
        for name, cosine in zip(names, (0.3, 0.4, 0.6, 0.8), strict=True)
    }
    found = ratios("interior", grams)
    inside = equation_3(np.array([[2.0, 1.0], [1.0, 2.0]]))
    expected = (1.0, inside, inside, equation_3(grams["head.kernel"]))
    assert list(found.values()) == pytest.approx(expected)


def test_coherent_ratios_minimize_the_expected_error():
    """Against a numerical minimum of the formula in the docstring."""
    rng = np.random.default_rng(0)
    signal, noise = rng.uniform(0.5, 1, 4), rng.uniform(2, 4, 4)  # Noise of the mean of 2.
    grams = {
        f"blocks.{k}.kernel": np.array([[s * s + 2 * n, s * s], [s * s, s * s + 2 * n]])
        for k, (s, n) in enumerate(zip(signal, noise, strict=True))
    }
    found = np.array(list(ratios("coherent", grams).values()))
    assert found.max() < 1, "clipped"

    def error(t):
        return (signal.sum() - t @ signal) ** 2 + t**2 @ noise

    steps = rng.normal(0, 0.01, (200, 4))
    assert all(error(found) < error(found + step) for step in steps)


def test_the_criterion():
    """Candidates against a straight curve, equation 3 and one ratio, at equal ID and shifts."""
    setup = Setup((0, 1, 2, 3), 2, 10)

    def score(key):
        # On the line ID = 80 + 10 alpha, shifts = 60 - 4 alpha, but for some points of a rule.
        name, seed, *alpha = key
        alpha = alpha[0] if alpha else {"zero_shot": 0.0, "mean": 1.0}.get(name, 0.5)
        higher = {"tensor": 0.4, "one": 0.0, "interior": 1.0, "kind": -1.0}.get(name, 0.0)
        return {"id": 80 + seed / 10 + 10 * alpha, "shifts": {"v2": 60 - 4 * alpha + higher}}

    study = STUDIES["ratio_candidates"]
    table, *_ = study.summarize(
        setup, {key: score(key) for key in study.measurements(setup)}
    ).tables
    cells = [[cell.split(" ± ")[0] for cell in row[1:]] for row in table.rows]
    # A step of 1 along the shifts is 2.5 along ID.
    assert cells == [
        ["1.00", "0.60", "1.00"],
        ["-1.00", "-1.40", "-1.00"],
        ["2.50", "1.50", "2.50"],
        ["-2.50", "-3.50", "-2.50"],
    ]


def test_undefined_ratios_are_0(context):
    anchor = context.anchor()
    same = {name: np.stack([leaf, leaf]) for name, leaf in anchor["head"].items()}
    grams = gram_matrices({"head": anchor["head"]}, {"head": same})
    assert all(equation_3(gram) == 0 for gram in grams.values())
    assert set(RULES) == {
        "tower",
        "kind",
        "block",
        "halfway",
        "steeper",
        "reflected",
        "interior",
        "coherent",
    }
