"""Undefined cosines and unknown distances are left out of every mean and sum, never averaged in."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from modelstock_jax.merging import (
    COSINE_UNDEFINED,
    DISTANCE_UNDEFINED,
    angle,
    cosines,
    model_stock,
    report,
    ties,
    total_distance,
    uniform_mean,
    wise_ft,
)
from modelstock_jax.merging.rules import unit_row
from tests.merging.test_every_merge import MERGES
from tests.merging.trees import replicas

UNKNOWN = (None, None, None)


def undefined_units(num=2):
    """Under `filter`, `kernel` has a frozen filter and one that only the last replica changed."""
    w0, w = replicas({"kernel": (6, 4), "frozen": (5,), "one": (5,), "scalar": ()}, num)
    w["kernel"][:, :, 0] = w0["kernel"][:, 0]
    w["kernel"][:-1, :, 1] = w0["kernel"][:, 1]
    w["frozen"][:] = w0["frozen"]
    w["one"][:-1] = w0["one"]
    w0["count"], w["count"] = np.int32(1), np.int32([1] * num)
    return w0, w


def test_total_distance_is_none_if_no_unit_has_one():
    w0, w = replicas({"a": (5,), "b": (2, 3)}, 3)
    one_changed = {name: np.stack([w0[name], w0[name], w[name][0]]) for name in w0}
    for method in (model_stock, uniform_mean):
        assert total_distance(method(w0, one_changed)[1]) == UNKNOWN
    copied = {"count": np.int32(3)}, {"count": np.int32([4, 5])}
    assert total_distance(model_stock(*copied)[1]) == UNKNOWN


def test_frozen_tensors_alone_predict_no_total_distance():
    """One model gives no angle; the frozen tensor is at a known distance, 0."""
    w0 = {"frozen": np.ones(3, np.float32), "w": np.zeros(3, np.float32)}
    one = {"frozen": np.ones((1, 3), np.float32), "w": np.ones((1, 3), np.float32)}
    assert total_distance(wise_ft(w0, one, 0.5)[1]) == UNKNOWN


def test_total_distance_of_a_merge_in_which_nothing_changed_is_0():
    """All models are then equal to the anchor: the distance is known."""
    w0, _ = replicas({"a": (5,), "b": (2, 3)}, 2)
    _, stats = model_stock(w0, {name: np.stack([value] * 2) for name, value in w0.items()})
    assert total_distance(stats) == (0.0, 0.0, 0.0)
    assert all(row["cosine"] is None and row["angle"] is None for row in report(stats))


def test_a_non_finite_unit_has_no_distance():
    w0, w = replicas({"a": (5,), "b": (2, 3)}, 2)
    known = total_distance(model_stock(w0, w)[1])
    w["a"][1, 2] = np.nan
    stats = jax.jit(model_stock)(w0, w)[1]
    assert stats.predicted_distance.merged["a"] == DISTANCE_UNDEFINED
    assert all(0 < value < both for value, both in zip(total_distance(stats), known, strict=True))
    w["b"][0, 0, 0] = np.inf
    assert total_distance(jax.jit(model_stock)(w0, w)[1]) == UNKNOWN


@pytest.mark.parametrize("unit", ["tensor", "filter", "global"])
def test_ties_has_no_merged_distance(unit):
    w0, w = replicas({"a": (5,), "b": (2, 3)}, 2)
    distance = total_distance(ties(w0, w, 0.5, unit=unit)[1])
    plain = total_distance(uniform_mean(w0, w, unit=unit)[1])
    assert distance.merged is None and plain.merged is not None
    assert (distance.replica, distance.mean) == (plain.replica, plain.mean)
    assert distance.mean > 0


def test_total_distance_leaves_out_units_without_one():
    w0, w = undefined_units()
    _, stats = model_stock(w0, w, unit="filter")
    assert stats.predicted_distance.mean["kernel"][1] == DISTANCE_UNDEFINED
    assert stats.predicted_distance.mean["one"] == DISTANCE_UNDEFINED
    defined = {"kernel": w0["kernel"][:, 2:], "scalar": w0["scalar"]}
    replicas_ = {"kernel": w["kernel"][:, :, 2:], "scalar": w["scalar"]}
    _, expected = model_stock(defined, replicas_, unit="filter")
    np.testing.assert_allclose(total_distance(stats), total_distance(expected), rtol=1e-6)


def test_means_of_a_row_leave_out_units_without_an_angle():
    w0, w = undefined_units()
    _, stats = model_stock(w0, w, unit="filter")
    assert stats.cosine["kernel"][:2].tolist() == [COSINE_UNDEFINED] * 2
    rows = {row["name"]: row for row in report(stats)}
    defined = np.asarray(stats.cosine["kernel"][2:])
    assert rows["kernel"]["cosine"] == pytest.approx(defined.mean())
    assert rows["kernel"]["angle"] == pytest.approx(float(angle(defined).mean()))
    assert rows["kernel"]["num_units"] == 4 and rows["kernel"]["outcome"] == "mixed"
    for name in ("frozen", "one", "scalar", "count"):
        assert rows[name]["cosine"] is rows[name]["angle"] is None
    assert json.loads(json.dumps(list(rows.values()), allow_nan=False))[0] == report(stats)[0]


def test_a_row_in_which_every_angle_is_undefined():
    undefined = np.full(3, COSINE_UNDEFINED)
    row = unit_row("w", "w", undefined, np.zeros(3), np.zeros((2, 3)), np.full(3, 3))
    assert row["cosine"] is row["angle"] is None and row["outcome"] == "unchanged"


def test_cosines_of_a_model_that_did_not_change_are_marked():
    w0, w = replicas({"a": (5,)}, 3)
    w["a"][1] = w0["a"]
    pairs = np.asarray(cosines(w0, w)["a"])
    is_undefined = pairs == COSINE_UNDEFINED
    np.testing.assert_array_equal(is_undefined, [[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    assert (np.abs(pairs[~is_undefined]) <= 1).all()


@pytest.mark.parametrize("name", MERGES)
def test_no_merge_makes_a_nan_of_them(name):
    w0, w = undefined_units()
    with jax.debug_nans(True), jax.debug_infs(True):
        merged, stats = MERGES[name](w0, w)
        rows, distance = report(stats), total_distance(stats)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((merged, stats)))
    json.dumps([rows, distance], allow_nan=False)
