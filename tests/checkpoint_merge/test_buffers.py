"""Buffers of indices and frequencies are copied from the base, in any dtype of a library."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.checkpoint_merge.tensor_names import is_counter, is_index
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_directory_tensors
from tests.checkpoint_merge.engine import models

BUFFERS = {
    "text_model.embeddings.position_ids": np.arange(77)[None],
    "attn.relative_position_index": np.arange(16).reshape(4, 4),
    "model.rotary_emb.inv_freq": 1e4 ** -(np.arange(8) / 8),
    "bert.embeddings.token_type_ids": np.zeros((1, 8)),
    "h.0.attn.bias": np.tril(np.ones((1, 1, 4, 4))),
    "h.0.attn.masked_bias": np.float32(-1e4),
    "text.attn_mask": np.where(np.tri(4), 0, -np.inf),
    "rotary.cos_cached": np.ones((4, 4)),
}


@pytest.mark.parametrize(
    "dtypes",
    [
        (np.float32,) * 3,
        (np.float16,) * 3,
        (np.int64, np.float32, np.int64),
        (np.float32, np.int64, np.int32),
        (np.float32, np.float16, np.float32),
    ],
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_buffers_are_bitwise_those_of_the_base(tmp_path, dtypes, dtype):
    paths = []
    for k, model in enumerate(models({"w": (4, 4)})):
        # The values differ: rounded by another library, or changed by an earlier merge.
        buffers = {
            name: np.asarray(values + k).astype(stored(values, dtypes[k]))
            for name, values in BUFFERS.items()
        }
        paths.append(tmp_path / str(k))
        paths[-1].mkdir()
        write_directory_tensors(paths[-1], model | buffers)
    options = ["--dtype", dtype] if dtype else []
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out"), *options]) == 0
    out, base = TensorFiles(tmp_path / "out"), TensorFiles(paths[0])
    for name, values in BUFFERS.items():
        assert out.dtype(name) == stored(values, dtypes[0])
        np.testing.assert_array_equal(out[name], base[name])


def stored(values, dtype):
    """Return a dtype that can represent the values: infinities and fractions are no integers."""
    integer = np.isfinite(values).all() and not (values % 1).any()
    return np.dtype(dtype if integer or np.dtype(dtype).kind == "f" else np.float32)


def test_a_mask_that_was_trained_is_a_weight(tmp_path):
    shapes = {"attn.mask": (8, 8), "w": (4, 4), "ssm.log_step": (1,)}
    inputs = models(shapes)
    paths = []
    for k, model in enumerate(inputs):
        paths.append(tmp_path / str(k))
        paths[-1].mkdir()
        write_directory_tensors(paths[-1], model)
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out")]) == 0
    out = TensorFiles(tmp_path / "out")
    assert not np.array_equal(out["attn.mask"], inputs[0]["attn.mask"])
    # A single element has no angle: the mean, not the maximum.
    mean = (inputs[1]["ssm.log_step"] + inputs[2]["ssm.log_step"]) / 2
    np.testing.assert_allclose(out["ssm.log_step"], mean, rtol=1e-6)


def normalized(root, variances, dtype=np.float32):
    """Write models with a weight and the stored statistics of a batch norm."""
    rng = np.random.default_rng(0)
    weight, paths = rng.standard_normal((8, 8)), []
    for k, variance in enumerate(variances):
        moved = weight + 0.1 * rng.standard_normal((8, 8)) * (k > 0)
        spread = np.random.default_rng(round(100 * variance)).uniform(0.5, 1.5, 8)
        statistics = {"bn.running_var": variance * spread, "bn.running_mean": np.full(8, -0.25)}
        tensors = {n: w.astype(dtype) for n, w in ({"w": moved} | statistics).items()}
        paths.append(root / str(k))
        paths[-1].mkdir()
        write_directory_tensors(paths[-1], tensors | {"bn.num_batches_tracked": np.int64(7)})
    return [str(path) for path in paths]


METHODS = {
    "model-stock": (),
    "weighted-model-stock": (),
    "uniform-mean": (),
    "linear": ("--weights=3,-1",),
    "wise-ft": ("--alpha", "0.5"),
    "task-arithmetic": ("--scale", "3"),
    "ties": ("--scale", "3"),
    "slerp": ("--t", "0.5"),
}


@pytest.mark.parametrize("method", METHODS)
def test_statistics_that_differ_stay_positive_and_are_noted(tmp_path, capsys, method):
    paths = normalized(tmp_path, (0.5, 0.21, 0.22))
    out = tmp_path / "out"
    options = ("--method", method, *METHODS[method])
    assert main(["merge", *paths, "--out", str(out), *options]) == 0
    found = TensorFiles(out)["bn.running_var"]
    # WiSE-FT interpolates all tensors by the coefficient that the user gives.
    base, first, second = (TensorFiles(path)["bn.running_var"] for path in paths)
    mean = (first + second) / 2
    expected = (base + mean) / 2 if method == "wise-ft" else mean
    assert found.min() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # One rounding to float32.
    (note,) = [n for n in capsys.readouterr().err.splitlines() if "running" in n]
    assert "bn.running_var" in note and "bn.running_mean" not in note
    assert "statistics" in note and "training images" in note
    report = json.loads((out / "merge_report.json").read_text())
    assert any("bn.running_var" in text for text in report["notes"])
    assert "training images" in (out / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_statistics_equal_in_all_models_are_bitwise_those_of_the_base(
    tmp_path, capsys, method, dtype
):
    paths = normalized(tmp_path, (0.3,) * 3, dtype)
    out = tmp_path / "out"
    options = ("--method", method, *METHODS[method])
    assert main(["merge", *paths, "--out", str(out), *options]) == 0
    assert "running" not in capsys.readouterr().err
    merged, base = TensorFiles(out), TensorFiles(paths[0])
    for name in ("bn.running_var", "bn.running_mean", "bn.num_batches_tracked"):
        assert merged[name].tobytes() == base[name].tobytes()
    rows = {
        row["name"]: row
        for row in json.loads((out / "merge_report.json").read_text())["not_merged"]
    }
    assert rows["bn.running_var"]["source"] == "base"


def test_statistics_of_another_shape_are_an_error(tmp_path, capsys):
    paths = normalized(tmp_path, (0.3,) * 3)
    longer = dict(TensorFiles(paths[2])) | {"bn.running_var": np.ones(9, np.float32)}
    write_directory_tensors(tmp_path / "2", longer)
    for method in ("model-stock", "task-arithmetic"):
        arguments = ["merge", *paths, "--out", str(tmp_path / "out"), "--method", method]
        assert main(arguments) == 1
        assert "bn.running_var differs in shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit.embeddings.mask_token", (1, 1, 8)),
        ("rope.freqs", (2, 4, 8)),
        ("q.bias", (8,)),
        ("h.0.attn.bias", (12,)),
        ("attn.relative_position_bias_table", (49, 4)),
        ("embeddings.position_embedding.weight", (77, 8)),
        ("index_proj.weight", (8, 8)),
    ],
)
def test_weights_are_no_buffers(name, shape):
    assert not is_index(name, shape)


@pytest.mark.parametrize(
    ("name", "shape", "integer", "expected"),
    [
        ("bn.num_batches_tracked", (), True, True),
        ("whatever", (1,), True, True),
        ("model_ema.num_updates", (), False, True),
        ("n_averaged", (), True, True),
        ("logit_scale", (), False, False),
        ("bn.num_batches_tracked", (4,), False, False),
        ("discount", (), False, False),
    ],
)
def test_counters(name, shape, integer, expected):
    assert is_counter(name, shape, integer) is expected
