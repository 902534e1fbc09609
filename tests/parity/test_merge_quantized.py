"""Quantized checkpoints as their libraries write them: an error by default, merged on request.

`--dequantize` merges codes times scales. The reference reads both from the files in float64.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchao.quantization as torchao
import transformers as hf
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from loguru import logger
from optimum import quanto
from safetensors.torch import load_file

from tests.parity.merge_inputs import (
    IDS,
    VOCABULARY,
    assert_close,
    config_of,
    edit_config,
    merge,
    merged,
    opened,
    save_all,
    save_tensors,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Warnings of other libraries.
logger.disable("compressed_tensors")
FINE = 128  # Rows and columns of a block of fine-grained FP8.
# Names of tensors that a dequantized checkpoint must not contain.
REMAINS = re.compile(r".*(scale|zero_point|qdata|_data|_shift|scale_inv|SCB|packed)")
# Names, shapes and dtypes of one weight in BitsAndBytes, GPTQ, AWQ, and MXFP4 (of gpt-oss).
FOUR_BITS = {
    "bitsandbytes": ({"weight": ((512, 1), torch.uint8), "weight.absmax": ((16,), torch.uint8),
                      "weight.quant_map": ((16,), torch.float32),
                      "weight.nested_absmax": ((1,), torch.float32),
                      "weight.nested_quant_map": ((256,), torch.float32),
                      "weight.quant_state.bitsandbytes__nf4": ((80,), torch.uint8)},
                     {"quant_method": "bitsandbytes", "load_in_4bit": True,
                      "bnb_4bit_quant_type": "nf4"}),
    "gptq": ({"qweight": ((4, 32), torch.int32), "qzeros": ((1, 4), torch.int32),
              "scales": ((1, 32), torch.float16), "g_idx": ((32,), torch.int32)},
             {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}),
    "awq": ({"qweight": ((32, 4), torch.int32), "qzeros": ((1, 4), torch.int32),
             "scales": ((1, 32), torch.float16)},
            {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "mxfp4": ({"weight_blocks": ((32, 1, 16), torch.uint8),
               "weight_scales": ((32, 1), torch.uint8)},
              {"quant_method": "mxfp4"}),
}  # fmt: skip


def llama(width: int = 32, middle: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=middle,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    return hf.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def with_torchao(config):
    def save(model, path: Path) -> None:
        model.save_pretrained(path / "plain")
        quantized = hf.AutoModelForCausalLM.from_pretrained(
            path / "plain", dtype=torch.bfloat16, quantization_config=hf.TorchAoConfig(config())
        )
        quantized.save_pretrained(path)

    return save


def with_quanto(kind):
    def save(model, path: Path) -> None:
        quanto.QuantizedModelForCausalLM.quantize(model, weights=kind).save_pretrained(path)

    return save


def _bounds(weight: torch.Tensor, args: QuantizationArgs):
    """Return the minimum and maximum weight of each part with one scale."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "group":
        parts = weight.reshape(len(weight), -1, args.group_size)
        return parts.amin(-1), parts.amax(-1)
    rows, columns = args.block_structure
    parts = weight.reshape(len(weight) // rows, rows, -1, columns)
    return parts.amin((1, 3)), parts.amax((1, 3))


def with_compressed_tensors(form: str, **args):
    def save(model, path: Path) -> None:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        apply_quantization_config(
            model,
            QuantizationConfig(
                config_groups={"group_0": scheme},
                quantization_status="frozen",
                ignore=["lm_head"],
                format=form,
            ),
        )
        for module in model.modules():
            if (scheme := getattr(module, "quantization_scheme", None)) is not None:
                scale, _ = calculate_qparams(
                    *_bounds(module.weight.float(), scheme.weights), scheme.weights
                )
                module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        compressor = ModelCompressor.from_pretrained_model(model, form)
        compressor.compress_model(model)
        model.save_pretrained(path)
        compressor.update_config(path)

    return save


def fine_grained(model, path: Path) -> None:
    """Write FP8 with a scale per block of 128 x 128, as in DeepSeek-V3 and Qwen3."""
    model.save_pretrained(path)
    values = {}
    for name, value in load_file(path / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            values[name] = value
            continue
        rows, columns = (math.ceil(size / FINE) for size in value.shape)
        padded = torch.zeros(rows * FINE, columns * FINE)
        padded[: value.shape[0], : value.shape[1]] = value
        blocks = padded.reshape(rows, FINE, columns, FINE)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)
        values[name] = codes[: value.shape[0], : value.shape[1]].to(torch.float8_e4m3fn)
        values[f"{name}_scale_inv"] = scale
    save_tensors(path, values)
    edit_config(
        path,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [FINE, FINE],
        },
    )


FORMATS = {
    "torchao int8": with_torchao(torchao.Int8WeightOnlyConfig),
    "torchao int8 activations": with_torchao(torchao.Int8DynamicActivationInt8WeightConfig),
    "torchao float8": with_torchao(torchao.Float8WeightOnlyConfig),
    "torchao int8 groups": with_torchao(lambda: torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int8, granularity=torchao.PerGroup(16))),
    "quanto int8": with_quanto(quanto.qint8),
    "quanto float8": with_quanto(quanto.qfloat8),
    "fine-grained fp8": fine_grained,
    "compressed float8 tensor": with_compressed_tensors(
        "float-quantized", num_bits=8, type="float", strategy="tensor"),
    "compressed float8 channel": with_compressed_tensors(
        "float-quantized", num_bits=8, type="float", strategy="channel"),
    "compressed float8 block": with_compressed_tensors(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 16]),
    "compressed int8 channel": with_compressed_tensors(
        "int-quantized", num_bits=8, type="int", strategy="channel"),
    "compressed int8 groups": with_compressed_tensors(
        "naive-quantized", num_bits=8, type="int", strategy="group", group_size=16),
}  # fmt: skip


def saved(root: Path, form: str) -> list[Path]:
    model = llama(160, 288) if form == "fine-grained fp8" else llama()
    return save_all(root, model, FORMATS[form])


def dequantized(directory: Path) -> dict[str, np.ndarray]:
    """Return codes times scales in float64, and other tensors unchanged."""
    stored = {
        name: value.double().numpy()
        for name, value in load_file(directory / "model.safetensors").items()
    }
    result = {}
    for name, value in stored.items():
        if name.endswith("._weight_qdata"):  # torchao
            start = name.removesuffix("_weight_qdata")
            zero = stored.get(f"{start}_weight_zero_point", np.zeros(()))
            scale = _spread(stored[f"{start}_weight_scale"], value.shape)
            result[f"{start}weight"] = (value - _spread(zero, value.shape)) * scale
        elif name.endswith(".weight._data"):  # quanto
            start = name.removesuffix("._data")
            result[start] = value * _spread(stored[f"{start}._scale"], value.shape)
        elif f"{name}_scale_inv" in stored:
            blocks = np.repeat(np.repeat(stored[f"{name}_scale_inv"], FINE, 0), FINE, 1)
            result[name] = value * blocks[: value.shape[0], : value.shape[1]]
        elif f"{name}_scale" in stored:  # compressed-tensors
            result[name] = value * _spread(stored[f"{name}_scale"], value.shape)
        elif not REMAINS.fullmatch(name):
            result[name] = value
    return result


def _spread(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Expand the scales of tensors, rows, groups or blocks to one scale per element."""
    if scale.size == 1:
        return scale.reshape(())
    for axis, size in enumerate(shape):
        scale = np.repeat(scale, size // scale.shape[axis], axis)
    return scale


def assert_rounded_once(value: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Check for half an ulp of bfloat16 (8 significant bits), plus 1e-6 of the maximum."""
    size = np.abs(expected)
    unit = 2.0 ** np.floor(np.log2(np.where(size > 0, size, 1.0)))
    assert (np.abs(value - expected) <= unit * 2.0**-8 + 1e-6 * size.max(initial=0)).all(), name


@pytest.mark.parametrize("form", FORMATS)
def test_quantized_weights(tmp_path, capsys, form):
    paths = saved(tmp_path, form)
    stored = load_file(paths[0] / "model.safetensors")
    assert any(REMAINS.fullmatch(name) for name in stored)
    capsys.readouterr()
    # The default is an error that names the option that merges them.
    assert merge(paths, tmp_path / "error") == 1
    err = capsys.readouterr().err
    assert "quantized" in err and "--dequantize" in err, err
    assert not (tmp_path / "error").exists()
    # The option merges codes times scales and rounds once.
    base, *tuned = map(dequantized, paths)
    for option in ([], ["--dtype", "float32"]):
        out = tmp_path / f"out{len(option)}"
        assert merge(paths, out, "--dequantize", *option) == 0
        result = load_file(out / "model.safetensors")
        assert result.keys() == base.keys()
        assert {x.dtype for x in result.values()} == {torch.float32 if option else torch.bfloat16}
        for name, value in result.items():
            expected = merged(base[name], [model[name] for model in tuned])
            (assert_close if option else assert_rounded_once)(
                value.double().numpy(), expected, name
            )
        config = config_of(out)
        assert "quantization_config" not in config and "compression_config" not in config
        assert not (out / "quanto_qmap.json").exists()
        assert config.get("dtype", config.get("torch_dtype")) == (
            "float32" if option else "bfloat16"
        )
        model = opened(hf.AutoModelForCausalLM, out, dtype="auto")
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    "form",
    ["torchao int8", "torchao float8", "torchao int8 groups", "quanto int8", "quanto float8"],
)
def test_the_library_reads_codes_times_scales(tmp_path, form):
    """The reference in this file equals dequantize() of the library."""
    (path, *_) = saved(tmp_path, form)
    kind = (
        quanto.QuantizedModelForCausalLM if form.startswith("quanto") else (hf.AutoModelForCausalLM)
    )
    read, expected = kind.from_pretrained(str(path)), dequantized(path)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = read.get_submodule(name).weight
        assert type(weight) is not torch.nn.Parameter
        assert_rounded_once(
            weight.dequantize().double().detach().numpy(), expected[f"{name}.weight"], name
        )


@pytest.mark.parametrize("quantized", ["fine-tunes", "base"])
def test_quantized_and_full_precision_models(tmp_path, capsys, quantized):
    codes = saved(tmp_path / "codes", "quanto int8")
    plain = save_all(tmp_path / "plain", llama())
    paths = [plain[0], *codes[1:]] if quantized == "fine-tunes" else [codes[0], *plain[1:]]
    assert merge(paths, tmp_path / "error") == 1
    err = capsys.readouterr().err
    assert "quantized" in err and "--dequantize" in err, err
    assert merge(paths, tmp_path / "out", "--dequantize") == 0
    result = load_file(tmp_path / "out" / "model.safetensors")
    base, *tuned = map(dequantized, paths)
    assert result.keys() == base.keys()
    for name, value in result.items():
        expected = merged(base[name], [model[name] for model in tuned])
        assert_rounded_once(value.double().numpy(), expected, name)
    opened(hf.AutoModelForCausalLM, tmp_path / "out", dtype="auto")


def test_dequantize_accepts_models_without_quantization(tmp_path):
    paths = save_all(tmp_path, llama())
    assert merge(paths, tmp_path / "out", "--dequantize") == 0
    assert merge(paths, tmp_path / "same") == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()


def _assert_error(paths, root, capsys):
    for options in ([], ["--dequantize"]):
        capsys.readouterr()
        assert merge(paths, root / "out", *options) == 1
        err = capsys.readouterr().err
        assert err.count("error:") == 1, err
        assert "quantized" in err or options and "--dequantize" in err, err
        # The message does not name an option that cannot help.
        assert options or "--dequantize" not in err, err
        assert not (root / "out").exists()


@pytest.mark.parametrize("form", ["quanto", "compressed-tensors"])
def test_four_bits_of_libraries(tmp_path, capsys, form):
    save = {
        "quanto": with_quanto(quanto.qint4),
        "compressed-tensors": with_compressed_tensors(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=16
        ),
    }[form]
    _assert_error(save_all(tmp_path, llama(), save), tmp_path, capsys)


@pytest.mark.parametrize("form", FOUR_BITS)
def test_four_bits_by_hand(tmp_path, capsys, form):
    parts, config = FOUR_BITS[form]
    paths = save_all(tmp_path, llama())
    for i, path in enumerate(paths):
        values = load_file(path / "model.safetensors")
        del values["model.layers.0.self_attn.q_proj.weight"]
        generator = torch.Generator().manual_seed(i)
        for name, (shape, dtype) in parts.items():
            values[f"model.layers.0.self_attn.q_proj.{name}"] = torch.randint(
                0, 16, shape, generator=generator
            ).to(dtype)
        save_tensors(path, values)
        edit_config(path, quantization_config=config)
    assert json.loads((paths[0] / "config.json").read_text())["quantization_config"] == config
    _assert_error(paths, tmp_path, capsys)
