"""A LoRA adapter is W + s B A, computed for any range, up to float32 rounding."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.lora import Adapter
from modelstock_jax.checkpoint_merge.sources import open_source
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge.small import adapter, factors, llama_shapes, save, weights

Q, K = "layers.0.q_proj", "layers.0.k_proj"
ROWS, COLUMNS = 7, 5
PEFT = Path(__file__).parent / "peft"


@pytest.fixture
def base(tmp_path):
    rng = np.random.default_rng(5)
    tensors = {
        f"{Q}.weight": rng.standard_normal((ROWS, COLUMNS)).astype(np.float32),
        f"{K}.weight": rng.standard_normal((ROWS, COLUMNS)).astype(np.float32),
        f"{Q}.bias": rng.standard_normal(ROWS).astype(np.float32),
        "embed.weight": rng.standard_normal((11, 4)).astype(np.float32),
        "head.weight": rng.standard_normal((2, 4)).astype(np.float32),
    }
    return open_source(str(save(tmp_path / "base", tensors)))


def read_all(source, name):
    shape = source.tensors[name].shape
    return source.read(name, 0, math.prod(shape)).reshape(shape)


def adapted(base, name, a, b, scale, transposed=False):
    delta = scale * (b.astype(np.float64) @ a.astype(np.float64))
    return read_all(base, name).astype(np.float64) + (delta.T if transposed else delta)


@pytest.mark.parametrize(("config", "scale"), [
    ({}, 2.0),
    ({"lora_alpha": 16}, 16 / 3),
    ({"use_rslora": True}, 6 / math.sqrt(3)),
    ({"alpha_pattern": {"q_proj": 9}}, 3.0),
    ({"alpha_pattern": {r"layers\.\d+\.q_proj": 9, "q_proj": 12}}, 3.0),
    ({"alpha_pattern": {"proj": 9}}, 2.0),  # a pattern must match complete parts at the end
    ({"r": 8, "rank_pattern": {"q_proj": 3}}, 2.0),
])  # fmt: skip
def test_scale(base, tmp_path, config, scale):
    tensors = factors(Q, ROWS, COLUMNS)
    source = open_source(str(adapter(tmp_path / "lora", tensors, **config)), base)
    a, b = tensors.values()
    expected = adapted(base, f"{Q}.weight", a, b, scale).astype(np.float32)
    # One rounding to float32; the float64 sums differ only in their order.
    np.testing.assert_array_max_ulp(read_all(source, f"{Q}.weight"), expected, maxulp=1)
    assert source.tensors[f"{Q}.weight"].code == "F32"


def test_every_range_equals_the_range_of_the_tensor(base, tmp_path):
    tensors = factors(Q, ROWS, COLUMNS)
    source = open_source(str(adapter(tmp_path / "lora", tensors)), base)
    name = f"{Q}.weight"
    values = read_all(source, name).reshape(-1)
    for start in range(ROWS * COLUMNS + 1):
        for stop in range(start, ROWS * COLUMNS + 1):
            np.testing.assert_allclose(
                source.read(name, start, stop), values[start:stop], rtol=2e-7, atol=1e-7
            )  # one rounding to float32; the sums may differ in their order


def test_tensors_without_an_update_are_bitwise_identical_to_the_base(base, tmp_path):
    source = open_source(str(adapter(tmp_path / "lora", factors(Q, ROWS, COLUMNS))), base)
    for name in base.tensors.keys() - {f"{Q}.weight"}:
        np.testing.assert_array_equal(read_all(source, name), read_all(base, name))
    assert source.directory == base.directory


def test_fan_in_fan_out(base, tmp_path):
    tensors = factors(Q, COLUMNS, ROWS)  # stored [in, out], as GPT-2's Conv1D
    source = open_source(str(adapter(tmp_path / "lora", tensors, fan_in_fan_out=True)), base)
    a, b = tensors.values()
    expected = adapted(base, f"{Q}.weight", a, b, 2.0, transposed=True)
    np.testing.assert_allclose(read_all(source, f"{Q}.weight"), expected, rtol=1e-7, atol=1e-7)


def test_embedding(base, tmp_path):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((3, 11)), rng.standard_normal((4, 3))
    start = "base_model.model.embed.lora_embedding_"
    tensors = {f"{start}A": a.astype(np.float32), f"{start}B": b.astype(np.float32)}
    source = open_source(str(adapter(tmp_path / "lora", tensors)), base)
    expected = adapted(base, "embed.weight", *tensors.values(), 2.0, transposed=True)
    np.testing.assert_allclose(read_all(source, "embed.weight"), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("middle", ["", ".modules_to_save", ".modules_to_save.default"])
def test_modules_to_save_and_biases_replace_those_of_the_base(base, tmp_path, middle):
    head, bias = np.full((2, 4), 3, np.float32), np.full(ROWS, 4, np.float32)
    tensors = factors(Q, ROWS, COLUMNS) | {
        f"base_model.model.head{middle}.weight": head,
        f"base_model.model.{Q}.base_layer.bias": bias,
    }
    source = open_source(str(adapter(tmp_path / "lora", tensors, bias="lora_only")), base)
    np.testing.assert_array_equal(read_all(source, "head.weight"), head)
    np.testing.assert_array_equal(read_all(source, f"{Q}.bias"), bias)


def test_embedding_with_a_replacement_and_an_update(base, tmp_path):
    """PEFT saves the embedding next to its factors if it may have been resized."""
    rng = np.random.default_rng(1)
    embedding = rng.standard_normal((13, 4)).astype(np.float32)  # the base has 11 rows
    start = "base_model.model.embed"
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 13), (4, 3)))
    tensors = {f"{start}.lora_embedding_A": a, f"{start}.lora_embedding_B": b,
               f"{start}.base_layer.weight": embedding}  # fmt: skip
    source = open_source(str(adapter(tmp_path / "lora", tensors)), base)
    expected = embedding + 2.0 * (b.astype(np.float64) @ a.astype(np.float64)).T
    np.testing.assert_allclose(read_all(source, "embed.weight"), expected, rtol=1e-7, atol=1e-7)


def test_two_adapters_are_added(base, tmp_path):
    one = adapter(tmp_path / "one", factors(Q, ROWS, COLUMNS, seed=1))
    two = adapter(tmp_path / "two", factors(Q, ROWS, COLUMNS, seed=2))
    both = open_source(f"{base.label}+{one}+{two}", base)
    expected = read_all(base, f"{Q}.weight").astype(np.float64)
    for seed in (1, 2):
        a, b = factors(Q, ROWS, COLUMNS, seed=seed).values()
        expected += 2.0 * (b.astype(np.float64) @ a.astype(np.float64))
    # The first sum is rounded to float32 before the second.
    np.testing.assert_allclose(read_all(both, f"{Q}.weight"), expected, rtol=3e-7, atol=1e-6)
    assert both.label == f"{base.label}+{one}+{two}"


def test_note_about_an_adapter_of_another_base(base, tmp_path):
    lora = adapter(tmp_path / "lora", factors(Q, ROWS, COLUMNS), base_model_name_or_path="org/x")
    (note,) = open_source(str(lora), base).notes
    assert "'org/x'" in note and base.label in note
    same = adapter(tmp_path / "same", factors(Q, ROWS, COLUMNS), base_model_name_or_path="org/base")
    assert open_source(str(same), base).notes == []


@pytest.mark.parametrize(("config", "message"), [
    ({"peft_type": "LOHA"}, "peft_type .*'LOHA'"),
    ({"peft_type": "IA3"}, "merge_and_unload"),
    ({"use_dora": True}, "use_dora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ({"r": 4}, f"'{Q}'.* 3"),
    ({"lora_alpha": None}, "lora_alpha .*None"),
    ({"alpha_pattern": {"(": 3}}, "adapter_config.json: .*expression"),
    ({"alpha_pattern": [3]}, r"alpha_pattern .*\[3\]"),
    ({"lora_alpha": 10**400}, "lora_alpha .*number"),
    ({"lora_alpha": float("nan")}, "lora_alpha .*nan"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path .*3"),
])  # fmt: skip
def test_error_for_adapters_that_are_not_plain_lora(tmp_path, config, message):
    path = adapter(tmp_path / "lora", factors(Q, ROWS, COLUMNS), **config)
    with pytest.raises(UserError, match="lora") as error:
        Adapter(path)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


def test_initializations_that_do_not_change_the_base(tmp_path):
    for init in (True, False, "gaussian", "eva"):
        Adapter(adapter(tmp_path / "lora", factors(Q, ROWS, COLUMNS), init_lora_weights=init))


def _convolution(tensors):
    return {name: array[..., None, None] for name, array in tensors.items()}


def _dora(tensors):
    magnitude = {f"base_model.model.{Q}.lora_magnitude_vector": np.ones(ROWS, np.float32)}
    return tensors | magnitude


def _without_b(tensors):
    return dict(list(tensors.items())[:1])


def _other_layer(tensors):
    return {name.replace("layers.0", "layers.9"): array for name, array in tensors.items()}


def _misspelled(tensors):
    return {name.replace("q_proj", "q_prj"): array for name, array in tensors.items()}


@pytest.mark.parametrize(("change", "message"), [
    (_convolution, "convolution"),
    (_dora, "lora_magnitude_vector"),
    (_without_b, "lora_A"),
    (_other_layer, "layers.9.q_proj.weight .*base"),
    (_misspelled, f"'{Q}.weight'"),
    (lambda t: factors(Q, ROWS + 1, COLUMNS), r"\[7, 5\] .*\[8, 5\]"),
    (lambda t: {"x": np.ones(2, np.float32)}, "'x' .*LoRA"),
])  # fmt: skip
def test_tensors_that_do_not_match_the_base(base, tmp_path, change, message):
    path = adapter(tmp_path / "lora", change(factors(Q, ROWS, COLUMNS)))
    with pytest.raises(UserError) as error:
        open_source(str(path), base)
    assert re.search(message, str(error.value)) and str(path) in str(error.value)


@pytest.mark.parametrize("order", [1, -1])
def test_trained_module_is_read_instead_of_the_original(base, tmp_path, order):
    """A raw state dict contains both; the original is that of the base."""
    trained = np.full((7, 5), 3, np.float32)
    names = [
        f"base_model.model.{Q}.modules_to_save.default.weight",
        f"base_model.model.{Q}.original_module.weight",
    ][::order]
    tensors = {
        name: trained if "default" in name else np.zeros((7, 5), np.float32) for name in names
    }
    source = open_source(str(adapter(tmp_path / "lora", tensors)), base)
    np.testing.assert_array_equal(read_all(source, f"{Q}.weight"), trained)


def test_adapter_with_other_prefixes_is_mapped(base, tmp_path):
    tensors = factors(Q, ROWS, COLUMNS)
    plain = open_source(str(adapter(tmp_path / "plain", tensors)), base)
    renamed = {name.replace("layers.0", "model.layers.0"): a for name, a in tensors.items()}
    mapped = open_source(str(adapter(tmp_path / "renamed", renamed)), base)
    np.testing.assert_array_equal(read_all(mapped, f"{Q}.weight"), read_all(plain, f"{Q}.weight"))
    assert any("other names" in note for note in mapped.notes)


def test_error_for_rank_0(base, tmp_path):
    path = adapter(tmp_path / "lora", factors(Q, ROWS, COLUMNS, rank=0), r=0)
    with pytest.raises(UserError, match="rank 0"):
        open_source(str(path), base)


def test_error_for_a_pickled_adapter(base, tmp_path):
    path = adapter(tmp_path / "lora", factors(Q, ROWS, COLUMNS))
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(UserError, match="safe_serialization=True"):
        open_source(str(path), base)


def test_error_for_a_quantized_base(tmp_path):
    base = open_source(str(save(tmp_path / "b", {f"{Q}.weight": np.ones((7, 5), np.int8)})))
    with pytest.raises(UserError, match="I8 .*--dequantize"):
        open_source(str(adapter(tmp_path / "lora", factors(Q, ROWS, COLUMNS))), base)


def test_part_of_a_row_is_computed_from_its_columns(base, tmp_path, monkeypatch):
    """Memory is bounded: one element of a wide row costs one product of rank r."""
    path = adapter(tmp_path / "lora", factors(Q, ROWS, COLUMNS))
    opened = Adapter(path)
    left, right = opened._load(f"{Q}.weight")
    shapes = []

    class Recorded(np.ndarray):
        def __getitem__(self, key):
            part = super().__getitem__(key)
            shapes.append(part.shape)
            return part

    monkeypatch.setattr(opened, "_load", lambda name: (left.view(Recorded), right.view(Recorded)))
    opened.delta(f"{Q}.weight", 11, 13)
    assert shapes[:2] == [(1, 3), (3, 2)]


def test_adapter_that_peft_saved_and_merged(tmp_path):
    """PEFT 0.21.2 saved `peft/`; `merged.safetensors` is the result of its merge_and_unload().

    Base: `small.weights(llama_shapes())`. LoraConfig(r=2, lora_alpha=3, use_rslora=True,
    target_modules=["embed_tokens", "q_proj", "up_proj", "down_proj"], rank_pattern={"down_proj":
    1, "layers.1.self_attn.q_proj": 3} (dots escaped), alpha_pattern={"up_proj": 5},
    modules_to_save=["lm_head"]); then every trained parameter was changed at random.
    """
    base = open_source(str(save(tmp_path / "base", weights(llama_shapes()))))
    source = open_source(str(PEFT), base)
    merged = TensorFiles(PEFT / "merged.safetensors")
    assert len(merged) == 8
    for name in base.tensors:
        value = read_all(source, name)
        if name in merged:
            # PEFT computes in float32: B A, its scale and the sum are each rounded (2^-24).
            np.testing.assert_allclose(value, merged[name], rtol=2e-7, atol=2e-7)
        else:
            np.testing.assert_array_equal(value, read_all(base, name))
