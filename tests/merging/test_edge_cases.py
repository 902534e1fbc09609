"""Callers that a merge must not surprise: strict NumPy settings, reports under jit, wrong keys."""

from __future__ import annotations

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax import merging
from modelstock_jax.errors import UserError
from modelstock_jax.merging import NonFiniteError

# Products of the tensors are +infinity and -infinity: their sum over a joined unit is NaN.
ANCHOR = {name: np.zeros(2, np.float32) for name in "ab"}
OVERFLOW = {
    "a": np.array([[3e19, 0], [3e19, 0]], np.float32),
    "b": np.array([[3e19, 0], [-3e19, 0]], np.float32),
}
METHODS = {
    "model_stock": (),
    "weighted_model_stock": (),
    "model_stock_carried": (),
    "uniform_mean": (),
    "wise_ft": (0.3,),
    "constant_ratio": (),
    "task_arithmetic": (0.3,),
    "ties": (0.5,),
    "slerp": (),
}


@pytest.mark.parametrize("method", METHODS)
def test_overflow_is_a_non_finite_error_if_numpy_raises_errors(method):
    merge = getattr(merging, method)
    with np.errstate(all="raise"), pytest.raises(NonFiniteError, match="replica 0.*'a'"):
        merge(ANCHOR, OVERFLOW, *METHODS[method], unit="global")


@pytest.mark.parametrize("measure", [merging.cosines, merging.norms])
def test_measures_overflow_as_in_jax_if_numpy_raises_errors(measure):
    with np.errstate(all="raise"):
        eager = measure(ANCHOR, OVERFLOW, unit="global")
    jitted = jax.jit(lambda *trees: measure(*trees, unit="global"))(ANCHOR, OVERFLOW)
    np.testing.assert_array_equal(eager["a"], jitted["a"])


@pytest.mark.parametrize(
    "function",
    [merging.report, merging.total_distance, merging.outcome_counts, merging.check_finite],
)
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_reports_under_a_transformation_say_where_to_call_them(function, transform):
    base, models = {"w": jnp.zeros((1, 3))}, {"w": jnp.ones((1, 2, 3))}

    def merge_and_report(base, models):
        take = (lambda x: x[0]) if transform is jax.jit else (lambda x: x)
        _, stats = merging.model_stock(jax.tree.map(take, base), jax.tree.map(take, models))
        return function(stats)

    with pytest.raises(UserError, match="return the statistics from it, and call this outside"):
        transform(merge_and_report)(base, models)


@pytest.mark.parametrize(
    "options", [{"scan_axes": {0: 0}}, {"unit": "head", "num_heads": {0: 2}}], ids=str
)
def test_a_name_prefix_that_is_not_a_string(options):
    shape = (2, 4, 4)
    names = [f"layers.attn.{part}_proj.kernel" for part in "qkv"]
    if "num_heads" in options:
        shape = shape[1:]
    with pytest.raises(UserError, match="a name prefix must be a string, .*not 0"):
        merging.assign([(name, shape) for name in names], **options)


def small_merge():
    base = {"b": jnp.ones(3), "n": jnp.arange(2), "w": jnp.ones((2, 3))}
    models = jax.tree.map(lambda x: jnp.stack([x * 2, x * 3]), base)
    return merging.model_stock(base, models)[1]


def test_properties_in_a_loop_over_names_slice_the_rows_once(monkeypatch):
    stats = small_merge()
    puts = []
    device_put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda *args: puts.append(args) or device_put(*args))
    first = [stats.cosine[name] for name in "bnw"]
    assert len(puts) == 1 and [stats.cosine[name] for name in "bnw"] == first
    assert stats.norm["w"].shape == (2,) and stats.finite["w"].all() and len(puts) == 3


def test_changes_of_a_property_do_not_change_the_statistics():
    stats = small_merge()
    del stats.ratio["b"]
    assert set(stats.ratio) == {"b", "n", "w"}


def test_properties_read_in_jit_do_not_leak_out_of_it():
    stats = small_merge()
    inside = jax.jit(lambda x: x * stats.ratio["w"])(1.0)
    assert float(stats.ratio["w"]) == float(inside)


def test_read_properties_are_not_pickled():
    stats = small_merge()
    size = len(pickle.dumps(stats))
    ratio = stats.ratio
    assert len(pickle.dumps(stats)) == size
    assert pickle.loads(pickle.dumps(stats)).ratio == ratio


def test_the_shapes_of_a_merge_have_the_properties_of_its_statistics():
    base = {"n": jnp.arange(2), "w": jnp.ones((2, 3))}
    models = jax.tree.map(lambda x: jnp.stack([x * 2, x * 3]), base)
    by_filter = functools.partial(merging.model_stock, unit="filter")
    _, shapes = jax.eval_shape(by_filter, base, models)
    _, stats = by_filter(base, models)
    for name in ("cosine", "ratio", "norm", "predicted_distance", "outcome", "finite"):
        expected = jax.tree.map(lambda x: (x.shape, x.dtype), getattr(stats, name))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), getattr(shapes, name)) == expected
    with pytest.raises(UserError, match="call this outside"):
        merging.report(shapes)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("bfloat16", "float16"),
        ("float32", "float16"),
        ("float16", "float8_e4m3fn"),
        ("float8_e5m2", "float8_e4m3fn"),
        ("float8_e5m2fnuz", "float8_e4m3fnuz"),
        ("float8_e5m2fnuz", "float8_e3m4"),
    ],
)
def test_copied_weights_saturate_at_the_largest_value_of_a_narrower_dtype(stored, dtype, jit):
    largest, beyond = (float(jnp.finfo(d).max) for d in (dtype, stored))
    anchor = jnp.array([beyond, -beyond, 1.0]).astype(stored)
    replicas = jnp.stack([anchor, anchor])
    merge = functools.partial(merging.model_stock, dtype=dtype)
    merged, _ = (jax.jit(merge) if jit else merge)({"w": anchor}, {"w": replicas})
    assert np.asarray(merged["w"], np.float64).tolist() == [largest, -largest, 1.0]
