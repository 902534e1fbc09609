"""Model Stock against the paper's equations in float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.merging import UNITS, assign, model_stock
from tests.merging.reference import allowed, equation_3, merge_tree
from tests.merging.trees import TRANSFORMER, flat, nested, replicas

EXACT = 1e-6  # absolute error of cosine and ratio that the project guarantees at any size


def _spread(values, shapes, unit):
    """Broadcast unit values to every element, as in the reference."""
    views = assign(list(shapes.items()), unit, num_heads=2)
    return {
        name: np.broadcast_to(np.expand_dims(values[name], view.axes), view.view).reshape(shape)
        for (name, shape), view in zip(shapes.items(), views, strict=True)
    }


# All numbers of replicas with the default unit, all units with 2, 3 and 8; the rest is slow.
EVERY = [(num, unit) for num in range(2, 9) for unit in UNITS]
QUICK = [(num, unit) for num, unit in EVERY if unit == "tensor" or num in (2, 3, 8)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in QUICK]


@pytest.mark.parametrize("num,unit", QUICK + SLOW)
def test_every_unit_and_number_of_replicas(num, unit):
    w0, w = replicas(TRANSFORMER, num, seed=num)
    cosine, ratio, merged = merge_tree(w0, w, unit)
    found, stats = model_stock(nested(w0), nested(w), unit=unit, num_heads=2)
    found = flat(found)
    found_cosine = _spread(flat(stats.cosine), TRANSFORMER, unit)
    found_ratio = _spread(flat(stats.ratio), TRANSFORMER, unit)
    for name in w0:
        np.testing.assert_allclose(found_cosine[name], cosine[name], rtol=0, atol=EXACT)
        np.testing.assert_allclose(found_ratio[name], ratio[name], rtol=0, atol=EXACT)
        error = np.abs(np.asarray(found[name], np.float64) - merged[name])
        assert (error <= allowed(w0[name], w[name], merged[name])).all(), name
        assert found[name].dtype == np.float32


@pytest.mark.parametrize(
    "shape",
    [
        (2,),
        (3,),
        (7, 1),
        (1, 7),
        (127,),
        (1, 1, 2),
        (5, 3, 1, 2),
        (17, 19, 23),
        (1009, 31),
        (4, 3, 2, 3, 2, 5),
    ],
)
@pytest.mark.parametrize("cosine", [-0.2, 0.001, 0.5, 0.9999])
def test_odd_shapes_and_angles(shape, cosine):
    w0, w = replicas({"w": shape}, 3, seed=len(shape), cosine=max(cosine, 0.0))
    if cosine < 0:
        w["w"][1] = 2 * w0["w"] - w["w"][0]
    expected = equation_3(w0["w"].ravel(), w["w"].reshape(3, -1))
    merged, stats = model_stock(w0, w)
    assert abs(float(stats.cosine["w"]) - expected[0]) < EXACT
    assert abs(float(stats.ratio["w"]) - expected[1]) < EXACT
    target = expected[2].reshape(shape)
    error = np.abs(np.asarray(merged["w"], np.float64) - target)
    assert (error <= allowed(w0["w"], w["w"], target)).all()


@pytest.mark.parametrize("size", [1e-6, 1e-5, 1e-3, 1.0, 100.0])
def test_small_and_large_task_vectors(size):
    # At 1e-5, a product of norms clamped at 1e-6 would give t = 0.08 instead of 0.70. At 100, the
    # difference of task vectors cancels.
    w0, w = replicas({"w": (50, 20)}, 2, size=size)
    if size < 1e-2:  # weights small enough to represent such updates
        w = {"w": w["w"] - w0["w"]}
        w0 = {"w": w0["w"] * np.float32(1e-2)}
        w = {"w": w0["w"] + w["w"]}
    cosine, ratio, target = equation_3(w0["w"].ravel(), w["w"].reshape(2, -1))
    merged, stats = model_stock(w0, w)
    assert abs(float(stats.cosine["w"]) - cosine) < EXACT
    assert abs(float(stats.ratio["w"]) - ratio) < EXACT
    target = target.reshape(50, 20)
    error = np.abs(np.asarray(merged["w"], np.float64) - target)
    assert (error <= allowed(w0["w"], w["w"], target)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_dtypes_are_at_the_rounding_expected(dtype):
    w0, w = replicas({"w": (64, 33)}, 2, dtype=np.float32, size=0.5)
    w0, w = ({"w": x["w"].astype(jnp.dtype(dtype))} for x in (w0, w))
    _, ratio, target = equation_3(w0["w"].ravel(), w["w"].reshape(2, -1))
    merged, stats = model_stock(w0, w)
    assert merged["w"].dtype == jnp.dtype(dtype)
    assert abs(float(stats.ratio["w"]) - ratio) < EXACT
    # The exact result, rounded to the output dtype. An error of 1e-7 in the ratio may round a tie,
    # or a neighbor of a tie, the other way; all other elements are equal.
    expected = target.reshape(64, 33).astype(jnp.dtype(dtype))
    assert (np.asarray(merged["w"]) == expected).mean() > 0.999


def test_mixed_dtypes_and_a_given_dtype():
    w0, w = replicas({"a": (9, 4), "b": (9, 4)}, 2, size=0.5)
    w0["a"] = w0["a"].astype(jnp.bfloat16)
    merged, _ = model_stock(w0, w, unit="global")
    assert (merged["a"].dtype, merged["b"].dtype) == (jnp.bfloat16, np.float32)
    group = [
        np.concatenate([np.asarray(x[n], np.float64).reshape(*lead, -1) for n in "ab"], -1)
        for x, lead in ((w0, ()), (w, (2,)))
    ]
    cosine, _, target = equation_3(*group)
    assert abs(float(model_stock(w0, w, unit="global")[1].cosine["a"]) - cosine) < EXACT
    merged, _ = model_stock(w0, w, unit="global", dtype=jnp.float32)
    np.testing.assert_allclose(merged["a"].ravel(), target[:36], rtol=0, atol=2e-7)  # 1 ulp of 2


def test_float64(x64):
    w0, w = replicas({"w": (50, 40)}, 3, dtype=np.float64)
    cosine, ratio, target = equation_3(w0["w"].ravel(), w["w"].reshape(3, -1))
    merged, stats = model_stock(w0, w)
    assert merged["w"].dtype == stats.cosine["w"].dtype == np.float64
    # A few roundings in float64 (1.1e-16), none in float32.
    np.testing.assert_allclose([stats.cosine["w"], stats.ratio["w"]], [cosine, ratio], rtol=1e-13)
    np.testing.assert_allclose(merged["w"].ravel(), target, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("unit", ["tensor", "head", "filter"])
def test_jit_equals_eager_bit_for_bit(unit):
    shapes = {k: v for k, v in TRANSFORMER.items() if "block_00.self_attn" in k or "head" in k}
    w0, w = (nested(tree) for tree in replicas(shapes, 2))
    jitted = jax.jit(model_stock, static_argnames=("unit", "num_heads"))
    eager = model_stock(w0, w, unit=unit, num_heads=2)
    traced = jitted(w0, w, unit=unit, num_heads=2)
    jax.tree.map(np.testing.assert_array_equal, eager, traced)
