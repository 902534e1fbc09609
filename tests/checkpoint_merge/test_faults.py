"""Fifteen faults measured in other tools, and the behavior of this command instead, by number.

| | other tools | this command |
|---|---|---|
| 01 | a float32 norm over a large tensor: t is off by 0.1 | float64 totals: t to 1e-6 |
| 02 | bfloat16 is merged in bfloat16 | float32 or better, rounded once |
| 03 | small task vectors: t = 0.08 instead of 0.70 | t does not depend on the size |
| 04 | float16 arithmetic: t = 0 | as 02 |
| 05 | filters of a convolution along its last axis: t = -2333 | along its output channels |
| 06 | scalars have a cosine of 1 or -1 | the mean |
| 07 | a frozen fine-tune: t = 0 removes the update of the other | the weights of the other |
| 08 | opposed updates: t = -198, NaN | the base, counted as clamped to 0 |
| 09 | one NaN: the tensor is NaN, exit status 0 | an error: model, tensor, element |
| 10 | int8 weights: wrong values | an error that says how to fix it |
| 11 | a misspelled option is ignored | an error that suggests the right option |
| 12 | a head is written although the config ties it | the head stays tied, or an error |
| 13 | a tensor that only a fine-tune has is dropped | an error with the option |
| 14 | a shape mismatch without the name of the tensor | an error with the shape in every model |
| 15 | no dry run, resume or report by layer; incomplete outputs | all exist; synced, renamed |
"""

from __future__ import annotations

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.checkpoint_merge.executor import run
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles
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


def single_tensor(dtype, base, *finetuned):
    return [{"w": np.asarray(values).astype(dtype)} for values in (base, *finetuned)]


def test_01_a_norm_is_exact_for_large_tensors(tmp_path):
    # Other tools are off by 9.9 % at 128256 x 4096, the size in the slow test of test_exact.py.
    # This tensor has 2 million elements.
    inputs = models({"w": (1024, 2048)}, size=1e-2)
    _, report = merge(tmp_path, inputs)
    assert abs(report.rows[0]["ratio"] - stock_ratio(deltas(inputs, "w"))) < 1e-8


def test_02_bfloat16_is_not_merged_in_bfloat16(tmp_path):
    inputs = models({"w": (256, 256)}, dtype=ml_dtypes.bfloat16, size=0.05)
    out, _ = merge(tmp_path, inputs)
    d = deltas(inputs, "w")
    ref = numbers(inputs[0]["w"]).reshape(-1) + stock_ratio(d) * d.mean(axis=0)
    error = np.abs(numbers(out["w"]).reshape(-1) - ref)
    # The rounding of the result, half a unit in the last path, and 1e-6 of float32 arithmetic.
    assert (error <= rounding(ml_dtypes.bfloat16, ref) / 2 + 1e-6).all()


def test_03_small_task_vectors_keep_their_ratio(tmp_path):
    inputs = models({"w": (64, 64)}, size=1e-5)
    _, report = merge(tmp_path, inputs)
    expected = stock_ratio(deltas(inputs, "w"))
    assert expected > 0.5 and abs(report.rows[0]["ratio"] - expected) < 1e-6  # 0.08 in other tools


def test_04_float16_does_not_underflow_to_no_merge(tmp_path):
    inputs = models({"w": (64, 64)}, dtype=np.float16, size=1e-2)
    _, report = merge(tmp_path, inputs)
    expected = stock_ratio(deltas(inputs, "w"))
    assert expected > 0.5 and abs(report.rows[0]["ratio"] - expected) < 1e-6  # 0 in other tools


def test_05_filters_of_a_convolution_are_its_output_channels(tmp_path):
    inputs = models({"conv.weight": (8, 3, 4, 4)})
    out, report = merge(tmp_path, inputs, unit="filter")
    (row,) = report.rows
    assert row["num_units"] == 8
    for f in range(8):
        d = deltas([{"w": m["conv.weight"][f]} for m in inputs], "w")
        ref = numbers(inputs[0]["conv.weight"][f]).reshape(-1) + stock_ratio(d) * d.mean(axis=0)
        np.testing.assert_allclose(out["conv.weight"][f].reshape(-1), ref, rtol=1e-6, atol=1e-7)


def test_06_a_scalar_is_the_mean(tmp_path):
    out, report = merge(tmp_path, single_tensor(np.float32, 4.0, 4.5, 3.0))
    (row,) = report.rows
    assert out["w"] == 3.75 and row["cosine"] is None and row["outcome"] == "scalar"


def test_07_a_frozen_fine_tune_does_not_remove_the_update_of_the_other(tmp_path):
    inputs = models({"w": (5, 5)})
    out, report = merge(tmp_path, [inputs[0], inputs[0], inputs[2]])
    np.testing.assert_array_equal(out["w"], inputs[2]["w"])
    assert report.outcomes == {"one_model_changed": 1}


@pytest.mark.parametrize("second", [[-1.0, -1, -1, -1], [-1.0, -1, -1, 2.5]])
def test_08_opposed_task_vectors_give_the_base(tmp_path, second):
    inputs = single_tensor(np.float32, np.ones(4), np.ones(4) + [1.0, 1, 1, 1], np.ones(4) + second)
    out, report = merge(tmp_path, inputs)
    (row,) = report.rows
    assert row["cosine"] < 0 and row["ratio"] == 0 and row["outcome"] == "clamped"
    np.testing.assert_array_equal(out["w"], inputs[0]["w"])


def test_09_one_nan_is_an_error_that_names_it(tmp_path):
    inputs = [dict(m) for m in models({"a": (3, 3), "w": (3, 4)})]
    inputs[1]["w"] = inputs[1]["w"].copy()
    inputs[1]["w"][1, 2] = np.nan
    with pytest.raises(UserError, match=r"ft1: .*'w' .*NaN .*\[1, 2"):
        merge(tmp_path, inputs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "extra",
    [
        {"w": np.ones((2, 2), np.int8)},
        {"w.SCB": np.ones(2, np.float32)},
        {"w.weight_scale_inv": np.ones(1, np.float32)},
        {"w.qweight": np.ones((2, 2), np.int32)},
    ],
)
def test_10_the_error_for_quantized_weights_says_how_to_fix_it(tmp_path, extra):
    inputs = [dict(m) for m in models({"v": (2, 2)})]
    for k, model in enumerate(inputs):
        model.update({n: v + np.asarray(k).astype(v.dtype) for n, v in extra.items()})
    with pytest.raises(UserError, match="quantized.*dequantize.*save_pretrained"):
        plan(save(tmp_path, inputs))


def test_the_error_for_integers_instead_of_floats_names_the_model(tmp_path):
    inputs = [dict(m) for m in models({"v": (2, 2)})]
    for k, model in enumerate(inputs):
        model["w"] = np.ones((2, 2), np.int8 if k == 1 else np.float32)
        model["x"] = np.ones(3, np.int64 if k == 2 else np.float32)
    with pytest.raises(UserError) as caught:
        plan(save(tmp_path, inputs))
    error = str(caught.value)
    assert re.search(f"w .*I8 .*{tmp_path}/ft1 .*quantized", error)
    assert re.search(f"x .*I64 .*{tmp_path}/ft2 .*floating point", error)


@pytest.mark.parametrize(("wrong", "suggestion"), [
    (["--methd", "uniform_mean"], "--method"), (["--exlude", "w"], "--exclude"),
    (["--method", "model_stok"], "'model-stock'"),
])  # fmt: skip
def test_11_a_misspelled_option_is_an_error(tmp_path, capsys, wrong, suggestion):
    paths = save(tmp_path, models({"w": (2, 2)}))
    with pytest.raises(SystemExit) as caught:
        main(["merge", *map(str, paths), "--out", str(tmp_path / "out"), *wrong])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and suggestion in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_11_a_misspelled_key_of_a_recipe_is_an_error(tmp_path, capsys):
    paths = save(tmp_path, models({"w": (2, 2)}))
    recipe = {
        "merge_method": "model_stock",
        "base_model": str(paths[0]),
        "dtpe": "float32",
        "models": [{"model": str(path)} for path in paths[1:]],
    }
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    command = ["merge", "--recipe", str(tmp_path / "recipe.yml"), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert re.search("recipe.yml: .*'dtpe' .*'dtype'", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_12_a_head_that_the_config_ties_is_not_written(tmp_path):
    inputs = [dict(m) for m in models({"model.embed_tokens.weight": (6, 4)})]
    tied = {"tie_word_embeddings": True}
    inputs[1]["lm_head.weight"] = inputs[1]["model.embed_tokens.weight"]
    planned = plan(save(tmp_path, inputs, [tied, {"tie_word_embeddings": False}, tied]))
    assert list(planned.tensors) == ["model.embed_tokens.weight"] and "tied to" in planned.notes[0]


def test_13_an_extra_tensor_is_an_error(tmp_path):
    inputs = [dict(m) for m in models({"w": (2, 2)})]
    inputs[2]["new.weight"] = np.ones(3, np.float32)
    with pytest.raises(UserError, match="new.weight is in .*ft2 but not in .*base "):
        plan(save(tmp_path, inputs))


def test_14_the_error_for_a_shape_mismatch_lists_every_model(tmp_path):
    inputs = [dict(m) for m in models({"w": (2, 2)})]
    inputs[2]["w"] = np.ones((2, 3), np.float32)
    with pytest.raises(UserError, match=r"w .*base \[2, 2\]; .*ft2 \[2, 3\]"):
        plan(save(tmp_path, inputs))


def test_15_every_tensor_has_a_row_in_the_report(tmp_path):
    inputs = models()
    _, report = merge(tmp_path, inputs)
    assert rows(report).keys() == inputs[0].keys()
    for name, row in rows(report).items():
        assert row["norms"] == pytest.approx(np.linalg.norm(deltas(inputs, name), axis=1), rel=1e-6)


def test_15_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    paths = save(tmp_path, models())
    before = sorted(tmp_path.rglob("*"))
    command = ["merge", *map(str, paths), "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main(command) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in shown["tensors"]} == set(models()[0])
    assert shown["bytes_written"] == plan(paths).bytes_written and shown["memory"] > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_15_an_interrupted_merge_resumes_and_no_incomplete_output_is_visible(tmp_path, monkeypatch):
    planned = plan(save(tmp_path, models()), max_shard_bytes=2000, threads=1)
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file) or fsync(file))

    def stop(done, total):
        if done > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(planned, tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists() and synced
    synced.clear()
    report = run(planned, tmp_path / "out")
    assert report.resumed and set(report.resumed) < set(planned.files)
    assert len(synced) >= len(planned.files)  # New files, the directory and its parent.
    assert set(TensorFiles(tmp_path / "out")) == set(models()[0])
