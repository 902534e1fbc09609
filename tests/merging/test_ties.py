"""TIES of the library and of the file merge, compared with one float64 reference.

The ranks are those of the float64 differences, for weights of any dtype.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.elementwise import kth_largest
from modelstock_jax.merging import NonFiniteError, report, rules, ties, total_distance, trimming
from tests.checkpoint_merge import engine as files
from tests.merging import reference
from tests.merging.test_lowering import _module as lowered
from tests.merging.trees import replicas

BF16 = np.dtype(ml_dtypes.bfloat16)
EPS, TINIEST = 2.0**-52, float(np.finfo(np.float32).tiny)
SHAPES = {
    **{f"blocks.block_00.self_attn.{role}_proj.kernel": (4, 6) for role in "qkv"},
    **{f"blocks.block_00.self_attn.{role}_proj.bias": (6,) for role in "qkv"},
    "blocks.block_00.self_attn.out_proj.kernel": (6, 4),
    "blocks.block_00.self_attn.out_proj.bias": (4,),
    "head.bias": (7,),
    "head.scale": (1,),
}


def expected_tree(w0, w, unit, density, scale=1.0):
    """Return the merged tree in float64; `density` is one value, or one per replica."""
    shapes = {name: value.shape for name, value in w0.items()}
    merged = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
    for group in reference.pieces(unit, shapes):
        anchors = [np.asarray(w0[name], np.float64)[index] for name, index in group]
        tuned = [np.asarray(w[name], np.float64)[(slice(None), *index)] for name, index in group]
        flat = np.concatenate([x.reshape(len(x), -1) for x in tuned], axis=1)
        keep = [
            max(1, round(float(d) * flat.shape[1])) for d in np.broadcast_to(density, len(flat))
        ]
        out = reference.ties(np.concatenate([x.ravel() for x in anchors]), flat, keep, scale)
        start = 0
        for (name, index), x in zip(group, anchors, strict=True):
            merged[name][index] = out[start : start + x.size].reshape(x.shape)
            start += x.size
    return merged


def check(merged, expected, dtype, atol=0.0):
    """Check that merged weights are the float64 weights, rounded once."""
    for name, want in expected.items():
        got = np.asarray(merged[name])
        assert got.dtype == dtype and np.isfinite(got.astype(np.float64)).all()
        want = want.astype(dtype).astype(np.float64)
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=0, atol=atol)


def file_merge(tmp_path, w0, w, **options):
    """Merge a tree of the library as files, without normalization of names."""
    models = [
        w0,
        *({name: value[i] for name, value in w.items()} for i in range(len(w[next(iter(w))]))),
    ]
    return files.merge(tmp_path, models, method="ties", **options)


def row(w0, *tuned, dtype=np.float32):
    """Return an anchor and replicas of one tensor."""
    return {"w": np.array(w0, dtype)}, {"w": np.array(tuned, dtype)}


# Elements whose differences are closer than a float32 ulp: rounded to float32 they tie, and the
# merge keeps both. The larger one is first in one replica and second in the other.
TINY, SMALL = 2.0**-30, 2.0**-24  # the second is the smallest float16
CLOSE = {
    "float32": row([1, 1, 0, 0], [TINY, 2 * TINY, 0, 0], [2 * TINY, TINY, 0, 0]),
    "bfloat16": row([1, 1, 0, 0], [TINY, 2 * TINY, 0, 0], [2 * TINY, TINY, 0, 0], dtype=BF16),
    "float16": row(
        [-4, -4, 0, 0], [SMALL, 3 * SMALL, 0, 0], [3 * SMALL, SMALL, 0, 0], dtype=np.float16
    ),
    "float64": row([0, 0, 0, 0], [1, 1 + EPS, 0, 0], [1 + 3 * EPS, 1, 0, 0], dtype=np.float64),
    "below float32": row([0] * 4, [1, 2e-60, 1e-60, 0], [1, 1e-60, 2e-60, 0], dtype=np.float64),
    "above float32": row([0] * 4, [1e60, 2e60, 0, 0], [2e60, 1e60, 0, 0], dtype=np.float64),
}


@pytest.mark.parametrize("case", CLOSE)
def test_ranks_are_those_of_the_float64_difference(case, tmp_path):
    w0, w = CLOSE[case]
    density = 0.5 if case == "below float32" else 0.25
    expected = expected_tree(w0, w, "tensor", density)
    with jax.enable_x64(True):
        merged, _ = ties(w0, w, density, unit="tensor")
        check(merged, expected, w0["w"].dtype)
    merged, _ = file_merge(tmp_path, w0, w, density=density)
    check(merged, expected, w0["w"].dtype)
    # In float32 the two elements of each replica tie, and TIES would keep both.
    pair = [1, 2] if case == "below float32" else [0, 1]
    sizes = np.abs(w["w"].astype(np.float64) - w0["w"].astype(np.float64))[:, pair]
    assert (sizes[:, 0] != sizes[:, 1]).all()
    with np.errstate(over="ignore"):
        assert (sizes.astype(np.float32)[:, 0] == sizes.astype(np.float32)[:, 1]).all()


def test_keys_without_a_64_bit_bitcast_have_the_order_of_the_differences():
    """The branch for TPUs; the compiler must not remove its rounding to float32."""
    rng = np.random.default_rng(0)
    w0 = rng.standard_normal((40, 50)).astype(np.float32)
    w = (w0 + 1e-6 * rng.integers(-4, 5, (2, 40, 50))).astype(np.float32)
    w[:, :20] = rng.standard_normal((2, 20, 50)) * 10.0 ** rng.integers(-9, 1, (2, 20, 50))
    w[:, 0] = w0[0]
    with jax.enable_x64(True):
        values = jnp.abs(jnp.asarray(w, jnp.float64) - w0[None])
        keys = np.asarray(jax.jit(jax.vmap(trimming._bits_of_float32_pair))(values)).ravel()
    values = np.asarray(values).ravel()
    # 2^-46: two float32 have at least 48 bits, one of them the sign of the second.
    order = np.argsort(keys, kind="stable")
    assert (np.diff(values[order]) >= -(2.0**-46) * values[order][1:]).all()
    ranked = np.sort(values)
    assert (np.diff(ranked.astype(np.float32)) == 0).sum() > (np.diff(ranked) == 0).sum() + 10
    np.testing.assert_array_equal(np.argsort(values, kind="stable"), order)


def test_no_64_bit_bitcast_on_a_tpu():
    """TPUs emulate float64, without this operation."""
    bitcast = r"stablehlo\.bitcast_convert.*xf64>"
    assert re.search(bitcast, lowered(ties, "cuda", np.float32))
    assert not re.search(bitcast, lowered(ties, "tpu", np.float32))


@pytest.mark.parametrize(
    "density,count,kept",
    [
        (0.1, 30, 3),
        (0.29, 100, 29),  # the product is 28.999999999999996
        (0.57, 100, 57),  # 56.99999999999999
        (0.07, 100, 7),  # 7.000000000000001
        (0.5, 5, 2),  # halves: to even
        (0.5, 7, 4),
        (0.26, 10, 3),
        (0.24, 10, 2),
        (1e-9, 10, 1),  # at least 1
        (0.99, 10, 10),
        (1.0, 10, 10),
    ],
)
def test_the_number_of_elements_is_the_nearest_integer(density, count, kept, tmp_path):
    assert rules.ties_ranks(density, count, 2) == [kept, kept]
    w0 = {"w": np.zeros(count, np.float32)}
    w = {"w": np.stack([np.arange(1, count + 1, dtype=np.float32)] * 2)}
    merged, _ = ties(w0, w, density, unit="tensor")
    assert np.count_nonzero(merged["w"]) == kept
    merged, _ = file_merge(tmp_path, w0, w, density=density)
    assert np.count_nonzero(merged["w"]) == kept


def test_recipes_of_mergekit_round_down(tmp_path):
    w0 = {"w": np.zeros(100, np.float32)}
    w = {"w": np.stack([np.arange(1, 101, dtype=np.float32)] * 2)}
    merged, _ = file_merge(tmp_path, w0, w, density=0.29, density_rounding="down")
    assert np.count_nonzero(merged["w"]) == int(0.29 * 100) == 28


@pytest.mark.parametrize("unit", ["tensor", "filter", "head", "global", "layer", "block"])
@pytest.mark.parametrize("density", [1.0, 0.2, 1e-6, (0.3, 1.0, 0.5)])
def test_every_unit_equals_the_reference(unit, density, tmp_path):
    w0, w = replicas(SHAPES, 3)
    expected = expected_tree(w0, w, unit, density, 0.5)
    merged, stats = ties(w0, w, density, scale=0.5, unit=unit, num_heads=2)
    check(merged, expected, np.float32)
    assert total_distance(stats).merged is None
    if unit not in ("filter", "head"):
        merged, result = file_merge(tmp_path, w0, w, density=density, scale=0.5, unit=unit)
        check(merged, expected, np.float32)
        assert result.distance["merged"] is None and result.distance["mean"] > 0


@pytest.mark.parametrize("anchor,tuned", [(BF16, np.float32), (BF16, BF16), (np.float16,) * 2])
def test_narrow_weights_equal_the_reference(anchor, tuned, tmp_path):
    w0, w = replicas(SHAPES, 3)
    w0 = {name: x.astype(anchor) for name, x in w0.items()}
    w = {name: x.astype(tuned) for name, x in w.items()}
    expected = expected_tree(w0, w, "tensor", 0.4, 0.5)
    merged, _ = ties(w0, w, 0.4, scale=0.5, unit="tensor")
    check(merged, expected, anchor)
    merged, _ = file_merge(tmp_path, w0, w, density=0.4, scale=0.5)
    check(merged, expected, anchor)


ODD = {
    "equal magnitudes": row([0, 0, 0, 0], [2, -2, 2, 1], [1, 1, -1, 1]),
    "ties at the threshold": row([1, 1, 1, 1], [3, -1, 3, 1.5], [3, 3, 3, 3]),
    "nothing changed": row([1, -0.0, 2, 3], [1, -0.0, 2, 3], [1, -0.0, 2, 3]),
    "one replica changed": row([1, 2, 3, 4], [1, 2, 3, 4], [2, 0, 3, 5]),
    "one replica": row([1, 2, 3, 4], [2, 0, 3.5, 4]),
    "negative zeros": row([-0.0, 0.0, 1, -1], [0.0, -0.0, 2, 1], [-0.0, 0.0, -3, 1]),
    "fewer changes than kept": row([0, 0, 0, 0], [0, 0, 0, 1], [0, 2, 0, 0]),
    "exact cancellation": row([0, 0, 0, 0], [1, -2, 3, -4], [-1, 2, -3, 4]),
    "subnormals": row([0, 1e-40, 0, 1], [1e-40, 0, 1e-45, 2], [-1e-40, 3e-40, 0, 3]),
    "large": row([3e18, -3e18, 0, 1], [2e18, -2e18, 1, 1], [3e18, -3e18, 1, 2]),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.25])
def test_odd_weights_equal_the_reference(case, density, tmp_path):
    w0, w = ODD[case]
    expected = expected_tree(w0, w, "tensor", density)
    merged, stats = ties(w0, w, density, unit="tensor")
    # XLA reads subnormal numbers as 0 on a CPU; NumPy, and so the file merge, does not.
    check(merged, expected, np.float32, TINIEST if case == "subnormals" else 0.0)
    assert float(stats.predicted_distance.merged["w"]) == -1.0
    assert total_distance(stats).merged is None
    merged, result = file_merge(tmp_path, w0, w, density=density)
    check(merged, expected, np.float32)
    assert result.distance["merged"] is None
    assert result.rows[0]["predicted_distance"]["merged"] is None
    assert result.rows[0]["ratio"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("model", ["anchor", "replica"])
def test_nothing_that_is_not_finite_is_written(value, model, tmp_path):
    w0, w = replicas({"w": (4,), "ok": (4,)}, 2)
    (w0["w"] if model == "anchor" else w["w"][1])[2] = value
    with pytest.raises(NonFiniteError, match="'w'"):
        ties(w0, w, 0.5, unit="tensor")
    with pytest.raises(NonFiniteError, match="'w'"):
        file_merge(tmp_path, w0, w, density=0.5)
    assert not (tmp_path / "out").exists()
    merged, stats = jax.jit(lambda a, b: ties(a, b, 0.5, unit="tensor"))(w0, w)
    np.testing.assert_array_equal(merged["w"], w0["w"])  # the anchor as it is
    check({"ok": merged["ok"]}, expected_tree({"ok": w0["ok"]}, {"ok": w["ok"]}, "tensor", 0.5),
          np.float32)  # fmt: skip
    assert {r["name"]: r["outcome"] for r in report(stats)}["w"] == "non_finite"


def test_thresholds_of_pieces_are_those_of_the_complete_unit():
    """All four digits of a threshold matter, and elements in other bins do not count."""
    rng = np.random.default_rng(0)
    base = np.float64(1.0).view(np.int64)
    offsets = rng.integers(0, 2 ** np.array([1, 17, 33, 49])[:, None], (4, 300))
    deltas = (base + offsets.reshape(2, 600)).view(np.float64) * rng.choice([-1, 1], (2, 600))
    for k in (1, 2, 299, 300, 301, 599, 600):
        bits = kth_largest(
            lambda f: sum(f(None, deltas[:, a : a + 70], None) for a in range(0, 600, 70)),
            lambda _, d, __: d,
            [k, 601 - k],
        )
        wanted = [np.sort(np.abs(d))[-r] for d, r in zip(deltas, (k, 601 - k), strict=True)]
        assert bits.view(np.float64).tolist() == wanted
