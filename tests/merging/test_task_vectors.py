"""Task arithmetic, TIES and SLERP, compared with hand-computed cases and their papers."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modelstock_jax.checkpoint_merge.elementwise import Place, SparseSum, magnitude_range
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
from tests.merging.reference import ties as ties_reference
from tests.merging.trees import replicas

quick = settings(max_examples=50, deadline=None)
# Multiples of 0.5, so that equal magnitudes, zeros and exact cancellation all occur.
halves = st.integers(-6, 6).map(lambda k: np.float32(k / 2))


ONE = {"a": (4,)}  # most cases use this shape, so that each is compiled once


def test_task_arithmetic_by_hand():
    w0 = {"a": np.float32([1, 1, 0, 2])}
    w = {"a": np.float32([[2, 1, 0, 1], [1, 3, 0, 4]])}
    merged, stats = task_arithmetic(w0, w, 0.5)
    assert merged["a"].tolist() == [1.5, 2.0, 0.0, 2.5]
    assert {row["outcome"] for row in report(stats)} == {"fixed_ratio"}
    assert float(stats.ratio["a"]) == 1.0
    forgotten, _ = task_arithmetic(w0, w, (-1.0, 0.0))
    assert forgotten["a"].tolist() == [0.0, 1.0, 0.0, 3.0]


def test_task_arithmetic_includes_mean_wise_ft_and_analogies():
    w0, w = replicas(ONE, 2)
    for found, expected in [
        (task_arithmetic(w0, w, 0.5), uniform_mean(w0, w)[0]["a"]),
        (task_arithmetic(w0, w, 0.15), wise_ft(w0, w, 0.3)[0]["a"]),
        (task_arithmetic(w0, w, [1.0, -1.0]), w0["a"] + w["a"][0] - w["a"][1]),
    ]:
        # The scale is rounded to float32.
        np.testing.assert_allclose(found[0]["a"], expected, rtol=1e-6, atol=1e-7)


def test_predicted_distance_of_unequal_coefficients():
    # With a known center. 4,000 elements: norms vary by 1 / sqrt(8000) = 1 %.
    rng = np.random.default_rng(0)
    mu = rng.standard_normal(4000)
    w0 = {"w": np.zeros(4000, np.float32)}
    w = {"w": (mu + rng.standard_normal((2, 4000))).astype(np.float32)}
    merged, stats = task_arithmetic(w0, w, (0.9, 0.1))
    truth = np.linalg.norm(merged["w"] - mu)
    assert float(stats.predicted_distance.merged["w"]) == pytest.approx(truth, rel=0.03)


@quick
@given(hnp.arrays(np.float32, (4, 8), elements=halves), st.sampled_from([0.3, 1.0]))
def test_ties_follows_its_algorithm_over_the_complete_model(x, density):
    w0, w = {"a": x[0, :4], "b": x[0, 4:]}, {"a": x[1:, :4], "b": x[1:, 4:]}
    merged, _ = ties(w0, w, density, scale=0.5)
    found = np.concatenate([merged["a"], merged["b"]])
    keep = [max(1, round(density * 8))] * 3
    np.testing.assert_allclose(found, ties_reference(x[0], x[1:], keep, 0.5), rtol=0, atol=1e-6)


def test_ties_by_hand_and_by_tensor():
    w0 = {"small": np.zeros(4, np.float32), "large": np.zeros(4, np.float32)}
    w = {
        "small": np.float32([[1, -2, 3, 0], [1, 2, -1, 0]]),
        "large": np.float32([[50, -60, 70, -80], [-50, 60, 70, 80]]),
    }
    by_model, _ = ties(w0, w, density=0.5)
    assert by_model["small"].tolist() == [
        0,
        0,
        0,
        0,
    ]  # the larger half of the elements is in the other tensor
    # 50 - 50 and -80 + 80 cancel: the positive sign.
    assert by_model["large"].tolist() == [50, 60, 70, 80]
    by_tensor, stats = ties(w0, w, density=0.5, unit="tensor")
    assert by_tensor["small"].tolist() == [1, 2, 3, 0]
    assert by_tensor["large"].tolist() == [0, 0, 70, 80]
    assert float(stats.predicted_distance.merged["small"]) == -1.0
    assert stats.outcome["small"] == UnitOutcome.FIXED_RATIO
    per_replica, _ = ties(w0, w, density=(0.25, 1.0), unit="tensor")
    assert per_replica["small"].tolist() == [1, 2, 3, 0] and per_replica["large"].tolist() == [
        -50,
        60,
        70,
        80,
    ]


def test_ties_of_a_tensor_is_what_the_command_line_computes():
    w0, w = replicas({"a": (40, 25)}, 3)
    deltas = (w["a"].astype(np.float64) - w0["a"]).reshape(3, -1)
    anchor, place = w0["a"].ravel().astype(np.float64), Place("a", 0, 25)
    largest = magnitude_range(lambda f: f(anchor, deltas, place), [200] * 3, [1] * 3, rescale=False)
    trim = SparseSum(largest, np.ones(3), 0.7, elect=True, normalize=True)
    merged, _ = ties(w0, w, 0.2, scale=0.7, unit="tensor")
    changed = np.asarray(merged["a"]) != w0["a"]
    assert 200 <= changed.sum() <= 600
    # The library rounds scale and weights to float32.
    np.testing.assert_allclose(
        np.asarray(merged["a"]).ravel(),
        trim(anchor, deltas, place),
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


def test_slerp_preserves_the_length_and_merges_more_than_two_in_turn():
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
        ([0.0, 0.0], [0.5, 1.0]),  # a replica that did not change
    ],
)
def test_slerp_of_collinear_vectors_is_linear(second, expected):
    merged, _ = slerp(
        {"a": np.zeros(4, np.float32)},
        {"a": np.float32([[1.0, 2.0, 0.0, 0.0], [*second, 0.0, 0.0]])},
    )
    np.testing.assert_allclose(merged["a"], [*expected, 0.0, 0.0], atol=1e-7)


def test_warp_is_slerp_then_interpolation_to_the_anchor():
    w0, w = replicas(ONE, 2)
    arc, _ = slerp(w0, w)
    back, _ = wise_ft(w0, stack_replicas([arc]), 0.3)
    np.testing.assert_allclose(back["a"], 0.7 * w0["a"] + 0.3 * arc["a"], rtol=1e-6, atol=1e-7)
    distances = [np.linalg.norm(x["a"] - w0["a"]) for x in (model_stock(w0, w)[0], arc)]
    assert distances[0] < distances[1]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda w0, w: task_arithmetic(w0, w, [1.0, 2.0, 3.0]), r"shape \(2,\); not \(3,\)"),
        (lambda w0, w: task_arithmetic(w0, w, float("nan")), "scale .*finite"),
        (lambda w0, w: ties(w0, w, 0.0), r"density .*\(0, 1\]"),
        (lambda w0, w: ties(w0, w, density=20), r"density .*\(0, 1\] .*not a percentage.* 20"),
        (lambda w0, w: ties(w0, w, (0.5, 0.5, 0.5)), r"density .*per replica \(2 values\)"),
        (lambda w0, w: ties(w0, w, scale=[1.0, 1.0]), "one scale"),
        (lambda w0, w: slerp(w0, w, 1.5), r"t .*\[0, 1\]"),
        (lambda w0, w: uniform_mean(w0, w, unit=0.5), r"merge unit 0\.5; choose .*tensor"),
        (lambda w0, w: uniform_mean(w0, w, unit="tensors"), "unit 'tensors'; choose .*tensor"),
        (lambda w0, w: model_stock(w0, w, dtype="bf8"), "unknown dtype 'bf8'.*bfloat16"),
        (lambda w0, w: slerp(w0, jax.tree.map(lambda x: x[:1], w), 0.5), "replicas.* 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call(*replicas(ONE, 2))
