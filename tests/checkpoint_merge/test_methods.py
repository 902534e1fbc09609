"""Every method against NumPy, and every merge unit against the library."""

from __future__ import annotations

import json

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
from tests.merging.reference import ties as ties_reference

LIBRARY = {"model_stock": model_stock, "weighted_model_stock": weighted_model_stock}


def with_degenerate_units(inputs):
    """Return models with opposed task vectors, a frozen tensor and a frozen model, also in rows."""
    base, first, second, *_ = [dict(model) for model in inputs]
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


# XLA compiles the library's merge for each case, so the other cases are marked slow.
FAST = [("tensor", "model_stock"), ("filter", "model_stock"), ("head", "model_stock")]
EVERY = [
    pytest.param(unit, method, marks=() if (unit, method) in FAST else pytest.mark.slow)
    for unit in UNITS
    for method in LIBRARY
]


@pytest.mark.parametrize(("unit", "method"), EVERY)
def test_every_unit_gives_the_result_of_the_library(tmp_path, unit, method):
    inputs = with_degenerate_units(models())
    heads = {"num_heads": 4} if unit == "head" else {}
    out, result = merge(tmp_path, inputs, unit=unit, method=method, max_shard_bytes=2000, **heads)
    # Scalars are 0-d arrays; merge units follow from the same names and shapes.
    w0 = {n: jnp.asarray(w) for n, w in inputs[0].items()}
    w = {n: jnp.stack([jnp.asarray(m[n]) for m in inputs[1:]]) for n in inputs[0]}
    merged, stats = LIBRARY[method](w0, w, unit=unit, num_heads=4, filter_axis=0)
    expected_rows = {row["name"]: row for row in report(stats)}
    assert rows(result).keys() == expected_rows.keys()
    for name, row in rows(result).items():
        expected = expected_rows[name]
        assert (row["unit"], row["outcomes"]) == (expected["unit"], expected["outcomes"])
        assert row["ratio"] == pytest.approx(expected["ratio"], abs=1e-6)
        assert row["norms"] == pytest.approx(expected["norms"], rel=1e-6)
        if expected["cosine"] is None:
            assert row["cosine"] is row["angle"] is None
        else:
            assert row["cosine"] == pytest.approx(expected["cosine"], abs=1e-6)
        ref = np.asarray(merged[name])
        tolerance = allowed(inputs[0][name], np.stack([m[name] for m in inputs[1:]]), ref)
        if method == "weighted_model_stock":  # 1e-6 for each a_i, times its task vector.
            tolerance += 1e-6 * np.abs(deltas(inputs, name)).max(axis=0).reshape(ref.shape)
        assert (np.abs(numbers(out[name]) - ref) <= tolerance).all(), name
        if row["outcome"] in ("unchanged", "one_model_changed"):
            np.testing.assert_array_equal(out[name], ref)
    for key, value in total_distance(stats)._asdict().items():
        assert result.distance[key] == pytest.approx(value, rel=1e-5)


def test_outcomes_are_counted(tmp_path):
    _, report = merge(tmp_path, with_degenerate_units(models()))
    # Of 14 tensors: one opposed, one frozen, one with a frozen replica, one scalar.
    assert report.outcomes == {
        "interpolated": 10,
        "clamped": 1,
        "unchanged": 1,
        "one_model_changed": 1,
        "scalar": 1,
    }


def test_rows_that_one_model_changed_are_copied_bit_for_bit(tmp_path):
    # w0 + (w - w0) is not w if w0 is much larger.
    base, first, second = models({"w": (4, 9)}, dtype=np.float64, size=1e-7)
    first["w"][1:3], second["w"][2:] = base["w"][1:3], base["w"][2:]
    second["w"][1] *= 1e-9
    out, report = merge(tmp_path, [base, first, second], unit="filter")
    assert report.rows[0]["outcomes"] == {"interpolated": 1, "one_model_changed": 2, "unchanged": 1}
    assert (base["w"][1] + (second["w"][1] - base["w"][1]) != second["w"][1]).any()
    for row, model in ((1, second), (2, base), (3, first)):
        np.testing.assert_array_equal(out["w"][row], model["w"][row])


def test_unchanged_models_are_left_out(tmp_path):
    inputs = [dict(m) for m in models({"w": (5, 7)}, number=3)]
    inputs[2]["w"] = inputs[0]["w"]
    out, report = merge(tmp_path, inputs)
    (row,) = report.rows
    two, _ = merge(tmp_path / "two", [inputs[0], inputs[1], inputs[3]])
    assert row["outcome"] == "unchanged_models_left_out" and row["norms"][1] == 0
    np.testing.assert_array_equal(out["w"], two["w"])
    assert row["cosines"][0][1] is None and row["cosines"][0][2] == pytest.approx(row["cosine"])


def weighted_sum(inputs, name, weights):
    d = deltas(inputs, name)
    return numbers(inputs[0][name]).reshape(-1) + np.asarray(weights) @ d


def ties(inputs, name, density, weights, scale, normalize):
    """TIES in float64, flat."""
    w0 = numbers(inputs[0][name]).reshape(-1)
    tuned = [numbers(model[name]).reshape(-1) for model in inputs[1:]]
    keep = [max(1, round(fraction * w0.size)) for fraction in density]
    return ties_reference(w0, tuned, keep, scale, weights=weights, normalize=normalize)


def slerp(first, second, t):
    first, second = numbers(first).reshape(-1), numbers(second).reshape(-1)
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    cosine = first @ second / lengths
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * first + np.sin(t * theta) * second) / np.sin(theta)


METHODS = [
    ({"method": "uniform_mean"}, lambda g, n: weighted_sum(g, n, [1 / 3] * 3)),
    (
        {"method": "linear", "weights": (1, 2, 5)},
        lambda g, n: weighted_sum(g, n, [1 / 8, 2 / 8, 5 / 8]),
    ),
    (
        {"method": "linear", "weights": (0.5, 0, 1), "normalize": False},
        lambda g, n: weighted_sum(g, n, [0.5, 0, 1]),
    ),
    ({"method": "wise_ft", "alpha": 0.3}, lambda g, n: weighted_sum(g, n, [0.1] * 3)),
    ({"method": "task_arithmetic", "scale": 0.4}, lambda g, n: weighted_sum(g, n, [0.4] * 3)),
    (
        {"method": "task_arithmetic", "weights": (1, -1, 2), "scale": 2.0, "normalize": True},
        lambda g, n: weighted_sum(g, n, [1, -1, 2]),
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


@pytest.mark.parametrize(("options", "reference"), METHODS, ids=[str(o) for o, _ in METHODS])
def test_methods_with_fixed_coefficients(tmp_path, options, reference):
    inputs = models(number=3)
    out, report = merge(tmp_path, inputs, **options)
    assert set(report.outcomes) == {"fixed_ratio"}
    for name in SHAPES:
        ref = reference(inputs, name)
        # Half a unit in the last place of float32, and the roundings of a float64 sum.
        np.testing.assert_allclose(numbers(out[name]).reshape(-1), ref, rtol=2**-24, atol=1e-14)


def test_ties_trims_entire_models_with_the_unit_global(tmp_path):
    inputs = models(number=2)
    names = sorted(SHAPES)
    joined = [{"all": np.concatenate([np.reshape(m[n], -1) for n in names])} for m in inputs]
    ref = ties(joined, "all", [0.25] * 2, [1] * 2, 1, True)
    out, _ = merge(tmp_path, inputs, method="ties", density=0.25, unit="global")
    merged = np.concatenate([numbers(out[n]).reshape(-1) for n in names])
    np.testing.assert_allclose(merged, ref, rtol=2**-24, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_ties_keeps_all_elements_equal_to_the_threshold(tmp_path, dtype):
    base = {"w": np.zeros(8, dtype)}
    steps = {"w": np.array([4, -3, 2, 2, -2, 1, 0, 0], dtype)}
    out, _ = merge(tmp_path, [base, steps], method="ties", density=3 / 8)
    assert numbers(out["w"]).tolist() == [4, -3, 2, 2, -2, 0, 0, 0]


def test_ties_reports_no_distance_of_the_merged_weights(say, tmp_path):
    paths = save(tmp_path, models())
    flags = ("--method", "ties", "--density", "0.5")
    result = say("merge", *paths, "--out", tmp_path / "out", *flags)
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    for distance in (
        report["predicted_distance"],
        *(r["predicted_distance"] for r in report["units"]),
    ):
        assert distance["merged"] is None
    known = report["predicted_distance"]
    assert known["replica"] > known["mean"] > 0
    assert "to the center" not in result.out  # a value that is unknown is not printed as 0 or -1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "This method has no ratio." in card and "-1" not in card.split("## ")[1]


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_slerp_between_the_base_and_one_model_or_between_two_models(tmp_path, size):
    inputs = models(number=2, size=size)
    one, _ = merge(tmp_path / "one", inputs[:2], method="slerp", t=0.3)
    two, _ = merge(tmp_path / "two", inputs, method="slerp", t=0.3)
    for name in SHAPES:
        for out, ends in ((one, inputs[:2]), (two, inputs[1:])):
            ref = slerp(*(model[name] for model in ends), 0.3)
            np.testing.assert_allclose(numbers(out[name]).reshape(-1), ref, rtol=1e-7, atol=1e-9)
    ends = {n: float(i % 2) for i, n in enumerate(SHAPES)}
    out, _ = merge(tmp_path / "ends", inputs[:2], method="slerp", t=ends)
    for name, t in ends.items():
        np.testing.assert_allclose(out[name], inputs[int(t)][name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unit", ["tensor", "filter", "head", "global"])
@pytest.mark.parametrize("method", ["model_stock", "ties"])
def test_the_size_of_pieces_does_not_change_the_result(tmp_path, monkeypatch, unit, method):
    heads = {"num_heads": 4} if unit == "head" else {}
    if (unit, method) in {("filter", "ties"), ("head", "ties")}:
        with pytest.raises(UserError, match="ties.* tensor, layer, block or global"):
            merge(tmp_path, models(), unit=unit, method=method, **heads)
        return
    inputs = models(dtype=ml_dtypes.bfloat16)
    paths = save(tmp_path, inputs)
    options = {"unit": unit, "method": method, **heads}
    if method == "ties":
        options["density"] = 0.5
    written = []
    cut = UnitLayout.cut
    for k, (window, max_length) in enumerate([(2**28, 2**18), (1, 2**18), (1, 37), (2**28, 100)]):
        monkeypatch.setattr(
            UnitLayout, "cut", lambda self, _, row=1, length=max_length: cut(self, length, row)
        )
        planned = plan(paths, window_bytes=window, **options)
        report = engine.run(planned, tmp_path / f"out{k}")
        assert (
            report.bytes_read == planned.bytes_read
            and report.bytes_written == planned.bytes_written
        )
        written.append((tmp_path / f"out{k}" / "model.safetensors").read_bytes())
    # Sums in another order differ in the last digits of float64; the rounded weights do not.
    assert written[0] == written[1] and written[2] == written[0] == written[3]
