"""Counters and integers that differ, and buffers that are copied without a check."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint_merge.typed import load, tensors, trio, weights, write

W = {"layer.weight": (8, 4)}


def models(root, name, values, more=None):
    """Write a base and fine-tunes with a weight and a buffer of these values."""
    base = weights(W)
    tuned = [base, *(weights(W, i, base) for i in range(1, len(values)))]
    return [
        write(root / f"m{i}", {"model.safetensors": {**model, name: value, **(more or {})}})
        for i, (model, value) in enumerate(zip(tuned, values, strict=True))
    ]


INTEGERS = [np.int64, np.int32, np.uint8]
FLOATS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
@pytest.mark.parametrize(
    "name",
    [
        "bn1.num_batches_tracked",
        "model_ema.num_updates",
        "n_averaged",
        "steps",
        "global_step",
        "codebook.count",
        "epoch",
        "iterations",
    ],
)
def test_the_maximum_of_a_counter_is_written(say, tmp_path, name, dtype, shape):
    values = [np.full(shape, x, dtype) for x in (10, 120, 30)]
    paths = models(tmp_path, name, values)
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    found = tensors(tmp_path / "out")[name]
    assert found.dtype == dtype and found.shape == shape and float(found.item()) == 120
    (row,) = load(tmp_path / "out/merge_report.json")["not_merged"]
    assert row["source"] == "model:1" and "counter" in row["reason"]


@pytest.mark.parametrize("values", [(5, 5, 5), (9, 5, 5)])
def test_a_counter_whose_maximum_is_in_the_base(say, tmp_path, values):
    paths = models(tmp_path, "bn.num_batches_tracked", [np.int64(x) for x in values])
    assert say("merge", *paths, "--out", tmp_path / "out").status == 0
    assert tensors(tmp_path / "out")["bn.num_batches_tracked"] == values[0]


def test_large_counters_are_compared_exactly(say, tmp_path):
    values = [np.int64(2**60), np.int64(2**60 + 1), np.int64(2**60)]
    paths = models(tmp_path, "num_updates", values)
    assert say("merge", *paths, "--out", tmp_path / "out").status == 0
    assert tensors(tmp_path / "out")["num_updates"] == 2**60 + 1


def test_an_integer_in_one_model_and_a_float_in_another(say, tmp_path):
    """A counter that a library converted with the weights."""
    paths = models(tmp_path, "bn.num_batches_tracked", [np.int64(3), np.float32(7), np.float32(5)])
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    found = tensors(tmp_path / "out")["bn.num_batches_tracked"]
    assert found.dtype == np.int64 and found == 7


@pytest.mark.parametrize("value", [np.int64(300), np.float32(4.5)])
def test_a_counter_that_the_dtype_of_the_base_cannot_represent(say, tmp_path, value):
    paths = models(tmp_path, "n_averaged", [np.uint8(3), value, value])
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "n_averaged" in result.err and "--exclude" in result.err


def test_a_counter_is_not_cast_by_dtype(say, tmp_path):
    paths = models(tmp_path, "num_updates", [np.float32(x) for x in (1001, 2003, 3005)])
    assert say("merge", *paths, "--out", tmp_path / "out", "--dtype", "bf16").status == 0
    found = tensors(tmp_path / "out")["num_updates"]
    assert found.dtype == np.float32 and found == 3005


def test_a_counter_that_is_not_finite_is_named(say, tmp_path):
    paths = models(tmp_path, "num_updates", [np.float32(x) for x in (1, np.nan, 3)])
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "num_updates" in result.err and str(paths[1]) in result.err


def test_a_scalar_weight_is_no_counter(say, tmp_path):
    for name in ("logit_scale", "gamma", "discount"):
        paths = models(tmp_path / name, name, [np.float32(x) for x in (1, 2, 4)])
        assert say("merge", *paths, "--out", tmp_path / name / "out").status == 0
        assert tensors(tmp_path / name / "out")[name] == 3


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
@pytest.mark.parametrize("dtype", [*INTEGERS, np.bool_])
def test_integers_that_differ(say, tmp_path, dtype, shape):
    """They have no mean: the error names `--exclude`, which writes those of the base."""
    values = [np.full(shape, x).astype(dtype) for x in (0, 1, 1)]
    paths = models(tmp_path, "table.values", values)
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and result.err.count("\n") == 1
    assert "table.values" in result.err and ("--exclude" in result.err or "quantized" in result.err)
    for options, expected in (
        (["--exclude", "table.*"], 0),
        (["--exclude", "table.*", "--unmerged-from", "mean"], 0),
        (["--exclude", "table.*", "--unmerged-from", "model:2"], 1),
        (["--include", "layer.*"], 0),
    ):
        out = tmp_path / "-".join(options[1::2]).replace("*", "")
        assert say("merge", *paths, "--out", out, *options).status == 0
        found = tensors(out)["table.values"]
        assert found.dtype == dtype and (found == expected).all()


@pytest.mark.parametrize(
    "values",
    [
        [np.zeros(3, np.int64), np.ones(3, np.int64), np.ones(3, np.int64)],
        [np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8), np.ones((4, 4), np.uint8)],
        [np.zeros(3, np.int64), np.zeros(4, np.int64), np.zeros(5, np.int64)],
        [np.zeros(3, np.int64), np.zeros(3, np.int32), np.zeros(3, np.int64)],
        [np.zeros(3, bool), np.ones(3, bool), np.ones(3, bool)],
        [np.zeros(3, np.int64), np.zeros(3, np.float32), np.zeros(3, np.float32)],
        [np.zeros(3, np.float32), np.zeros(3, np.int64), np.zeros(3, np.float32)],
    ],
    ids=["values", "packed", "shapes", "dtypes", "bool", "integer in base", "integer in fine-tune"],
)
def test_a_comparison_runs_whatever_integers_differ(say, tmp_path, values):
    paths = models(tmp_path, "table.values", values)
    result = say("compare", *paths, "--json")
    assert result.status == 0, result.err
    assert "layer.weight" in result.out and any("table.values" in note for note in result.notes)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_an_excluded_buffer_that_is_not_finite_is_copied_unchecked(say, tmp_path, dtype, value):
    mask = np.array([[0, value], [0, 0]]).astype(dtype)
    paths = models(tmp_path, "decoder.future", [mask] * 3)
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and "--exclude 'decoder.future'" in result.err
    assert say("merge", *paths, "--out", tmp_path / "out", "--exclude", "decoder.*").status == 0
    found = tensors(tmp_path / "out")["decoder.future"]
    assert found.tobytes() == mask.tobytes()


def test_an_excluded_weight_is_bitwise_that_of_the_base(say, tmp_path):
    paths = trio(tmp_path)
    assert say("merge", *paths, "--out", tmp_path / "out", "--exclude", "*q_proj*").status == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(tensors(tmp_path / "out")[name], tensors(paths[0])[name])
