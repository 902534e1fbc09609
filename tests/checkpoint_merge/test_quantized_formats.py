"""Quantization methods, scales and blocks: the meaning of codes is certain, or an error."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import quantization, quantized_formats
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.checkpoint_merge.sources import open_source
from modelstock_jax.checkpoint_merge.tensor_names import TensorInfo
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_directory_tensors

E4M3, E5M2, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu
BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32


def write_models(root, make, config=None, models=3):
    """Write models with the tensors of `make(rng)`, where `rng` differs between models."""
    paths = []
    for model in range(models):
        paths.append(root / ("base", "ft1", "ft2")[model])
        paths[-1].mkdir(parents=True)
        tensors = {
            name: np.asarray(value) for name, value in make(np.random.default_rng(model)).items()
        }
        norm = np.random.default_rng(9 + model).standard_normal(8).astype(BF16)
        write_directory_tensors(paths[-1], tensors | {"norm.weight": norm})
        if config is not None:
            (paths[-1] / "config.json").write_text(
                json.dumps({"model_type": "llama", "quantization_config": config})
            )
    return paths


def read(root, tensors, config=None):
    """Open one model as with --dequantize."""
    (path,) = write_models(root, lambda rng: tensors, config, models=1)
    return quantization.as_weights(open_source(str(path)))


def headers(directory, tensors, components=None):
    """A source with names, shapes and dtypes, but no values."""
    return SimpleNamespace(
        label="model",
        directory=directory,
        components=components or {"": "model"},
        aliases={},
        notes=[],
        tensors={name: TensorInfo(*info) for name, info in tensors.items()},
    )


def read_all(source, name="q.weight"):
    shape = source.tensors[name].shape
    return source.read(name, 0, int(np.prod(shape))).reshape(shape)


def assert_rejected(root, make, config, capsys, why):
    """Assert that `merge` raises an error, with and without --dequantize.

    The message does not suggest the option, and nothing is written. The same applies if the user
    excludes the tensor that the message names.
    """
    paths = [str(path) for path in write_models(root, make, config)]
    exclude = ["--exclude", "q.*"]
    for options in ([], ["--dequantize"], exclude, ["--dequantize", *exclude]):
        assert main(["merge", *paths, "--out", str(root / "out"), *options]) == 1
        stderr = capsys.readouterr().err
        assert why in stderr and quantized_formats.HOW_TO_FIX in stderr, stderr
        assert "--exclude" not in stderr and stderr.count("--dequantize") <= (
            "--dequantize" in options
        )
        assert stderr.count("\n") == 1 and not (root / "out").exists()


def float8(rng, shape=(64, 64)):
    return rng.standard_normal(shape).astype(E4M3)


def int8(rng, shape=(64, 64)):
    return rng.integers(-127, 127, shape).astype(np.int8)


# Microscaling (MX): exponents in bytes, one scale per 32 codes.
@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, (1, 32)),
        ({"quant_method": "mxfp8"}, (1, 32)),
        (None, (1, 32)),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, (64, 64)),
    ],
)
@pytest.mark.parametrize("kind", [np.uint8, E8M0])
def test_microscaling_exponents(tmp_path, config, size, kind):
    rng = np.random.default_rng(0)
    codes = float8(rng, (128, 128))
    exponents = rng.integers(110, 130, (128 // size[0], 128 // size[1])).astype(np.uint8)
    source = read(tmp_path, {"q.weight": codes, "q.weight_scale": exponents.view(kind)}, config)
    scale = np.repeat(np.repeat(2.0 ** (exponents.astype(int) - 127), size[0], 0), size[1], 1)
    np.testing.assert_array_equal(read_all(source), (codes.astype(float) * scale).astype(F32))
    assert sorted(source.tensors) == ["norm.weight", "q.weight"]


@pytest.mark.parametrize("shape", [(), (128, 1), (1, 1), (2, 2)])
def test_scales_with_an_exponent_dtype(tmp_path, shape):
    codes = float8(np.random.default_rng(0), (128, 192))
    exponents = np.random.default_rng(0).integers(110, 130, shape).astype(np.uint8)
    source = read(
        tmp_path,
        {"q.weight": codes, "q.weight_scale": exponents.view(E8M0)},
        {"quant_method": "compressed-tensors", "block_structure": "64x96"},
    )
    scale = 2.0 ** (exponents.astype(int) - 127)
    if shape == (2, 2):
        scale = np.repeat(np.repeat(scale, 64, 0), 96, 1)
    np.testing.assert_array_equal(read_all(source), (codes.astype(float) * scale).astype(F32))


@pytest.mark.parametrize(
    ("codes", "scale"),
    [
        (float8, np.uint8(120)),  # one exponent per tensor: no format stores it
        (float8, np.full((64, 4), 120, np.uint8)),  # blocks of 16
        (int8, np.full((64, 2), 120, np.uint8)),
        (int8, np.full((64, 2), 0.5, E8M0)),  # two FP4 values per byte: experts of DeepSeek-V4
        (float8, np.full((64, 2), 120, np.int8)),
    ],
)
def test_error_for_other_integer_scales(tmp_path, capsys, codes, scale):
    assert_rejected(
        tmp_path,
        lambda rng: {"q.weight": codes(rng), "q.weight_scale": scale},
        None,
        capsys,
        "q.weight",
    )


def test_error_for_torchao_exponents(tmp_path, capsys):
    """torchao may store exponents in another order."""
    assert_rejected(
        tmp_path,
        lambda rng: {
            "q._weight_qdata": float8(rng, (128, 128)),
            "q._weight_scale": np.full((128, 4), 1, E8M0),
        },
        {"quant_method": "torchao"},
        capsys,
        "F8_E8M0",
    )


# Methods with an unknown layout.
@pytest.mark.parametrize("out", [64, 32])
@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quant_method": "eetq", "weights": "int8"}, "quant_method 'eetq'"),  # [in, out]
        ({"quant_method": "of_tomorrow"}, "quant_method 'of-tomorrow'"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),  # FP4 in bytes
        ({"quant_method": "modelopt"}, "quant_method 'modelopt'"),  # smoothed
        ({"quant_algo": "W8A16"}, "quant_method 'modelopt'"),  # TensorRT-LLM: interleaved
        ({"bits": 4}, "4 bits"),
        (
            {
                "quant_method": "compressed-tensors",
                "transform_config": {"config_groups": {"u": {"type": "hadamard"}}},
            },
            "rotated",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "sparse",
        ),
    ],
)
def test_error_for_methods_with_an_unknown_layout(tmp_path, capsys, config, why, out):
    assert_rejected(
        tmp_path,
        lambda rng: {"q.weight": int8(rng, (64, out)), "q.weight_scales": np.full(out, 0.1, F16)},
        config,
        capsys,
        why if out == 64 else "q.weight",
    )


def test_method_in_the_config_of_a_tower_or_component(tmp_path, capsys):
    def make(rng):
        return {"q.weight": int8(rng), "q.weight_scale": np.full((64, 1), 0.1, F16)}

    paths = write_models(tmp_path, make)
    for path in paths:
        (path / "config.json").write_text(
            json.dumps({"text_config": {"quantization_config": {"quant_method": "eetq"}}})
        )
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "o"), "--dequantize"]) == 1
    assert "'eetq'" in capsys.readouterr().err
    for path in paths:
        folder = path / "transformer"
        folder.mkdir()
        (path / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
        (path / "config.json").rename(folder / "config.json")
        (path / "model_index.json").write_text(
            json.dumps({"_class_name": "P", "transformer": ["diffusers", "T"]})
        )
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "o"), "--dequantize"]) == 1
    assert "'eetq'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["compressed-tensors", "torchao", "quanto"])
def test_scale_with_one_axis_applies_to_the_rows(tmp_path, method):
    rng = np.random.default_rng(0)
    codes, scale = int8(rng), rng.uniform(0.1, 1, 64).astype(F32)
    source = read(tmp_path, {"q.weight": codes, "q.weight_scale": scale}, {"quant_method": method})
    np.testing.assert_array_equal(read_all(source), codes * scale[:, None])


def test_square_weight_needs_a_method_or_a_weight_that_is_not_square(tmp_path):
    rng = np.random.default_rng(0)
    square = {"q.weight": float8(rng), "q.weight_scale": rng.uniform(0.1, 1, 64).astype(F32)}
    with pytest.raises(Exception, match=r"q.weight: .*\[64\] .*\[64, 64\]"):
        read(tmp_path / "alone", square)
    wide = {
        "up.weight": float8(rng, (32, 64)),
        "up.weight_scale": rng.uniform(0.1, 1, 32).astype(F32),
    }
    source = read(tmp_path / "both", square | wide)
    for name in ("q", "up"):
        both = square | wide
        scale = both[f"{name}.weight_scale"][:, None]
        np.testing.assert_array_equal(
            read_all(source, f"{name}.weight"), both[f"{name}.weight"].astype(F32) * scale
        )


# Blocks: from the config, or if only one block size matches.
@pytest.mark.parametrize(
    ("shape", "size", "config"),
    [
        ((96, 128), (64, 64), {"weight_block_size": [64, 64]}),
        ((200, 200), (100, 100), {"weight_block_size": [100, 100]}),
        ((288, 320), (96, 64), {"weight_block_size": [96, 64]}),
        (
            (192, 192),
            (1, 96),
            {
                "config_groups": {
                    "group_0": {
                        "weights": {"group_size": 96},
                        "input_activations": {"group_size": 128},
                    }
                }
            },
        ),
        (
            (192, 192),
            (96, 96),
            {"config_groups": {"g": {"weights": {"block_structure": [96, 96]}}}},
        ),
        ((256, 384), (128, 128), {}),
        ((32, 384), (1, 128), {}),
    ],
)
def test_block_sizes(tmp_path, shape, size, config):
    rng = np.random.default_rng(0)
    codes = float8(rng, shape)
    scale = rng.uniform(0.1, 1, [-(-n // s) for n, s in zip(shape, size, strict=True)]).astype(F32)
    source = read(
        tmp_path,
        {"q.weight": codes, "q.weight_scale": scale},
        {"quant_method": "compressed-tensors"} | config,
    )
    wide = np.repeat(np.repeat(scale.astype(float), size[0], 0), size[1], 1)
    expected = codes.astype(float) * wide[: shape[0], : shape[1]]
    np.testing.assert_array_equal(read_all(source), expected.astype(F32))


@pytest.mark.parametrize(
    ("shape", "scale", "config"),
    [
        ((288, 32), (3,), {"weight_block_size": [96, 32]}),  # fused qkv
        ((288, 32), (3,), {}),
        ((288, 32), (3, 1), {}),
        ((6144, 64), (3, 1), {}),
        ((256, 512), (4, 2), {"weight_block_size": [128, 128]}),  # transposed
        ((256, 512), (4, 2), {}),
        ((4, 512), (4, 1), {"weight_block_size": [128, 128]}),
        ((200, 200), (2, 2), {}),  # 128 or an equal split
        ((192, 192), (2, 2), {}),
        ((256, 300), (2, 3), {}),
        ((96, 128), (2, 2), {}),
        ((256, 256), (2, 2), {"weight_block_size": [64, 64]}),  # not as in the config
        ((256, 256), (256, 2), {"weight_block_size": [128, 128]}),
        ((64, 32), (32,), {}),  # per column
    ],
)
def test_error_for_uncertain_blocks(tmp_path, capsys, shape, scale, config):
    assert_rejected(
        tmp_path,
        lambda rng: {
            "q.weight": float8(rng, shape),
            "q.weight_scale": rng.uniform(0.1, 1, scale).astype(F32),
        },
        {"quant_method": "fp8"} | config,
        capsys,
        f"scale {list(scale)} ",
    )


# Other tensors in a module.
@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"q.weight_g_idx": np.arange(64).astype(np.int32) % 4}, "weight_g_idx"),  # actorder
        ({"q.weight_zero_point": np.full((64, 4), 0.5, F16)}, "zero point"),
        ({"q.pre_quant_scale": np.ones(64, F16)}, "pre_quant_scale"),  # AWQ in ModelOpt
        ({"q.prequant_scaling_factor": np.ones(64, F16)}, "prequant_scaling_factor"),
        ({"q.input_scale": np.ones(64, F32)}, "input_scale"),  # smooths each input
        ({"q.weight_shift": np.ones((64, 1), F16)}, "weight_shift"),
        ({"q.out_scale": np.ones((), F32)}, "out_scale"),  # may be learned
        (
            {
                "q.comfy_quant": np.frombuffer(
                    b'{"format": "int8_tensorwise", "convrot": true}', np.uint8
                )
            },
            "comfy_quant",
        ),
    ],
)
def test_tensors_that_change_the_meaning_of_codes_are_not_ignored(tmp_path, capsys, extra, why):
    assert_rejected(
        tmp_path,
        lambda rng: extra | {"q.weight": int8(rng), "q.weight_scale": np.full((64, 4), 0.1, F32)},
        None,
        capsys,
        why,
    )


def test_learned_scalars_are_kept_and_a_note_names_dropped_scales(tmp_path):
    one = np.ones((), F32)
    learned = {
        "attn.q_scale": np.full(1, 3.7, F32),
        "ffn.out_scale": np.full(1, 1.9, F32),
        "other.k_scale": one,
        "other.v_scale": one,
        "logit_scale": one,
        "deep.attn.output_scale": one,
    }
    codes = {
        "attn.q.weight": float8(np.random.default_rng(0)),
        "attn.q.weight_scale": one,
        "mlp.experts.up_proj": float8(np.random.default_rng(1), (4, 32, 32)),
        "mlp.experts.up_proj_scale_inv": np.full((4, 1, 1), 0.1, F32),
    }
    source = read(tmp_path / "a", learned | codes)
    assert {*source.tensors} == {*learned, "norm.weight", "attn.q.weight", "mlp.experts.up_proj"}
    (note,) = source.notes
    assert not any(name in note for name in learned)
    activation_scales = {
        "attn.q.input_scale": one,
        "attn.k_scale": one,
        "attn.v_scale": one,
        "mlp.experts.up_proj_activation_scale": np.ones(4, F32),
    }
    source = read(tmp_path / "b", codes | activation_scales | {"logit_scale": one})
    assert {*source.tensors} == {
        "logit_scale",
        "norm.weight",
        "attn.q.weight",
        "mlp.experts.up_proj",
    }
    (note,) = source.notes
    assert " 4 " in note and "attn.k_scale, attn.q.input_scale" in note
    assert note.endswith("and 1 more)")


@pytest.mark.parametrize(
    "name",
    ["weights_scaling_factor", "weight_descale", "Scale", "qscales", "weight_amax", "weight_s"],
)
def test_scales_with_other_names_are_detected(tmp_path, capsys, name):
    """A single file has no config; a bias is not a scale."""
    paths = write_models(
        tmp_path,
        lambda rng: {
            "q.weight": float8(rng),
            f"q.{name}": np.full(1, 0.1, F32),
            "q.bias": np.ones(64, F32),
        },
    )
    files = [str(path / "model.safetensors") for path in paths]
    assert main(["merge", *files, "--out", str(tmp_path / "out")]) == 1
    assert re.search(r"quantized .*q\.weight", capsys.readouterr().err)


def test_layer_without_a_marker_is_plain_float8(tmp_path):
    marker = np.frombuffer(b'{"format": "float8_e4m3fn"}', np.uint8)
    codes = float8(np.random.default_rng(0))
    source = read(
        tmp_path,
        {
            "q.weight": codes,
            "q.weight_scale": np.float32(0.5),
            "q.comfy_quant": marker,
            "k.weight": codes,
            "empty.comfy_quant": marker,
        },
    )
    assert {n: i.code for n, i in source.tensors.items()} == {
        "q.weight": "F32",
        "k.weight": "F8_E4M3",
        "norm.weight": "BF16",
    }


def test_marker_of_all_layers_applies_to_its_component(tmp_path):
    code, one = ((8, 8), "F8_E4M3"), ((), "F32")
    source = headers(
        tmp_path,
        {
            "a/scaled_fp8": ((2,), "F8_E4M3"),
            "a/q.weight": code,
            "a/q.scale_weight": one,
            "b/q.weight": code,
        },
        {"a/": "a/model", "b/": "b/model"},
    )
    read = quantization.as_weights(source)
    assert {n: i.code for n, i in read.tensors.items()} == {
        "a/q.weight": "F32",
        "b/q.weight": "F8_E4M3",
    }


@pytest.mark.parametrize("code", ["U8", "I32"])
def test_flat_codes_with_a_scale_of_the_same_name(tmp_path, code):
    source = headers(tmp_path, {"q.weight": ((64,), code), "q.weight_scale": ((2,), "F32")})
    assert "packed" in quantization.quantization_error(source)


def test_one_layer_in_an_unsupported_format_is_an_error(tmp_path):
    source = headers(
        tmp_path,
        {
            "q.weight": ((8, 8), "F8_E4M3"),
            "q.weight_scale": ((), "F32"),
            "k.weight": ((8, 8), "I8"),
            "k.SCB": ((8,), "F32"),
        },
    )  # bitsandbytes
    assert "k.SCB: " in quantization.quantization_error(source)


# Integers that no rule recognizes as codes.
@pytest.mark.parametrize("differ", [True, False])
@pytest.mark.parametrize(
    "parts",
    [
        {"q.Qidxs": ((32, 2), np.int64), "q.Wscale": ((), F32), "q.SU": ((32,), F16)},  # QuIP#
        {"q.words": ((32, 2), np.int16), "q.Wscale": ((), F32)},
    ],
)
def test_integers_with_a_scale_and_a_quantization_config(tmp_path, capsys, differ, parts):
    def make(rng):
        rng = rng if differ else np.random.default_rng(0)
        return {n: rng.integers(0, 99, shape).astype(kind) for n, (shape, kind) in parts.items()}

    assert_rejected(tmp_path, make, {"quant_method": "quip"}, capsys, "packed")


@pytest.mark.parametrize("name", ["q.lattice", "q.indices"])  # VPTQ's name is that of a buffer.
def test_different_integers_with_a_quantization_config(tmp_path, capsys, name):
    assert_rejected(
        tmp_path,
        lambda rng: {
            name: rng.integers(0, 99, (32, 2)),
            "q.centroids.weight": np.ones((4, 8), F16),
        },
        {"quant_method": "vptq"},
        capsys,
        f"({name} ",
    )


@pytest.mark.parametrize("config", [None, {"load_in_4bit": True}])  # A stale key.
@pytest.mark.parametrize(
    "buffer",
    [
        np.ones((4, 4), np.uint8),
        np.arange(16, dtype=np.int32),
        np.arange(16).reshape(4, 4),
        np.arange(16, dtype=np.int32).reshape(4, 4),
        np.arange(16, dtype=np.int8),
    ],
)
def test_learned_scale_next_to_an_integer_buffer_is_not_quantization(tmp_path, buffer, config):
    def make(rng):
        scale = {} if config else {"attn.scale": rng.standard_normal(8).astype(F32)}
        weight = {"attn.codes": buffer} if buffer.ndim == 1 else {}
        plain = rng.standard_normal((8, 8)).astype(F32)
        return scale | weight | {"attn.buckets": buffer, "w.weight": plain}

    paths = write_models(tmp_path, make, config)
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out")]) == 0
    np.testing.assert_array_equal(TensorFiles(tmp_path / "out")["attn.buckets"], buffer)


def test_float8_from_a_cast_is_merged(tmp_path):
    """Weight norm, biases and temperatures in other dtypes next to float8 are not scales."""
    paths = write_models(
        tmp_path,
        lambda rng: {
            "q.weight_v": float8(rng),
            "q.weight_g": rng.standard_normal((64, 1)).astype(F32),
            "up_proj": float8(rng),
            "up_proj_bias": rng.standard_normal(64).astype(F32),
            "k.weight": float8(rng),
            "k.bias": rng.standard_normal(64).astype(F32),
            "k.temperature": rng.standard_normal(1).astype(F32),
        },
    )
    assert main(["merge", *map(str, paths), "--out", str(tmp_path / "out")]) == 0


# Published checkpoints: quantization config; names, shapes and dtypes of tensors.
PUBLISHED = {
    "DeepSeek-V3": ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, {
        "self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), "F8_E4M3"),
        "self_attn.kv_a_proj_with_mqa.weight_scale_inv": ((5, 56), "F32"),
        "self_attn.q_a_proj.weight": ((1536, 7168), "F8_E4M3"),
        "self_attn.q_a_proj.weight_scale_inv": ((12, 56), "F32"),
        "mlp.gate.weight": ((256, 7168), "BF16"),
        "mlp.gate.e_score_correction_bias": ((256,), "F32"),
    }),
    "DeepSeek's names": (None, {
        "attn.wkv_a.weight": ((576, 7168), "F8_E4M3"), "attn.wkv_a.scale": ((5, 56), "F32"),
        "attn.wo.weight": ((7168, 16384), "F8_E4M3"), "attn.wo.scale": ((56, 128), "F32"),
    }),
    "Mistral": ({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, {
        "self_attn.q_proj.weight": ((4096, 3072), "F8_E4M3"),
        "self_attn.q_proj.weight_scale_inv": ((), "BF16"),
        "self_attn.q_proj.activation_scale": ((), "BF16"),
    }),
    "Mistral's names": (None, {
        "attention.wq.weight": ((4096, 3072), "F8_E4M3"), "attention.wq.qscale_act": ((), "BF16"),
        "attention.wq.qscale_weight": ((), "BF16"),
    }),
    "RedHatAI FP8-dynamic": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {
            "group_0": {"input_activations": {"num_bits": 8, "group_size": None},
                        "weights": {"num_bits": 8, "block_structure": None, "group_size": None}}},
         "sparsity_config": {}, "transform_config": {}, "kv_cache_scheme": None}, {
            "self_attn.o_proj.weight": ((4096, 4096), "F8_E4M3"),
            "self_attn.o_proj.weight_scale": ((4096, 1), "BF16"),
            "mlp.up_proj.weight": ((14336, 4096), "F8_E4M3"),
            "mlp.up_proj.weight_scale": ((14336, 1), "BF16"),
        }),
    "RedHatAI w8a8 with a cache": (
        {"quant_method": "compressed-tensors", "format": "int-quantized", "kv_cache_scheme": {
            "num_bits": 8}, "sparsity_config": {"format": "dense"}}, {
            "self_attn.k_proj.weight": ((1024, 4096), "I8"),
            "self_attn.k_proj.weight_scale": ((1024, 1), "BF16"),
            "self_attn.k_proj.input_scale": ((1,), "BF16"),
            "self_attn.k_proj.input_zero_point": ((1,), "I8"),
            "self_attn.k_scale": ((1,), "BF16"), "self_attn.v_scale": ((1,), "BF16"),
        }),
    "AutoFP8": ({"quant_method": "fp8", "kv_cache_scheme": "static"}, {
        "self_attn.k_proj.weight": ((1024, 4096), "F8_E4M3"),
        "self_attn.k_proj.weight_scale": ((1,), "F16"),
        "self_attn.k_proj.input_scale": ((1,), "F16"), "self_attn.kv_scale": ((1,), "F16"),
    }),
    "ModelOpt FP8": ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
                      "producer": {"name": "modelopt"}}, {
        "self_attn.k_proj.weight": ((1024, 4096), "F8_E4M3"),
        "self_attn.k_proj.weight_scale": ((), "F32"), "self_attn.k_proj.input_scale": ((), "F32"),
        "self_attn.k_proj.k_scale": ((), "F32"),
    }),
    "Llama 4, fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, {
        "feed_forward.experts.gate_up_proj": ((16, 5120, 16384), "F8_E4M3"),
        "feed_forward.experts.gate_up_proj_scale": ((16, 1, 16384), "F32"),
        "feed_forward.experts.down_proj": ((16, 8192, 5120), "F8_E4M3"),
        "feed_forward.experts.down_proj_scale": ((16, 1, 5120), "F32"),
        "self_attn.q_proj.weight": ((5120, 5120), "F8_E4M3"),
        "self_attn.q_proj.weight_scale": ((5120, 1), "F32"),
    }),
    "ComfyUI scaled": (None, {
        "scaled_fp8": ((2,), "F8_E4M3"), "blocks.0.modulation": ((1, 6, 5120), "F32"),
        "blocks.0.self_attn.q.weight": ((5120, 5120), "F8_E4M3"),
        "blocks.0.self_attn.q.scale_weight": ((), "F32"),
        "blocks.0.self_attn.q.scale_input": ((), "F32"),
        "blocks.0.self_attn.q.bias": ((5120,), "F16"),
        "blocks.0.norm.scale_shift_table": ((6, 5120), "F16"),
    }),
    "TensorRT-LLM": ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, {
        "transformer.layers.0.attention.qkv.weight": ((12288, 4096), "F8_E4M3"),
        "transformer.layers.0.attention.qkv.weights_scaling_factor": ((1,), "F32"),
        "transformer.layers.0.attention.qkv.activation_scaling_factor": ((1,), "F32"),
        "transformer.layers.0.attention.kv_cache_scaling_factor": ((1,), "F32"),
    }),
    "Quanto with activations": ({"quant_method": "quanto", "weights": "int8"}, {
        "fc1.weight._data": ((64, 64), "I8"), "fc1.weight._scale": ((64, 1), "F32"),
        "fc1.input_scale": ((), "F32"), "fc1.output_scale": ((), "F32"), "fc1.bias": ((64,), "F32"),
    }),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_layouts(tmp_path, model):
    config, stored = PUBLISHED[model]
    key = "quantization" if model == "TensorRT-LLM" else "quantization_config"
    (tmp_path / "config.json").write_text(json.dumps({key: config} if config else {}))
    source = quantization.as_weights(headers(tmp_path, stored))
    expected = {
        name
        for name, info in stored.items()
        if info[1][0] in "FI"
        and len(info[0]) > 1
        and "scale" not in name
        or name.endswith(("bias", "table", "modulation"))
    } | ({"mlp.gate.weight"} & stored.keys())
    assert {*source.tensors} == {name.removesuffix("._data") for name in expected}
    assert {*source.codes} == {
        name.removesuffix("._data")
        for name, info in stored.items()
        if info[1] in ("F8_E4M3", "I8") and len(info[0]) > 1
    }
