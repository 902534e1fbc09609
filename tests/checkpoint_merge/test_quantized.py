"""Quantized checkpoints in the layout of each library: an error, or merged as codes x scale."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import quantization, quantized_formats
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.checkpoint_merge.sources import open_source
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_directory_tensors
from tests.checkpoint_merge.engine import rounding, stock_ratio
from tests.checkpoint_merge.small import adapter, factors

ROWS, COLUMNS = 256, 300
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
PLAIN = "norm.weight"


def weights(number=3, seed=0):
    """A base and fine-tunes, float64, with updates that are larger than the quantization error."""
    rng = np.random.default_rng(seed)
    base, common = rng.standard_normal((2, ROWS, COLUMNS))
    return [
        base,
        *(base + 0.5 * (common + rng.standard_normal(base.shape)) for _ in range(number - 1)),
    ]


def codes_of(weight, scale, dtype):
    """Quantize a weight with a scale of the weight's shape."""
    scaled = weight / scale
    if np.dtype(dtype).kind in "iu":
        return np.clip(np.rint(scaled), -127, 127).astype(dtype)
    return np.clip(scaled, -448, 448).astype(dtype)


def per_tensor(weight, model):
    """One scale, different in each model, as after calibration."""
    return np.float32(0.01 * (1 + model)), np.full(weight.shape, np.float32(0.01 * (1 + model)))


def per_row(weight, model):
    scale = (np.abs(weight).max(axis=1) / 100 * (1 + model)).astype(np.float32)
    return scale, np.broadcast_to(scale[:, None], weight.shape)


def per_row_with_axis(weight, model):
    scale, spread = per_row(weight, model)
    return scale[:, None], spread


def per_block(weight, model):
    scale = np.random.default_rng(model).uniform(0.01, 0.05, (2, 3)).astype(np.float32)
    wide = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)
    return scale, wide[:ROWS, :COLUMNS]


# Library -> names of the codes, the scale and the weight; dtype of the codes; function that makes
# the scale; other stored tensors.
LAYOUTS = {
    "scaled fp8": (
        "q.weight",
        "q.scale_weight",
        "q.weight",
        E4M3,
        per_tensor,
        {"q.scale_input": np.ones((), np.float32), "scaled_fp8": np.zeros(2, E4M3)},
    ),
    "torchao": ("q._weight_qdata", "q._weight_scale", "q.weight", np.int8, per_row_with_axis, {}),
    "torchao float8": (
        "q._weight_qdata",
        "q._weight_scale",
        "q.weight",
        E4M3,
        per_row_with_axis,
        {},
    ),
    "quanto": (
        "q.weight._data",
        "q.weight._scale",
        "q.weight",
        np.int8,
        per_row_with_axis,
        {"q.input_scale": np.ones((), np.float32), "q.output_scale": np.ones((), np.float32)},
    ),
    "fused experts": (
        "mlp.experts.gate_up_proj",
        "mlp.experts.gate_up_proj_scale_inv",
        "mlp.experts.gate_up_proj",
        E4M3,
        per_block,
        {},
    ),
    "deepseek": ("q.weight", "q.scale", "q.weight", E4M3, per_block, {}),
    "fine-grained": ("q.weight", "q.weight_scale_inv", "q.weight", E4M3, per_block, {}),
    "compressed-tensors": ("q.weight", "q.weight_scale", "q.weight", np.int8, per_row, {}),
    "modelopt": (
        "attn.q.weight",
        "attn.q.weight_scale",
        "attn.q.weight",
        E4M3,
        per_tensor,
        {
            "attn.q.input_scale": np.ones((), np.float32),
            "attn.k_scale": np.ones((), np.float32),
            "attn.v_scale": np.ones((), np.float32),
        },
    ),
    "tensorrt-llm": (
        "q.weight",
        "q.weights_scaling_factor",
        "q.weight",
        E4M3,
        per_tensor,
        {
            "q.activation_scaling_factor": np.ones(1, np.float32),
            "q.input_scale_inv": np.ones(1, np.float32),
        },
    ),
    "comfyui": (
        "q.weight",
        "q.weight_scale",
        "q.weight",
        E4M3,
        per_tensor,
        {"q.comfy_quant": np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)},
    ),
}
FINE = {"quant_method": "fp8", "weight_block_size": [128, 128]}
# The quantization config of each library; {} if it stores none next to the weights.
CONFIGS = {
    "scaled fp8": {},
    "torchao": {"quant_method": "torchao"},
    "torchao float8": {"quant_method": "torchao"},
    "quanto": {"quant_method": "quanto"},
    "fused experts": FINE,
    "deepseek": FINE,
    "fine-grained": FINE,
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "tensorrt-llm": {},
    "comfyui": {},
}


def write(root, layout, shard=10**9, configs=None):
    """Write three quantized models; return their paths, their weights, and the weight's name."""
    codes, scale, name, dtype, scaled, extra = LAYOUTS[layout]
    if configs is None:
        configs = 3 * [{"quantization_config": CONFIGS[layout]}]
    dequantized, paths = [], []
    norm = np.random.default_rng(5).standard_normal(8)
    for model, weight in enumerate(weights()):
        stored, spread = scaled(weight, model)
        code = codes_of(weight, spread, dtype)
        dequantized.append(code.astype(np.float64) * spread)
        tensors = {codes: code, scale: np.asarray(stored), PLAIN: (norm + model).astype(BF16)}
        paths.append(root / ("base", "ft1", "ft2")[model])
        paths[-1].mkdir(parents=True)
        write_directory_tensors(paths[-1], tensors | extra, shard)
        (paths[-1] / "config.json").write_text(
            json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"} | configs[model])
        )
    return paths, dequantized, name


def reference(dequantized):
    d = np.stack([m - dequantized[0] for m in dequantized[1:]]).reshape(len(dequantized) - 1, -1)
    return dequantized[0] + stock_ratio(d) * np.mean(
        [m - dequantized[0] for m in dequantized[1:]], axis=0
    )


@pytest.mark.parametrize("shard", [10**9, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_for_quantized_models_suggests_dequantize(tmp_path, capsys, layout, shard):
    paths, _, _ = write(tmp_path, layout, shard)
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out")]) == 1
    stderr = capsys.readouterr().err
    assert "quantized" in stderr and "--dequantize" in stderr and LAYOUTS[layout][0] in stderr
    assert stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_times_scale_are_merged(tmp_path, layout, dtype):
    config = {
        "quantization_config": CONFIGS[layout],
        "vision_config": {"quantization_config": {"bits": 8}, "hidden_size": 3},
    }
    paths, dequantized, name = write(tmp_path, layout, configs=(config, config, config))
    if layout == "modelopt":
        (paths[0] / "hf_quant_config.json").write_text("{}")
    out = tmp_path / "out"
    typed = ["--dtype", dtype] if dtype else []
    assert main(["merge", *map(str, paths), "--out", str(out), "--dequantize", *typed]) == 0
    merged = TensorFiles(out)
    assert set(merged) == {name, PLAIN}
    expected = reference(dequantized)
    kind = BF16 if dtype is None else np.float32
    assert merged.dtype(name) == merged.dtype(PLAIN) == kind
    # Half an ulp of the output dtype, plus the float32 rounding of the dequantized weights.
    error = np.abs(merged[name].astype(np.float64) - expected)
    assert (error <= 0.5 * rounding(kind, expected) + 1e-6 * np.abs(expected).max()).all()
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "llama",
        "torch_dtype": dtype or "bfloat16",
        "vision_config": {"hidden_size": 3},
    }
    assert not (out / "hf_quant_config.json").exists()
    report = json.loads((out / "merge_report.json").read_text())
    (row,) = [row for row in report["units"] if row["name"] == name]
    ratio = stock_ratio(np.stack([m - dequantized[0] for m in dequantized[1:]]).reshape(2, -1))
    assert abs(row["ratio"] - ratio) < 1e-6


def test_scales_in_another_shard_and_ranges_in_any_order(tmp_path):
    paths, dequantized, name = write(tmp_path, "fine-grained", shard=1000)
    assert len(list(paths[0].glob("model-*.safetensors"))) > 1
    source = quantization.as_weights(open_source(str(paths[0])))
    flat = dequantized[0].reshape(-1).astype(np.float32)
    for start, stop in ((0, 5), (299, 301), (12345, 45678), (flat.size - 3, flat.size)):
        np.testing.assert_array_equal(source.read(name, start, stop), flat[start:stop])


@pytest.mark.parametrize(
    ("scale", "shape", "expected"),
    [
        ((), (3, 4), (3, 4)),
        ((1,), (3, 4), (3, 4)),
        ((3,), (3, 4), (1, 4)),
        ((3, 1), (3, 4), (1, 4)),
        ((1, 4), (3, 4), (3, 1)),
        ((2, 4), (256, 512), (128, 128)),
        ((3, 2), (3, 64), (1, 32)),
        ((5, 2, 4), (5, 256, 512), (1, 128, 128)),
        ((5,), (5, 2, 2), (1, 2, 2)),
        ((5, 1, 6), (5, 4, 6), (1, 4, 1)),
        ((5, 4), (576, 512), (128, 128)),
        ((1, 2), (96, 256), (96, 128)),
        ((3, 4, 1), (3, 4), None),
        ((5,), (3, 4), None),
    ],
)
def test_sizes_from_the_shape_of_the_scale(scale, shape, expected):
    sizes = quantized_formats.sizes(scale, shape)
    assert (None if isinstance(sizes, str) else sizes) == expected
    if expected is None:
        return
    rng = np.random.default_rng(0)
    values = rng.standard_normal(scale)
    wide = quantization.fit_scale(values, shape)
    for axis, size in enumerate(expected):
        wide = np.repeat(wide, size, axis=axis)
    wide = wide[tuple(slice(n) for n in shape)]
    spread = quantization.expand_scale(
        quantization.fit_scale(values, shape), sizes, shape, 1, wide.size
    )
    np.testing.assert_array_equal(spread, wide.reshape(-1)[1:])


def test_zero_point_is_subtracted_before_scaling(tmp_path):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (4, 6), dtype=np.uint8)
    scale = rng.uniform(0.1, 1, (4, 1)).astype(np.float32)
    zero = rng.integers(100, 150, (4, 1)).astype(np.int64)
    tmp_path.joinpath("m").mkdir()
    # The second zero point has 8 bits, but is not a weight.
    write_directory_tensors(
        tmp_path / "m",
        {
            "q._weight_qdata": codes,
            "q._weight_scale": scale,
            "q._weight_zero_point": zero,
            "k._weight_qdata": codes,
            "k._weight_scale": scale,
            "k._weight_zero_point": zero.astype(np.uint8),
        },
    )
    source = quantization.as_weights(open_source(str(tmp_path / "m")))
    expected = ((codes.astype(np.float64) - zero) * scale).astype(np.float32)
    assert sorted(source.tensors) == ["k.weight", "q.weight"]
    for name in source.tensors:
        np.testing.assert_array_equal(source.read(name, 0, 24).reshape(4, 6), expected)


# Formats that are not supported: 4 bits, lattices, codebooks, two scales.
UNSUPPORTED = {
    "gptq": {
        "q.qweight": np.ones((4, 8), np.int32),
        "q.qzeros": np.ones((2, 1), np.int32),
        "q.scales": np.ones((2, 8), np.float16),
        "q.g_idx": np.zeros(32, np.int32),
    },
    "nf4": {
        "q.weight": np.ones((16, 1), np.uint8),
        "q.weight.absmax": np.ones(2, np.uint8),
        "q.weight.quant_map": np.ones(16, np.float32),
    },
    "bitsandbytes int8": {"q.weight": np.ones((4, 4), np.int8), "q.SCB": np.ones(4, np.float32)},
    "nvfp4": {
        "q.weight": np.ones((4, 4), np.uint8),
        "q.weight_scale": np.ones((4, 1), E4M3),
        "q.weight_scale_2": np.ones((), np.float32),
    },
    "mxfp4": {
        "mlp.experts.gate_up_proj_blocks": np.ones((2, 4, 2, 8), np.uint8),
        "mlp.experts.gate_up_proj_scales": np.ones((2, 4, 2), np.uint8),
    },
    "packed": {
        "q.weight_packed": np.ones((4, 1), np.int32),
        "q.weight_scale": np.ones((4, 1), BF16),
        "q.weight_shape": np.ones(2, np.int64),
    },
    "hqq": {
        "q.W_q": np.ones((4, 4), np.uint8),
        "q.scale": np.ones((4, 1), np.float16),
        "q.zero": np.ones((4, 2), np.float16),
    },
    "aqlm": {
        "q.codes": np.ones((4, 2, 1), np.int16),
        "q.codebooks": np.ones((1, 8), np.float16),
        "q.scales": np.ones((4, 1, 1, 1), np.float16),
    },
    "quanto int4": {
        "q.weight._data._data": np.ones((4, 4), np.uint8),
        "q.weight._scale": np.ones((4, 1), np.float32),
        "q.weight._shift": np.ones((4, 1), np.float32),
    },
    "mismatched scale": {
        "q.weight": np.ones((4, 6), E4M3),
        "q.weight_scale": np.ones(5, np.float32),
    },
}


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("layout", UNSUPPORTED)
def test_error_for_unsupported_formats_says_how_to_fix_it(tmp_path, capsys, layout, dequantize):
    paths = []
    for model in range(3):
        paths.append(tmp_path / str(model))
        paths[-1].mkdir()
        extra = {
            n: (a + np.asarray(model).astype(a.dtype)).astype(a.dtype)
            for n, a in UNSUPPORTED[layout].items()
        }
        write_directory_tensors(paths[-1], extra | {PLAIN: np.arange(8.0) + model})
    typed = ["--dequantize"] if dequantize else []
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out"), *typed]) == 1
    stderr = capsys.readouterr().err
    assert "dequantize()" in stderr and stderr.count("\n") == 1
    assert stderr.count("--dequantize") <= dequantize  # The option is not suggested.


@pytest.mark.parametrize("where", ["config.json", "text_config", "hf_quant_config.json"])
def test_float8_with_a_quantization_config_is_quantized(tmp_path, capsys, where):
    paths = []
    for model, weight in enumerate(weights()):
        paths.append(tmp_path / str(model))
        paths[-1].mkdir()
        write_directory_tensors(paths[-1], {"q.weight": weight.astype(E4M3)})
        entry = {"quantization_config": {"quant_method": "fp8"}}
        config = {"config.json": entry, "text_config": {"text_config": entry}}.get(where, {})
        (paths[-1] / "config.json").write_text(json.dumps(config))
        if where.startswith("hf_"):
            (paths[-1] / where).write_text("{}")
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out")]) == 1
    assert "quantized" in capsys.readouterr().err


PLAIN_MODELS = {
    "float8 without a scale": {"q.weight": lambda rng: rng.standard_normal((8, 8)).astype(E4M3)},
    "only float8, with a scale that is a weight": {
        "q.weight": lambda rng: rng.standard_normal((8, 8)).astype(E4M3),
        "q.scale": lambda rng: rng.standard_normal(8).astype(E4M3),
    },
    "swin v2": {
        "attn.relative_position_index": lambda rng: np.arange(16).reshape(4, 4),
        "attn.logit_scale": lambda rng: rng.standard_normal((4, 1, 1)).astype(np.float32),
        "attn.q.weight": lambda rng: rng.standard_normal((8, 8)).astype(np.float32),
    },
    "clip": {
        "text_model.embeddings.position_ids": lambda rng: np.arange(77)[None],
        "logit_scale": lambda rng: np.float32(rng.standard_normal()),
        "visual_projection.weight": lambda rng: rng.standard_normal((8, 8)).astype(np.float32),
    },
    "small integers": {
        "attn.mask": lambda rng: np.ones((4, 4), np.uint8),
        "attn.logit_scale": lambda rng: rng.standard_normal(4).astype(np.float32),
        "attn.token_type_ids": lambda rng: np.zeros((1, 4), np.int32),
        "attn.scale": lambda rng: rng.standard_normal(1).astype(np.float32),
    },
    "layer scale": {
        "block.lambda_1": lambda rng: rng.standard_normal(8).astype(BF16),
        "block.scale": lambda rng: rng.standard_normal(8).astype(BF16),
        "block.weight": lambda rng: rng.standard_normal((8, 8)).astype(BF16),
    },
}


@pytest.mark.parametrize("kind", PLAIN_MODELS)
def test_models_that_are_not_quantized_are_merged(tmp_path, kind):
    paths = []
    for model in range(3):
        rng = np.random.default_rng(model)
        paths.append(tmp_path / str(model))
        paths[-1].mkdir()
        write_directory_tensors(
            paths[-1], {n: np.asarray(make(rng)) for n, make in PLAIN_MODELS[kind].items()}
        )
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out")]) == 0
    base, out = TensorFiles(paths[0]), TensorFiles(tmp_path / "out")
    assert {n: out.dtype(n) for n in out} == {n: base.dtype(n) for n in base}


def test_quantization_config_of_plain_weights_is_removed(tmp_path, capsys):
    """A QLoRA model merged into bfloat16 often keeps the key, which is then stale."""
    paths = []
    for model, weight in enumerate(weights()):
        paths.append(tmp_path / str(model))
        paths[-1].mkdir()
        write_directory_tensors(paths[-1], {"q.weight": weight.astype(BF16)})
        (paths[-1] / "config.json").write_text(
            json.dumps({"model_type": "llama", "quantization_config": {"load_in_4bit": True}})
        )
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "llama"}
    assert "quantization" in capsys.readouterr().err


def test_adapters_on_a_quantized_base(tmp_path):
    """The setting of QLoRA: the anchor is the dequantized base, and the updates are exact."""
    paths, dequantized, name = write(tmp_path, "fine-grained")
    adapters = [adapter(tmp_path / f"lora{k}", factors("q", ROWS, COLUMNS, seed=k)) for k in (1, 2)]
    out = tmp_path / "out"
    assert (
        main(
            [
                "merge",
                str(paths[0]),
                *map(str, adapters),
                "--out",
                str(out),
                "--dequantize",
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    updates = []
    for k in (1, 2):
        a, b = (
            factors("q", ROWS, COLUMNS, seed=k)[f"base_model.model.q.lora_{side}.weight"]
            for side in "AB"
        )
        updates.append(2.0 * b.astype(np.float64) @ a.astype(np.float64))
    expected = reference([dequantized[0], *(dequantized[0] + m for m in updates)])
    merged = TensorFiles(out)[name]
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_error_for_adapters_on_a_quantized_base_suggests_dequantize(tmp_path, capsys):
    paths, _, _ = write(tmp_path, "quanto")
    lora = adapter(tmp_path / "lora", factors("q", ROWS, COLUMNS))
    assert main(["merge", str(paths[0]), str(lora), str(lora), "--out", str(tmp_path / "o")]) == 1
    assert f"{lora} " in capsys.readouterr().err
    other = adapter(tmp_path / "lora2", factors("q", ROWS, COLUMNS, seed=2))
    assert main(["merge", str(paths[0]), str(lora), str(other), "--out", str(tmp_path / "o")]) == 1
    assert "--dequantize" in capsys.readouterr().err


def test_plain_base_and_quantized_fine_tunes(tmp_path):
    paths, dequantized, name = write(tmp_path, "compressed-tensors")
    plain = tmp_path / "plain"
    plain.mkdir()
    base = weights()[0].astype(np.float32)
    write_directory_tensors(plain, {"q.weight": base, PLAIN: np.arange(8).astype(BF16)})
    out = tmp_path / "out"
    assert main(["merge", str(plain), *map(str, paths[1:]), "--out", str(out), "--dequantize"]) == 0
    expected = reference([base.astype(np.float64), *dequantized[1:]])
    merged = TensorFiles(out)
    assert merged.dtype(name) == np.float32  # as in BASE
    np.testing.assert_allclose(merged[name], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_checksum_of_a_quantized_file(tmp_path):
    import zlib

    paths, _, _ = write(tmp_path, "quanto")
    out = tmp_path / "out"
    assert main(["merge", *map(str, paths), "--out", str(out), "--dequantize"]) == 0
    report = json.loads((out / "merge_report.json").read_text())
    data = (paths[1] / "model.safetensors").read_bytes()
    assert report["models"][0]["files"] == {"model.safetensors": f"crc32:{zlib.crc32(data):08x}"}
