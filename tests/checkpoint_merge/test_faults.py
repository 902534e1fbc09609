"""What other tools get wrong, measured, and what the engine does instead; one test a fault.

What only the command line can show (a misspelt option, `--dry-run`) is tested with it.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from tests.checkpoint_merge.engine import (
    deltas,
    merge,
    models,
    numbers,
    plan,
    rounding,
    rows,
    save,
    stock_ratio,
)


def one(dtype, base, *finetuned):
    return [{"w": np.asarray(values).astype(dtype)} for values in (base, *finetuned)]


def test_a_norm_loses_nothing_with_size(tmp_path):
    # 9.9 % at 128256 x 4096 elsewhere; that size is test_exact's slow test, this one 2 million.
    given = models({"w": (1024, 2048)}, size=1e-2)
    _, report = merge(tmp_path, given)
    assert abs(report.rows[0]["ratio"] - stock_ratio(deltas(given, "w"))) < 1e-8


def test_bfloat16_is_not_merged_in_bfloat16(tmp_path):
    given = models({"w": (256, 256)}, dtype=ml_dtypes.bfloat16, size=0.05)
    out, _ = merge(tmp_path, given)
    d = deltas(given, "w")
    ref = numbers(given[0]["w"]).reshape(-1) + stock_ratio(d) * d.mean(axis=0)
    error = np.abs(numbers(out["w"]).reshape(-1) - ref)
    # The rounding of the answer, half a place, and 1e-6 of float32 arithmetic.
    assert (error <= rounding(ml_dtypes.bfloat16, ref) / 2 + 1e-6).all()


def test_small_task_vectors_keep_their_ratio(tmp_path):
    given = models({"w": (64, 64)}, size=1e-5)
    _, report = merge(tmp_path, given)
    truth = stock_ratio(deltas(given, "w"))
    assert truth > 0.5 and abs(report.rows[0]["ratio"] - truth) < 1e-6  # 0.08 elsewhere


def test_float16_does_not_underflow_to_no_merge(tmp_path):
    given = models({"w": (64, 64)}, dtype=np.float16, size=1e-2)
    _, report = merge(tmp_path, given)
    truth = stock_ratio(deltas(given, "w"))
    assert truth > 0.5 and abs(report.rows[0]["ratio"] - truth) < 1e-6  # 0 elsewhere


def test_filters_of_a_convolution_are_its_output_channels(tmp_path):
    given = models({"conv.weight": (8, 3, 4, 4)})
    out, report = merge(tmp_path, given, unit="filter")
    (row,) = report.rows
    assert row["num_units"] == 8
    for f in range(8):
        d = deltas([{"w": m["conv.weight"][f]} for m in given], "w")
        ref = numbers(given[0]["conv.weight"][f]).reshape(-1) + stock_ratio(d) * d.mean(axis=0)
        np.testing.assert_allclose(out["conv.weight"][f].reshape(-1), ref, rtol=1e-6, atol=1e-7)


def test_a_scalar_takes_the_mean(tmp_path):
    out, report = merge(tmp_path, one(np.float32, 4.0, 4.5, 3.0))
    (row,) = report.rows
    assert out["w"] == 3.75 and row["cosine"] is None and row["policy"] == "too_small"


def test_a_frozen_replica_does_not_undo_the_other(tmp_path):
    given = models({"w": (5, 5)})
    out, report = merge(tmp_path, [given[0], given[0], given[2]])
    np.testing.assert_array_equal(out["w"], given[2]["w"])
    assert report.policies == {"one_replica_left": 1}


@pytest.mark.parametrize("second", [[-1.0, -1, -1, -1], [-1.0, -1, -1, 2.5]])
def test_opposed_task_vectors_give_the_base(tmp_path, second):
    given = one(np.float32, np.ones(4), np.ones(4) + [1.0, 1, 1, 1], np.ones(4) + second)
    out, report = merge(tmp_path, given)
    (row,) = report.rows
    assert row["cosine"] < 0 and row["ratio"] == 0 and row["policy"] == "clipped"
    np.testing.assert_array_equal(out["w"], given[0]["w"])


def test_one_nan_is_an_error_that_names_it(tmp_path):
    given = [dict(m) for m in models({"a": (3, 3), "w": (3, 4)})]
    given[1]["w"] = given[1]["w"].copy()
    given[1]["w"][1, 2] = np.nan
    with pytest.raises(UserError, match=r"ft1: tensor 'w' holds NaN or infinity, first at \[1, 2"):
        merge(tmp_path, given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", [
    {"w": np.ones((2, 2), np.int8)}, {"w.SCB": np.ones(2, np.float32)},
    {"w.weight_scale_inv": np.ones(1, np.float32)}, {"w.qweight": np.ones((2, 2), np.int32)},
])
def test_quantised_weights_are_refused_with_the_way_out(tmp_path, extra):
    given = [dict(m) for m in models({"v": (2, 2)})]
    for k, model in enumerate(given):
        model.update({n: v + np.asarray(k).astype(v.dtype) for n, v in extra.items()})
    with pytest.raises(UserError, match="quantised.*dequantise first: .*save_pretrained"):
        plan(save(tmp_path, given))


def test_a_tied_head_is_not_written_beside_a_config_that_ties_it(tmp_path):
    given = [dict(m) for m in models({"model.embed_tokens.weight": (6, 4)})]
    tied = {"tie_word_embeddings": True}
    given[1]["lm_head.weight"] = given[1]["model.embed_tokens.weight"]
    made = plan(save(tmp_path, given, [tied, {"tie_word_embeddings": False}, tied]))
    assert list(made.tensors) == ["model.embed_tokens.weight"] and "kept tied" in made.notes[0]


def test_an_extra_tensor_is_not_dropped_in_silence(tmp_path):
    given = [dict(m) for m in models({"w": (2, 2)})]
    given[2]["new.weight"] = np.ones(3, np.float32)
    with pytest.raises(UserError, match="ft2 has, new.weight"):
        plan(save(tmp_path, given))


def test_a_shape_that_differs_is_named_with_every_model(tmp_path):
    given = [dict(m) for m in models({"w": (2, 2)})]
    given[2]["w"] = np.ones((2, 3), np.float32)
    with pytest.raises(UserError, match=r"w differs in shape: .*base \[2, 2\]; .*ft2 \[2, 3\]"):
        plan(save(tmp_path, given))


def test_every_tensor_has_its_row_in_the_report(tmp_path):
    given = models()
    _, report = merge(tmp_path, given)
    assert rows(report).keys() == given[0].keys()
    for name, row in rows(report).items():
        assert row["norms"] == pytest.approx(np.linalg.norm(deltas(given, name), axis=1), rel=1e-6)
