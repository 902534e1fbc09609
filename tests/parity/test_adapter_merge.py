"""PEFT opens a merged adapter, and its model is that of the complete merge."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from tests.parity.merge_inputs import assert_close, family, merge, merged, opened
from tests.parity.test_merge_peft import RENAMED, adapted, unloaded

pytestmark = pytest.mark.filterwarnings("ignore")  # Warnings of other libraries.
# Both sides round the weights to float32, and PEFT rounds B A too.
TOLERANCE = 1e-6

CASES = {
    # Ranks differ between tensors of the merged adapter, so rank_pattern is needed.
    "unequal ranks": ("llama", [
        {"r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 2}},
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "alpha_pattern": {"v_proj": 7}},
    ]),
    "other modules": ("llama", [
        {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["v_proj", "o_proj"], "r": 2},
    ]),
    "some layers": ("llama", [
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "up_proj"]},
    ]),
    "modules_to_save": ("llama", [{"modules_to_save": ["lm_head"]}] * 2),
    "modules_to_save of one": ("llama", [{"modules_to_save": ["lm_head", "embed_tokens"]}, {}]),
    "embedding": ("llama", [{"target_modules": ["embed_tokens", "k_proj"]}] * 2),
    "conv1d": ("gpt2", [{"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}] * 2),
    "bias": ("qwen2", [{"bias": "all"}] * 2),
    "encoder": ("bert", [{"target_modules": ["query"]}, {"target_modules": ["query", "value"]}]),
    "seq2seq": ("bart", [{"target_modules": ["q_proj", "fc1"]}] * 2),
}  # fmt: skip


def applied(model: torch.nn.Module, directory: Path) -> tuple[PeftModel, dict[str, np.ndarray]]:
    """Return a model with an adapter, and its merged weights by names at runtime."""
    config = LoraConfig.from_pretrained(directory)
    fresh = get_peft_model(copy.deepcopy(model), config)
    report = set_peft_model_state_dict(fresh, load_file(directory / "adapter_model.safetensors"))
    assert not report.unexpected_keys
    assert not [k for k in report.missing_keys if "lora_" in k or "modules_to_save" in k]
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), directory)
    state = copy.deepcopy(loaded).merge_and_unload().state_dict()
    return loaded, {name: value.numpy() for name, value in state.items()}


@pytest.mark.parametrize("unit", ["tensor", "filter"])
@pytest.mark.parametrize("case", CASES)
def test_peft_opens_the_merged_adapter(tmp_path, case, unit):
    name, hows = CASES[case]
    model = family(name)
    model.save_pretrained(tmp_path / "base")
    for i, how in enumerate(hows):
        adapted(model, i, **how).save_pretrained(tmp_path / f"a{i}")
    paths = [tmp_path / "base", tmp_path / "a0", tmp_path / "a1"]
    assert merge(paths, tmp_path / "complete", "--unit", unit) == 0
    assert merge(paths, tmp_path / "out", "--unit", unit, "--as-adapter") == 0
    loaded, weights = applied(model, tmp_path / "out")
    complete = opened(type(model), tmp_path / "complete").state_dict()
    assert weights.keys() == complete.keys()
    changed = 0
    for key, value in complete.items():
        assert_close(weights[key], value.numpy(), key, TOLERANCE)
        changed += not np.array_equal(model.state_dict()[key].numpy(), value.numpy())
    assert changed > 1
    stored = {m for m in loaded.state_dict() if "lora_A" in m or "lora_embedding_A" in m}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    if case == "unequal ranks":
        ranks = {m: loaded.state_dict()[m].shape[0] for m in stored}
        assert set(ranks.values()) == {7, 5} and len(config["rank_pattern"]) == 1
        (other,) = (m for m, rank in ranks.items() if rank == 5)
        assert "layers.1.self_attn.q_proj" in other


@pytest.mark.parametrize("name", ["vit", "gpt_neox"])
def test_names_at_runtime_need_no_mapping(tmp_path, name):
    """Without the base, names in its files that differ from those at runtime do not matter."""
    model, how = family(name), {"target_modules": RENAMED[name]["target_modules"]}
    trained = [adapted(model, seed, **how) for seed in (1, 2)]
    for i, one in enumerate(trained):
        one.save_pretrained(tmp_path / f"a{i}")
    paths = ["--no-base", tmp_path / "a0", tmp_path / "a1", "--as-adapter"]
    assert merge(paths, tmp_path / "out") == 0
    base = {key: value.numpy() for key, value in model.state_dict().items()}
    tuned, weights = [unloaded(one) for one in trained], applied(model, tmp_path / "out")[1]
    for key, value in weights.items():
        # The expected update is computed from weights that PEFT rounded to float32.
        assert_close(value, merged(base[key], [x[key] for x in tuned]), key, 1e-5)
    assert any(not np.array_equal(value, base[key]) for key, value in weights.items())


def test_peft_opens_a_truncated_adapter(tmp_path):
    model = family("llama")
    for i in range(2):
        adapted(model, i).save_pretrained(tmp_path / f"a{i}")
    paths = ["--no-base", tmp_path / "a0", tmp_path / "a1", "--as-adapter"]
    assert merge(paths, tmp_path / "exact") == 0
    assert merge(paths, tmp_path / "out", "--rank", "3") == 0
    rows = json.loads((tmp_path / "out" / "merge_report.json").read_text())["units"]
    base = {name: value.numpy() for name, value in model.state_dict().items()}
    exact, cut = (applied(model, tmp_path / name)[1] for name in ("exact", "out"))
    for row in rows:
        update, low = (x[row["name"]] - base[row["name"]] for x in (exact, cut))
        error = np.linalg.norm(low - update) / np.linalg.norm(update)
        assert row["truncation_error"] == pytest.approx(error, abs=1e-5) and row["rank"] == 3
