"""Cases that the paper leaves open, and cases that other implementations get wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.merging import (
    COSINE_UNDEFINED,
    NonFiniteError,
    UnitOutcome,
    check_finite,
    model_stock,
    outcome_counts,
    report,
    stack_replicas,
    total_distance,
    uniform_mean,
    weighted_model_stock,
)
from tests.merging.trees import TRANSFORMER, nested, replicas

METHODS = [model_stock, weighted_model_stock, uniform_mean]


def _bits(array):
    return np.asarray(array).tobytes()


def test_frozen_tensor_is_the_anchor_bit_for_bit():
    w0 = {"w": np.array([-0.0, 1e-30, 3.3, -7.0], np.float32)}
    merged, stats = model_stock(w0, {"w": np.stack([w0["w"]] * 3)})
    assert _bits(merged["w"]) == _bits(w0["w"])
    assert float(stats.cosine["w"]) == COSINE_UNDEFINED == 2.0
    assert stats.outcome["w"] == UnitOutcome.UNCHANGED
    assert report(stats)[0]["cosine"] is None and report(stats)[0]["angle"] is None
    assert total_distance(stats) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_if_one_replica_changed_the_result_is_its_weights_bit_for_bit(dtype):
    w0, w = replicas({"w": (37,)}, 3, dtype=dtype)
    w["w"][0] = w["w"][2] = w0["w"]
    for method in (model_stock, weighted_model_stock):
        merged, stats = method(w0, w)
        assert _bits(merged["w"]) == _bits(w["w"][1])
        assert stats.outcome["w"] == UnitOutcome.ONE_MODEL_CHANGED
        assert float(stats.ratio["w"]) == 1.0
        assert report(stats)[0]["cosine"] is None


def test_a_replica_that_did_not_change_is_left_out():
    w0, w = replicas({"w": (50,)}, 3)
    pair = {"w": w["w"][:2]}
    w["w"][2] = w0["w"]
    merged, stats = model_stock(w0, w)
    np.testing.assert_array_equal(merged["w"], model_stock(w0, pair)[0]["w"])
    assert stats.outcome["w"] == UnitOutcome.UNCHANGED_MODELS_LEFT_OUT
    assert stats.norm["w"][2] == 0


@pytest.mark.parametrize("cosine", [-0.3, -0.9, -1.0])
@pytest.mark.parametrize("method", [model_stock, weighted_model_stock])
def test_a_negative_cosine_gives_the_anchor_and_is_reported(cosine, method):
    # In other implementations t = -2, -18, -198; NaN at cos = -1.
    second = [cosine, (1 - cosine**2) ** 0.5]
    w0, w = {"w": np.ones(2, np.float32)}, {"w": np.array([[1, 0], second], np.float32) + 1}
    merged, stats = method(w0, w)
    assert _bits(merged["w"]) == _bits(w0["w"])
    assert float(stats.ratio["w"]) == 0.0
    assert outcome_counts(stats) == {"clamped": 1}
    assert abs(float(stats.cosine["w"]) - cosine) < 1e-6


def test_scalars_and_units_of_one_element_get_the_mean():
    w0 = {"logit_scale": np.float32(4.0), "row": np.ones((1, 3), np.float32)}
    w = {"logit_scale": np.array([5.0, 3.5], np.float32), "row": np.ones((2, 1, 3), np.float32)}
    w["row"] += np.array([[[1, 2, 3]], [[3, -2, 1]]], np.float32)
    merged, stats = model_stock(w0, w, unit="filter")
    assert float(merged["logit_scale"]) == 4.25
    np.testing.assert_array_equal(merged["row"], [[3, 1, 3]])
    assert outcome_counts(stats) == {"scalar": 4}
    assert all(row["cosine"] is None for row in report(stats))


def test_integers_booleans_none_and_empty_tensors():
    w0 = {
        "i": np.int8([3, -4]),
        "b": np.array(True),
        "none": None,
        "empty": np.zeros((0, 5), np.float32),
        "w": np.ones(3, np.float32),
    }
    w = {
        "i": np.int8([[9, 9], [9, 9]]),
        "b": np.array([False, False]),
        "none": None,
        "empty": np.zeros((2, 0, 5), np.float32),
        "w": np.ones((2, 3), np.float32) * 2,
    }
    for method in METHODS:
        merged, stats = method(w0, w, unit="filter", dtype=jnp.bfloat16)
        assert merged["i"].dtype == np.int8 and merged["i"].tolist() == [3, -4]
        assert merged["b"].dtype == bool and bool(merged["b"])
        assert merged["none"] is None and stats.cosine["none"] is None
        assert merged["empty"].shape == (0, 5) and merged["empty"].dtype == jnp.bfloat16
        assert merged["w"].dtype == jnp.bfloat16
        assert outcome_counts(stats)["copied"] == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_non_finite_replica_is_named(bad, method):
    w0, w = replicas(TRANSFORMER, 2)
    w["head.kernel"][1, 0, 2] = bad
    with pytest.raises(NonFiniteError, match=r"replica 1 .*'head.kernel'") as error:
        method(nested(w0), nested(w))
    assert (error.value.replica, error.value.tensor) == (1, "head.kernel")
    assert isinstance(error.value, UserError)
    w0["head.bias"][0], w["head.kernel"][1, 0, 2] = bad, 0.0
    with pytest.raises(NonFiniteError, match=r"pretrained: tensor 'head.bias'"):
        method(nested(w0), nested(w))


def test_non_finite_under_jit_keeps_the_anchor_of_its_unit():
    w0, w = replicas({"q": (4, 6), "k": (6,), "v": (4, 2)}, 2)
    w["q"][1, 3, 5], w["v"][0, 0, 0] = np.nan, np.inf
    merged, stats = jax.jit(model_stock, static_argnames="unit")(w0, w, unit="filter")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((merged, stats)))
    assert _bits(merged["q"][:, 5]) == _bits(w0["q"][:, 5])
    good = {"q": w["q"][:, :, :5]}
    np.testing.assert_array_equal(
        merged["q"][:, :5], model_stock({"q": w0["q"][:, :5]}, good, unit="filter")[0]["q"]
    )
    assert stats.finite["q"].tolist() == [[True] * 6, [True] * 5 + [False]]
    assert stats.outcome["q"].tolist()[5] == UnitOutcome.NON_FINITE
    with pytest.raises(NonFiniteError, match=r"replica 1 .*'q'"):
        check_finite(stats)
    for method in (weighted_model_stock, uniform_mean):
        merged, _ = jax.jit(method, static_argnames="unit")(w0, w, unit="tensor")
        assert _bits(merged["q"]) == _bits(w0["q"]) and _bits(merged["k"]) != _bits(w0["k"])
    merged, stats = jax.jit(model_stock, static_argnames="unit")(w0, w, unit="global")
    jax.tree.map(np.testing.assert_array_equal, merged, w0)
    assert [bool(stats.finite[n].all()) for n in "kqv"] == [True, False, False]


def test_an_update_too_large_for_float32_is_an_error():
    w0, w = {"w": np.zeros(3, np.float32)}, {"w": np.full((2, 3), 3e30, np.float32)}
    with pytest.raises(NonFiniteError, match="'w' .*float32"):
        model_stock(w0, w)


def test_a_smaller_dtype_saturates():
    w0, w = {"w": np.full(3, 1e6, np.float32)}, {"w": np.full((2, 3), 2e6, np.float32)}
    assert (np.asarray(model_stock(w0, w, dtype=jnp.float16)[0]["w"]) == 65504).all()


def test_no_merge_raises_under_debug_nans():
    w0, w = replicas({"a": (5,), "b": (3, 4), "c": ()}, 2)
    w["a"][:] = w0["a"]
    w["b"][1] = 2 * w0["b"] - w["b"][0]
    with jax.debug_nans(True), jax.debug_infs(True):
        for method in METHODS:
            method(w0, w, unit="filter")


def _pair(num=2):
    return replicas({"a": (3,), "b": (2, 2)}, num)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda w0, w: w.pop("a"), "pretrained: a"),
        (lambda w0, w: w.update(c=w["a"]), "finetuned: c"),
        (lambda w0, w: w.update(a=w["a"][:, :2]), r"a \(\(3,\) and \(2, 2\)\)"),
        (lambda w0, w: w.update(a=w["a"][0]), "stack_replicas.*: a"),
        (lambda w0, w: w.update(a=w["a"][:1]), "lengths"),
        (lambda w0, w: w.update(a=w["a"].astype(int)), "floating point .*: a"),
        (lambda w0, w: w.update(a=w["a"] * 1j), "finetuned: tensor 'a' .*complex"),
        (lambda w0, w: w0.update(a=np.array(["x"] * 3)), "pretrained: tensor 'a' .*<U1"),
        (lambda w0, w: (w0.clear(), w.clear()), "no tensor"),
    ],
)
def test_trees_that_do_not_match(change, message):
    w0, w = _pair()
    change(w0, w)
    with pytest.raises(UserError, match=message):
        model_stock(w0, w)


def test_a_single_replica_and_a_list_are_errors():
    w0, w = _pair(1)
    with pytest.raises(UserError, match="2 fine-tuned replicas.* 1"):
        model_stock(w0, w)
    with pytest.raises(UserError, match="stack_replicas"):
        model_stock(w0, [w0, w0])
    with pytest.raises(UserError, match="dtype.* int8"):
        model_stock(*_pair(), dtype=jnp.int8)
    with pytest.raises(UserError, match=r"a list of trees: stack_replicas\(\[a, b\]\)"):
        stack_replicas(w0)
    with pytest.raises(UserError, match="a list of trees"):
        stack_replicas(1.0)
    with pytest.raises(UserError, match="replica 1 .*shape.*: a"):
        stack_replicas([{"a": np.zeros(2)}, {"a": np.zeros(3)}])
    with pytest.raises(UserError, match="replica 1: b"):
        stack_replicas([{"a": np.zeros(2)}, {"a": np.zeros(2), "b": np.zeros(2)}])


def test_names_with_dots_do_not_join_units():
    w0, w = replicas({"x": (9,), "y": (9,)}, 2)
    tree = lambda t: {"a": {"b": t["x"]}, "a.b": t["y"]}  # noqa: E731
    stats = model_stock(tree(w0), tree(w))[1]
    separate = model_stock(w0, w)[1]
    assert float(stats.cosine["a"]["b"]) == float(separate.cosine["x"])
    assert float(stats.cosine["a.b"]) == float(separate.cosine["y"])


def test_shared_units_count_once_in_totals():
    w0, w = replicas(TRANSFORMER, 2)
    stats = model_stock(nested(w0), nested(w), unit="global")[1]
    assert total_distance(stats).mean == pytest.approx(
        float(stats.predicted_distance.mean["head"]["bias"]), rel=1e-6
    )
    assert outcome_counts(stats) == {"interpolated": 1}
    assert len(report(stats)) == len(TRANSFORMER)
