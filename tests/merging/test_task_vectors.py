"""Task arithmetic, TIES and SLERP against cases by hand and plain readings of their papers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelstock_jax.checkpoint_merge.methods import measure_trim
from modelstock_jax.errors import UserError
from modelstock_jax.merging import (
    UnitOutcome,
    model_stock,
    report,
    slerp,
    stack_replicas,
    task_arithmetic,
    ties,
    uniform_mean,
    wise_ft,
)
from tests.merging.trees import replicas

quick = settings(max_examples=50, deadline=None)
# Halves, so that numbers of equal magnitude, zeros and exact cancellation all occur.
halves = st.integers(-6, 6).map(lambda k: np.float32(k / 2))


ONE = {"a": (4,)}  # most cases share this shape: each is compiled once


def test_task_arithmetic_by_hand():
    w0 = {"a": np.float32([1, 1, 0, 2])}
    w = {"a": np.float32([[2, 1, 0, 1], [1, 3, 0, 4]])}
    merged, stats = task_arithmetic(w0, w, 0.5)
    assert merged["a"].tolist() == [1.5, 2.0, 0.0, 2.5]
    assert {row["outcome"] for row in report(stats)} == {"fixed_ratio"}
    assert float(stats.ratio["a"]) == 1.0
    forgotten, _ = task_arithmetic(w0, w, (-1.0, 0.0))
    assert forgotten["a"].tolist() == [0.0, 1.0, 0.0, 3.0]


def test_task_arithmetic_holds_the_mean_the_curve_and_analogies():
    w0, w = replicas(ONE, 2)
    for got, want in [
        (task_arithmetic(w0, w, 0.5), uniform_mean(w0, w)[0]["a"]),
        (task_arithmetic(w0, w, 0.15), wise_ft(w0, w, 0.3)[0]["a"]),
        (task_arithmetic(w0, w, [1.0, -1.0]), w0["a"] + w["a"][0] - w["a"][1]),
    ]:
        # The scale is a float32 number.
        np.testing.assert_allclose(got[0]["a"], want, rtol=1e-6, atol=1e-7)


def test_predicted_distance_of_unequal_shares():
    # About a known center: 4,000 numbers, so norms are sharp to 1 / sqrt(8000) = 1 %.
    rng = np.random.default_rng(0)
    mu = rng.standard_normal(4000)
    w0 = {"w": np.zeros(4000, np.float32)}
    w = {"w": (mu + rng.standard_normal((2, 4000))).astype(np.float32)}
    merged, stats = task_arithmetic(w0, w, (0.9, 0.1))
    truth = np.linalg.norm(merged["w"] - mu)
    assert float(stats.predicted_distance.merged["w"]) == pytest.approx(truth, rel=0.03)


def ties_by_the_paper(w0, w, density, scale):
    """Algorithm 1 on flat float64 vectors: sort, sum, and the mean of those that agree."""
    deltas = np.asarray(w, np.float64) - np.asarray(w0, np.float64)
    trimmed = np.zeros_like(deltas)
    for row, delta in zip(trimmed, deltas, strict=True):
        keep = max(1, int(density * delta.size))
        least = np.sort(np.abs(delta))[::-1][keep - 1]
        row[np.abs(delta) >= least] = delta[np.abs(delta) >= least]
    merged = np.zeros(deltas.shape[1])
    for p, column in enumerate(trimmed.T):
        sign = 1.0 if column.sum() >= 0 else -1.0
        agree = [x for x in column if x * sign > 0]
        merged[p] = np.mean(agree) if agree else 0.0
    return w0 + scale * merged


@quick
@given(hnp.arrays(np.float32, (4, 8), elements=halves), st.sampled_from([0.3, 1.0]))
def test_ties_is_its_algorithm_over_the_whole_model(x, density):
    w0, w = {"a": x[0, :4], "b": x[0, 4:]}, {"a": x[1:, :4], "b": x[1:, 4:]}
    merged, _ = ties(w0, w, density, 0.5)
    got = np.concatenate([merged["a"], merged["b"]])
    np.testing.assert_allclose(got, ties_by_the_paper(x[0], x[1:], density, 0.5), rtol=0, atol=1e-6)


def test_ties_by_hand_and_by_tensor():
    w0 = {"small": np.zeros(4, np.float32), "large": np.zeros(4, np.float32)}
    w = {
        "small": np.float32([[1, -2, 3, 0], [1, 2, -1, 0]]),
        "large": np.float32([[50, -60, 70, -80], [-50, 60, 70, 80]]),
    }
    whole, _ = ties(w0, w, density=0.5)
    assert whole["small"].tolist() == [0, 0, 0, 0]  # all of the largest half is in the other
    # 50 - 50 and -80 + 80 cancel: the positive sign.
    assert whole["large"].tolist() == [50, 60, 70, 80]
    apart, stats = ties(w0, w, density=0.5, unit="tensor")
    assert apart["small"].tolist() == [1, 2, 3, 0]
    assert apart["large"].tolist() == [0, 0, 70, 80]
    assert float(stats.predicted_distance.merged["small"]) == -1.0
    assert stats.outcome["small"] == UnitOutcome.FIXED_RATIO
    each, _ = ties(w0, w, density=(0.25, 1.0), unit="tensor")
    assert each["small"].tolist() == [1, 2, 3, 0] and each["large"].tolist() == [-50, 60, 70, 80]


def test_ties_of_a_tensor_is_what_the_command_line_computes():
    w0, w = replicas({"a": (40, 25)}, 3)
    deltas = (w["a"] - w0["a"]).reshape(3, -1)
    trim = measure_trim(
        lambda f: f(w0["a"].ravel(), deltas), 1000, [0.2] * 3, np.ones(3), 0.7, normalize=True
    )
    merged, _ = ties(w0, w, 0.2, 0.7, unit="tensor")
    kept = np.asarray(merged["a"]) != w0["a"]
    assert 200 <= kept.sum() <= 600
    # The command line adds in float32.
    np.testing.assert_allclose(
        np.asarray(merged["a"]).ravel(),
        w0["a"].ravel() + trim.merge(deltas.copy()),
        rtol=3e-7,
        atol=1e-7,
    )


def slerp_by_hand(first, second, t):
    angle = np.arccos(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    return (np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle)


@pytest.mark.parametrize("t", [None, 0.0, 0.3, 1.0])
def test_slerp_of_two(t):
    w0, w = replicas(ONE, 2)
    d = w["a"].astype(np.float64) - w0["a"]
    merged, stats = slerp(w0, w, t)
    expected = slerp_by_hand(d[0], d[1], 0.5 if t is None else t)
    np.testing.assert_allclose(merged["a"], w0["a"] + expected, rtol=3e-7, atol=1e-7)
    if t is None:  # longer than the mean, whose ratio is 1
        assert float(stats.ratio["a"]) > 1.05


def test_slerp_keeps_the_length_and_takes_more_than_two_in_turn():
    rng = np.random.default_rng(0)
    d = rng.standard_normal((4, 50))
    d *= 3.0 / np.linalg.norm(d, axis=1, keepdims=True)
    w0 = {"w": np.zeros(50, np.float32)}
    w = {"w": d.astype(np.float32)}
    total = d[0]
    for m in range(1, 4):
        total = slerp_by_hand(total, d[m], 1 / (m + 1))
    merged, _ = slerp(w0, w)
    np.testing.assert_allclose(merged["w"], total, rtol=0, atol=1e-6)
    assert float(np.linalg.norm(merged["w"])) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize(
    "second,expected",
    [
        ([2.0, 4.0], [1.5, 3.0]),  # along the first: the mean
        ([-1.0, -2.0], [0.0, 0.0]),  # against it: no arc is the shortest
        ([0.0, 0.0], [0.5, 1.0]),  # one that did not move
    ],
)
def test_slerp_on_one_line_is_linear(second, expected):
    merged, _ = slerp(
        {"a": np.zeros(4, np.float32)},
        {"a": np.float32([[1.0, 2.0, 0.0, 0.0], [*second, 0.0, 0.0]])},
    )
    np.testing.assert_allclose(merged["a"], [*expected, 0.0, 0.0], atol=1e-7)


def test_warp_from_its_parts_lies_between_the_anchor_and_the_arc():
    w0, w = replicas(ONE, 2)
    arc, _ = slerp(w0, w)
    back, _ = wise_ft(w0, stack_replicas([arc]), 0.3)
    np.testing.assert_allclose(back["a"], 0.7 * w0["a"] + 0.3 * arc["a"], rtol=1e-6, atol=1e-7)
    far = [np.linalg.norm(x["a"] - w0["a"]) for x in (model_stock(w0, w)[0], arc)]
    assert far[0] < far[1]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda w0, w: task_arithmetic(w0, w, [1.0, 2.0, 3.0]), r"shape \(2,\); not \(3,\)"),
        (lambda w0, w: task_arithmetic(w0, w, float("nan")), "scale .*finite"),
        (lambda w0, w: ties(w0, w, 0.0), r"density .*\(0, 1\]"),
        (lambda w0, w: ties(w0, w, (0.5, 0.5, 0.5)), "density.* 2 "),
        (lambda w0, w: ties(w0, w, scale=[1.0, 1.0]), "one scale"),
        (lambda w0, w: slerp(w0, w, 1.5), r"t .*\[0, 1\]"),
        (lambda w0, w: slerp(w0, jax.tree.map(lambda x: x[:1], w), 0.5), "replicas.* 1"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call(*replicas(ONE, 2))
