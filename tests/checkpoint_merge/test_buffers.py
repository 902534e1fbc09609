"""Buffers of indices and frequencies are copied from the base, in any dtype of a library."""

from __future__ import annotations

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


@pytest.mark.parametrize("method", ["model_stock", "task_arithmetic", "ties"])
def test_variances_stay_positive(tmp_path, capsys, method):
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((8, 8)), "bn.running_var": np.full(8, 0.5)}
    paths = []
    for k in range(3):
        model = {
            "w": base["w"] + 0.1 * rng.standard_normal((8, 8)) * (k > 0),
            "bn.running_var": np.full(8, 0.5 if k == 0 else 0.2 + 0.01 * k),
        }
        paths.append(tmp_path / str(k))
        paths[-1].mkdir()
        write_directory_tensors(paths[-1], {n: w.astype(np.float32) for n, w in model.items()})
    options = ["--method", method, *(["--scale", "3"] if method != "model_stock" else [])]
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out"), *options]) == 0
    found = TensorFiles(tmp_path / "out")["bn.running_var"]
    assert found.min() > 0.19
    assert ("extrapolation" in capsys.readouterr().err) is (method != "model_stock")


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
