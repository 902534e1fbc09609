"""Every method against NumPy, and every unit against the merge of training and library."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import executor as engine
from modelstock_jax.checkpoint_merge.kernels import UnitLayout
from modelstock_jax.errors import UserError
from modelstock_jax.merging import (
    UNITS,
    model_stock,
    report,
    total_distance,
    weighted_model_stock,
)
from tests.checkpoint_merge.engine import SHAPES, deltas, merge, models, numbers, plan, rows, save
from tests.merging.reference import allowed

LIBRARY = {"model_stock": model_stock, "weighted_model_stock": weighted_model_stock}


def with_degenerate_units(given):
    """Opposed task vectors, a frozen tensor, one frozen replica; in rows too."""
    base, first, second, *_ = [dict(model) for model in given]
    name = "model.layers.0.mlp.up_proj.weight"
    second[name] = (2 * base[name] - first[name]).astype(np.float32)
    name = "model.layers.1.self_attn.o_proj.weight"
    first[name] = second[name] = base[name]
    first["model.norm.weight"] = base["model.norm.weight"]
    rows = first["model.embed_tokens.weight"].copy()
    rows[:3] = base["model.embed_tokens.weight"][:3]
    first["model.embed_tokens.weight"] = rows
    conv = second["patch.conv.weight"].copy()
    conv[1] = base["patch.conv.weight"][1]
    second["patch.conv.weight"] = conv
    return [base, first, second]


# XLA compiles the library's side anew for each: the rest is slow.
FAST = [("tensor", "model_stock"), ("filter", "model_stock"), ("head", "model_stock")]
EVERY = [
    pytest.param(unit, method, marks=() if (unit, method) in FAST else pytest.mark.slow)
    for unit in UNITS
    for method in LIBRARY
]


@pytest.mark.parametrize(("unit", "method"), EVERY)
def test_every_unit_as_in_training(tmp_path, unit, method):
    given = with_degenerate_units(models())
    out, ours = merge(tmp_path, given, unit=unit, num_heads=4, method=method, max_shard_bytes=2000)
    # Scalars as 0-d arrays; units are cut by the same names and shapes.
    w0 = {n: jnp.asarray(w) for n, w in given[0].items()}
    w = {n: jnp.stack([jnp.asarray(m[n]) for m in given[1:]]) for n in given[0]}
    merged, stats = LIBRARY[method](w0, w, unit, num_heads=4, filter_axis=0)
    theirs = {row["name"]: row for row in report(stats)}
    assert rows(ours).keys() == theirs.keys()
    for name, row in rows(ours).items():
        same = theirs[name]
        assert (row["unit"], row["outcomes"]) == (same["unit"], same["outcomes"])
        assert row["ratio"] == pytest.approx(same["ratio"], abs=1e-6)
        assert row["norms"] == pytest.approx(same["norms"], rel=1e-6)
        if same["cosine"] is None:
            assert row["cosine"] is row["angle"] is None
        else:
            assert row["cosine"] == pytest.approx(same["cosine"], abs=1e-6)
        ref = np.asarray(merged[name])
        tolerance = allowed(given[0][name], np.stack([m[name] for m in given[1:]]), ref)
        if method == "weighted_model_stock":  # Each a_i has its own 1e-6, of its own task vector.
            tolerance += 1e-6 * np.abs(deltas(given, name)).max(axis=0).reshape(ref.shape)
        assert (np.abs(numbers(out[name]) - ref) <= tolerance).all(), name
        if row["outcome"] in ("unchanged", "one_model_changed"):
            np.testing.assert_array_equal(out[name], ref)
    for key, value in total_distance(stats)._asdict().items():
        assert ours.distance[key] == pytest.approx(value, rel=1e-5)


def test_policies_are_counted(tmp_path):
    _, report = merge(tmp_path, with_degenerate_units(models()))
    # Of 14 tensors: one opposed, one frozen, one with a frozen replica, one scalar.
    assert report.outcomes == {
        "interpolated": 10,
        "clamped": 1,
        "unchanged": 1,
        "one_model_changed": 1,
        "scalar": 1,
    }


def test_rows_of_one_replica_are_its_own_bit_for_bit(tmp_path):
    # w0 + (w - w0) is not w where w0 is the larger by far.
    base, first, second = models({"w": (4, 9)}, dtype=np.float64, size=1e-7)
    first["w"][1:3], second["w"][2:] = base["w"][1:3], base["w"][2:]
    second["w"][1] *= 1e-9
    out, report = merge(tmp_path, [base, first, second], unit="filter")
    assert report.rows[0]["outcomes"] == {"interpolated": 1, "one_model_changed": 2, "unchanged": 1}
    assert (base["w"][1] + (second["w"][1] - base["w"][1]) != second["w"][1]).any()
    for row, model in ((1, second), (2, base), (3, first)):
        np.testing.assert_array_equal(out["w"][row], model["w"][row])


def test_replicas_that_did_not_move_leave_the_unit(tmp_path):
    given = [dict(m) for m in models({"w": (5, 7)}, number=3)]
    given[2]["w"] = given[0]["w"]
    out, report = merge(tmp_path, given)
    (row,) = report.rows
    two, _ = merge(tmp_path / "two", [given[0], given[1], given[3]])
    assert row["outcome"] == "unchanged_models_left_out" and row["norms"][1] == 0
    np.testing.assert_array_equal(out["w"], two["w"])
    assert row["cosines"][0][1] is None and row["cosines"][0][2] == pytest.approx(row["cosine"])


def mean_shares(given, name, shares):
    d = deltas(given, name)
    return numbers(given[0][name]).reshape(-1) + np.asarray(shares) @ d


def ties(given, name, density, weights, scale, normalize):
    """TIES from its paper: trim each, elect the sign of the sum, mean of those that agree."""
    d = deltas(given, name)
    kept = np.zeros_like(d)
    for row, delta, part in zip(kept, d, density, strict=True):
        size = np.abs(delta).astype(np.float32)
        chosen = size >= np.sort(size)[-max(1, int(part * size.size))]
        row[chosen] = delta[chosen]
    kept *= np.asarray(weights)[:, None]
    sign = np.where(kept.sum(axis=0) >= 0, 1, -1)
    agree = kept * sign > 0
    total = np.where(agree, kept, 0).sum(axis=0)
    if normalize:
        total /= np.maximum(1e-9, np.where(agree, np.asarray(weights)[:, None], 0).sum(axis=0)) + (
            ~agree.any(axis=0)
        )
    return numbers(given[0][name]).reshape(-1) + scale * total


def slerp(first, second, t):
    first, second = numbers(first).reshape(-1), numbers(second).reshape(-1)
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    cosine = first @ second / lengths
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * first + np.sin(t * theta) * second) / np.sin(theta)


GIVEN = [
    ({"method": "uniform_mean"}, lambda g, n: mean_shares(g, n, [1 / 3] * 3)),
    (
        {"method": "linear", "weights": (1, 2, 5)},
        lambda g, n: mean_shares(g, n, [1 / 8, 2 / 8, 5 / 8]),
    ),
    (
        {"method": "linear", "weights": (0.5, 0, 1), "normalize": False},
        lambda g, n: mean_shares(g, n, [0.5, 0, 1]),
    ),
    ({"method": "wise_ft", "alpha": 0.3}, lambda g, n: mean_shares(g, n, [0.1] * 3)),
    ({"method": "task_arithmetic", "scale": 0.4}, lambda g, n: mean_shares(g, n, [0.4] * 3)),
    (
        {"method": "task_arithmetic", "weights": (1, -1, 2), "scale": 2.0, "normalize": True},
        lambda g, n: mean_shares(g, n, [1, -1, 2]),
    ),
    ({"method": "ties"}, lambda g, n: ties(g, n, [1] * 3, [1] * 3, 1, True)),
    (
        {"method": "ties", "density": 0.3, "scale": 1.5},
        lambda g, n: ties(g, n, [0.3] * 3, [1] * 3, 1.5, True),
    ),
    (
        {"method": "ties", "density": (0.2, 0.5, 1), "weights": (1, 2, 0.5), "normalize": False},
        lambda g, n: ties(g, n, [0.2, 0.5, 1], [1, 2, 0.5], 1, False),
    ),
]


@pytest.mark.parametrize(("options", "reference"), GIVEN, ids=[str(o) for o, _ in GIVEN])
def test_methods_of_given_weights(tmp_path, options, reference):
    given = models(number=3)
    out, report = merge(tmp_path, given, **options)
    assert set(report.outcomes) == {"fixed_ratio"}
    for name in SHAPES:
        ref = reference(given, name)
        # Half a place of float32, and the roundings of a float64 sum.
        np.testing.assert_allclose(numbers(out[name]).reshape(-1), ref, rtol=2**-24, atol=1e-14)


def test_ties_trims_whole_models_under_unit_global(tmp_path):
    given = models(number=2)
    names = sorted(SHAPES)
    joined = [{"all": np.concatenate([np.reshape(m[n], -1) for n in names])} for m in given]
    ref = ties(joined, "all", [0.25] * 2, [1] * 2, 1, True)
    out, _ = merge(tmp_path, given, method="ties", density=0.25, unit="global")
    ours = np.concatenate([numbers(out[n]).reshape(-1) for n in names])
    np.testing.assert_allclose(ours, ref, rtol=2**-24, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ties_keeps_all_that_equal_the_last_kept(tmp_path, dtype):
    base = {"w": np.zeros(8, dtype)}
    steps = {"w": np.array([4, -3, 2, 2, -2, 1, 0, 0], dtype)}
    out, _ = merge(tmp_path, [base, steps], method="ties", density=3 / 8)
    assert numbers(out["w"]).tolist() == [4, -3, 2, 2, -2, 0, 0, 0]


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_slerp_between_base_and_one_or_between_two(tmp_path, size):
    given = models(number=2, size=size)
    one, _ = merge(tmp_path / "one", given[:2], method="slerp", t=0.3)
    two, _ = merge(tmp_path / "two", given, method="slerp", t=0.3)
    for name in SHAPES:
        for out, ends in ((one, given[:2]), (two, given[1:])):
            ref = slerp(*(model[name] for model in ends), 0.3)
            np.testing.assert_allclose(numbers(out[name]).reshape(-1), ref, rtol=1e-7, atol=1e-9)
    ends = {n: float(i % 2) for i, n in enumerate(SHAPES)}
    out, _ = merge(tmp_path / "ends", given[:2], method="slerp", t=ends)
    for name, t in ends.items():
        np.testing.assert_allclose(out[name], given[int(t)][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unit", ["tensor", "filter", "head", "global"])
@pytest.mark.parametrize("method", ["model_stock", "ties"])
def test_pieces_and_passes_do_not_show(tmp_path, monkeypatch, unit, method):
    if (unit, method) in {("filter", "ties"), ("head", "ties")}:
        with pytest.raises(UserError, match="ties .*tensor, layer, block or global"):
            merge(tmp_path, models(), unit=unit, method=method, num_heads=4)
        return
    given = models(dtype=ml_dtypes.bfloat16)
    places = save(tmp_path, given)
    options = {"unit": unit, "num_heads": 4, "method": method}
    if method == "ties":
        options["density"] = 0.5
    written = []
    cut = UnitLayout.cut
    for k, (window, most) in enumerate([(2**28, 2**18), (1, 2**18), (1, 37), (2**28, 100)]):
        monkeypatch.setattr(UnitLayout, "cut", lambda self, most=most: cut(self, most))
        made = plan(places, window_bytes=window, **options)
        report = engine.run(made, tmp_path / f"out{k}")
        assert report.bytes_read == made.bytes_read and report.bytes_written == made.bytes_written
        written.append((tmp_path / f"out{k}" / "model.safetensors").read_bytes())
    # Sums in another order differ in the last places of float64: the weights do not.
    assert written[0] == written[1] and written[2] == written[0] == written[3]
