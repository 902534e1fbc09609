"""Configs that disagree are an error; differences of two training runs of one model are not."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.hf_config import disagreements, updated
from tests.checkpoint_merge.typed import load, tensors, trio, write

TIED = "tie_word_embeddings"

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "vocab_size": 12,
    "torch_dtype": "float32",
    "transformers_version": "4.44.0",
}

# Keys that change a forward pass, each with two values.
GRAVE = {
    "rope_theta": (1e6, 1e4),
    "hidden_act": ("silu", "gelu"),
    "num_attention_heads": (4, 8),
    "num_key_value_heads": (2, 4),
    "head_dim": (2, 4),
    "rms_norm_eps": (1e-6, 1e-5),
    "num_experts_per_tok": (2, 4),
    "num_experts_per_token": (2, 4),
    "moe_top_k": (1, 2),
    "num_selected_experts": (1, 2),
    "norm_topk_prob": (True, False),
    "scoring_func": ("a", "b"),
    "sliding_window": (4096, None),
    "max_position_embeddings": (4096, 8192),
    "rope_scaling": ({"rope_type": "linear", "factor": 2.0}, None),
    "partial_rotary_factor": (0.5, 1.0),
    "attn_logit_softcapping": (50.0, None),
    "query_pre_attn_scalar": (224, 256),
    "tie_encoder_decoder": (True, False),
    "is_decoder": (True, False),
    "position_embedding_type": ("absolute", "relative_key"),
    "scale_embedding": (True, False),
    "feed_forward_proj": ("relu", "gated-gelu"),
    "relative_attention_num_buckets": (32, 64),
    "num_mel_bins": (80, 128),
    "image_size": (224, 336),
    "layer_norm_eps": (1e-12, 1e-5),
    "qkv_bias": (True, False),
    "layer_types": (["a"], ["b"]),
    "_class_name": ("UNet2DModel", "UNet2DConditionModel"),
    "sample_size": (32, 64),
    "attention_head_dim": (8, [5, 10]),
    "prediction_type": ("epsilon", "v_prediction"),
    "pooling_mode_mean_tokens": (True, False),
    "summary_type": ("cls_index", "last"),
    "width_coefficient": (1.0, 1.1),
    "depth_coefficient": (1.0, 1.1),
    "tokens_to_drop": (0, 4),
    "attn_decay_coefficient": (0.9, 0.99),
    "tokens_drop": (0, 4),
    "moe.top_k": (1, 2),
    "moe_config.top_k": (1, 2),
    "ffn.max_length": (1, 2),
}
# Keys that may differ between training runs of one model.
HARMLESS = {
    "_name_or_path": ("a", "b"),
    "name_or_path": ("a", "b"),
    "model_name": ("a", "b"),
    "_commit_hash": ("a", "b"),
    "transformers_version": ("4.44.0", "5.1.0"),
    "_diffusers_version": ("0.30", "0.38"),
    "unsloth_version": ("1", "2"),
    "unsloth_fixed": (True, False),
    "adapter_transformers_version": ("1", "2"),
    "architectures": (["LlamaModel"], ["LlamaForCausalLM"]),
    "id2label": ({"0": "a"}, {"0": "b"}),
    "label2id": ({"a": 1}, {"b": 1}),
    "num_labels": (2, 3),
    "problem_type": ("regression", "single_label_classification"),
    "finetuning_task": ("a", "b"),
    "num_classes": (10, 1000),
    "label_names": (["a"], ["b"]),
    "pretrained_cfg": ({"tag": "a"}, {"tag": "b"}),
    "torch_dtype": ("float32", "bfloat16"),
    "dtype": ("float32", "torch.bfloat16"),
    "use_cache": (True, False),
    "cache_implementation": ("hybrid", "static"),
    "_attn_implementation": ("eager", "sdpa"),
    "attn_implementation": ("eager", "sdpa"),
    "_attn_implementation_autoset": (True, False),
    "attn_impl": ("torch", "flash"),
    "use_flash_attn": (True, False),
    "_flash_attn_2_enabled": (True, False),
    "attention_dropout": (0.0, 0.1),
    "hidden_dropout_prob": (0.0, 0.1),
    "dropout": (0.0, 0.1),
    "dropout_rate": (0.0, 0.1),
    "resid_pdrop": (0.0, 0.1),
    "classifier_dropout": (None, 0.1),
    "drop_path_rate": (0.0, 0.1),
    "attn_drop": (0.0, 0.1),
    "eos_coefficient": (0.1, 0.2),
    "class_loss_coefficient": (1, 2),
    "bbox_cost": (1, 2),
    "encoder_layerdrop": (0.0, 0.1),
    "patch_dropout": (0.0, 0.5),
    "mask_time_prob": (0.0, 0.1),
    "mask_channel_length": (10, 5),
    "apply_spec_augment": (True, 0),
    "initializer_range": (0.02, 0.01),
    "init_std": (0.02, 0.1),
    "logit_scale_init_value": (2.6, 1),
    "gradient_checkpointing": (True, False),
    "gradient_checkpointing_kwargs": ({"a": 1}, {"a": 2}),
    "router_aux_loss_coef": (0.001, 0.02),
    "aux_loss_alpha": (0.1, 0.2),
    "ctc_loss_reduction": ("sum", "mean"),
    "label_smoothing": (0.0, 0.1),
    "router_jitter_noise": (0.0, 0.1),
    "output_router_logits": (True, False),
    "output_hidden_states": (True, False),
    "return_dict": (True, False),
    "pretraining_tp": (1, 2),
    "tie_word_embeddings": (True, False),
    "quantization_config": ({"bits": 4}, {"bits": 8}),
    "mm_projector_lr": (1e-5, 1e-4),
    "tune_mm_mlp_adapter": (True, False),
    "freeze_mm_mlp_adapter": (True, False),
    "tokenizer_padding_side": ("left", "right"),
    "optimization_step": (10, 20),
}
# transformers 4's config.json -> what transformers 5.24 saves after reading it.
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
_LONG = {"long_factor": [1.0, 1.5], "short_factor": [1.0, 1.0]}
SPELLINGS = {
    "llama": (
        {"rope_theta": 5e5, "torch_dtype": "bfloat16", "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "bfloat16"},
    ),
    "llama 3.1": (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
    ),
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
    ),
    "type and rope_type": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
    ),
    "qwen 2.5": (
        {"sliding_window": 32768, "max_window_layers": 21, "use_sliding_window": False},
        {
            "sliding_window": None,
            "max_window_layers": 28,
            "use_sliding_window": False,
            "layer_types": ["full_attention"],
        },
    ),
    "qwen 3 yarn": (
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **_YARN}},
        {"rope_parameters": {"rope_theta": 1000000, "rope_type": "yarn", **_YARN}},
    ),
    "qwen 3 moe": ({"num_experts": 128}, {"num_local_experts": 128}),
    "mistral": (
        {"head_dim": None, "hidden_size": 4096, "num_attention_heads": 32},
        {"head_dim": 128, "hidden_size": 4096, "num_attention_heads": 32},
    ),
    "phi": (
        {"num_key_value_heads": None, "num_attention_heads": 32, "partial_rotary_factor": 0.4},
        {
            "num_key_value_heads": 32,
            "num_attention_heads": 32,
            "rope_parameters": {"partial_rotary_factor": 0.4, "rope_type": "default"},
        },
    ),
    "phi 3": (
        {"rope_scaling": {"type": "longrope", **_LONG}, "original_max_position_embeddings": 4096},
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 1.0,
                **_LONG,
                "original_max_position_embeddings": 4096,
            }
        },
    ),
    "phi 3 of 2024": (
        {"rope_scaling": {"type": "su", **_LONG}},
        {"rope_scaling": {"type": "longrope", **_LONG}},
    ),
    "gemma": (
        {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
        {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma 3": (
        {
            "text_config": {
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "sliding_window_pattern": 6,
            }
        },
        {
            "text_config": {
                "rope_parameters": {
                    "full_attention": {"factor": 8.0, "rope_type": "linear", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
                "_sliding_window_pattern": 6,
            }
        },
    ),
    "modernbert": (
        {"global_rope_theta": 160000.0, "local_rope_theta": 1e4},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 160000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "gpt-neox": (
        {"rotary_emb_base": 10000, "rotary_pct": 0.25},
        {
            "rope_parameters": {
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "rope_type": "default",
            }
        },
    ),
    "deberta": ({"pos_att_type": "p2c|c2p"}, {"pos_att_type": ["p2c", "c2p"]}),
    "smollm 3": ({"no_rope_layers": None}, {"no_rope_layers": [1, 1, 1, 0]}),
    "qwen 2 vl": (
        {
            "hidden_size": 8,
            "rope_theta": 1e6,
            "vision_config": {"depth": 2},
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24]},
        },
        {
            "text_config": {
                "hidden_size": 8,
                "rope_parameters": {
                    "rope_theta": 1e6,
                    "rope_type": "default",
                    "mrope_section": [16, 24],
                },
            },
            "vision_config": {"depth": 2, "rope_parameters": {"rope_type": "axial"}},
        },
    ),
    "clip": (
        {"text_config": {"id2label": {"0": "LABEL_0"}, "hidden_act": "quick_gelu"}},
        {"text_config": {"id2label": {"0": "x"}, "hidden_act": "quick_gelu"}},
    ),
    "activations": (
        {"activation_function": "gelu_new", "hidden_act": "swish"},
        {"activation_function": "gelu_pytorch_tanh", "hidden_act": "silu"},
    ),
    "float32 in JSON": ({"layer_norm_eps": 1e-6}, {"layer_norm_eps": 9.999999974752427e-07}),
    "off": ({"sliding_window": None, "tie_encoder_decoder": False}, {"attention_bias": False}),
}


@pytest.mark.parametrize("tower", ["", "text_config.", "vision_config."])
@pytest.mark.parametrize("key", GRAVE)
def test_a_key_that_changes_a_forward_pass(key, tower):
    configs = [
        updated({"text_config": {"a": 1}, "vision_config": {"a": 1}}, {tower + key: value})
        for value in GRAVE[key]
    ]
    configs = [
        config
        if value is not None
        else config
        | ({key: None} if not tower else {tower[:-1]: {**config[tower[:-1]], key: None}})
        for config, value in zip(configs, GRAVE[key], strict=True)
    ]
    found = disagreements(*configs)
    assert found.grave and not found.harmless
    assert all(name.startswith(tower + key) for name in found.grave), found


@pytest.mark.parametrize("tower", ["", "text_config."])
@pytest.mark.parametrize("key", HARMLESS)
def test_a_key_in_which_training_runs_differ(key, tower):
    configs = [{key: value} for value in HARMLESS[key]]
    if tower:
        configs = [{"text_config": config} for config in configs]
    found = disagreements(*configs)
    assert not found.grave and found.harmless


@pytest.mark.parametrize("family", SPELLINGS)
def test_spellings_of_transformers_4_and_5_are_equal(family):
    old, new = SPELLINGS[family]
    for pair in ((old, new), (new, old)):
        found = disagreements(*copy.deepcopy(pair))
        assert not found.grave, found


def test_spellings_do_not_hide_a_difference():
    for family in ("llama", "llama 3.1", "gemma 3", "gpt-neox", "modernbert", "qwen 3 yarn"):
        old, new = SPELLINGS[family]
        changed = json.loads(
            json.dumps(new)
            .replace("5e5", "1e4")
            .replace("500000.0", "10000.0")
            .replace("1000000", "20000")
            .replace("160000.0", "20000.0")
            .replace('"rope_theta": 10000.0', '"rope_theta": 30000.0')
        )
        grave = disagreements(old, changed).grave
        assert any("rope" in key for key in grave), (family, grave)
    # RoPE scaling in only one model is a difference too.
    scaled = {"rope_parameters": {"rope_type": "yarn", **_YARN}}
    assert "rope_scaling.factor" in disagreements({"hidden_size": 8}, scaled).grave


@pytest.mark.parametrize("tower", ["", "text_config."])
@pytest.mark.parametrize(
    ("key", "default", "other", "model"),
    [
        ("rope_theta", 10000, 5e5, "llama"),
        ("rope_theta", 1e6, 1e4, "mixtral"),
        ("rotary_emb_base", 1e4, 1e5, "gpt_neox"),
        ("rope_local_base_freq", 1e4, 2e4, "gemma3_text"),
        ("partial_rotary_factor", 1.0, 0.5, "llama"),
        ("partial_rotary_factor", 0.5, 1.0, "phi"),
        ("rotary_dim", 64, 32, "gptj"),
        ("relative_attention_max_distance", 128, 64, "t5"),
        ("relative_attention_num_buckets", 32, 64, "t5"),
        ("alibi", False, True, "falcon"),
        ("position_embedding_type", "absolute", "relative_key", "bert"),
        ("position_biased_input", True, False, "deberta"),
        ("max_relative_positions", -1, 64, "deberta"),
    ],
)
def test_a_key_of_positions_that_one_config_lacks(tower, key, default, other, model):
    """The library uses its default, so any other value is another model."""
    lacking = updated({"x": 1}, {f"{tower}model_type": model})
    for value in (default, other):
        for pair in (a := (lacking, updated(lacking, {tower + key: value})), a[::-1]):
            assert bool(disagreements(*pair).grave) == (value == other), (pair, value)


def test_positions_in_which_fine_tunes_agree_are_an_error_too(say, tmp_path):
    base = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    paths = trio(tmp_path, {"config.json": base}, {"config.json": base | {"rope_theta": 5e5}})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and re.search("rope_theta .*none.* 500000.0 ", result.err)
    out = tmp_path / "tuned"
    assert say("merge", *paths, "--out", out, "--config-from", "model:1").status == 0
    assert load(out / "config.json")["rope_theta"] == 5e5


def test_older_configs_repeat_the_settings_of_generate_in_each_tower():
    tower = {"num_beams": 1, "do_sample": False, "top_k": 50, "max_length": 20}
    found = disagreements({"text_config": tower | {"a": 1}}, {"text_config": {"a": 1}})
    assert not found.grave and not found.lacking


@pytest.mark.parametrize(
    "towers", [("text_config",), ("",), ("", "text_config"), ("language",), ()]
)
def test_an_untied_head_is_untied_wherever_the_config_ties_it(say, tmp_path, towers):
    def config(tied):
        made = {"model_type": "llava", "text_config": {"model_type": "qwen2"}, "language": {"a": 1}}
        return updated(made, {f"{tower}.{TIED}".lstrip("."): tied for tower in towers})

    paths = trio(tmp_path, {"config.json": config(True)}, {"config.json": config(False)})
    for i, path in enumerate(paths[1:], 1):
        head = {"lm_head.weight": np.random.default_rng(i).standard_normal((12, 8), np.float32)}
        write(path, {"model.safetensors": {**tensors(path), **head}})
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--tied-head", "untie")
    assert result.status == 0, result.err
    written = load(out / "config.json")
    values = [written.get(TIED), written["text_config"].get(TIED), written["language"].get(TIED)]
    assert values == [False, False, False if "language" in towers else None]
    assert not any(TIED in note for note in result.notes)


@pytest.mark.parametrize("prefix", ["", "text_config."])
@pytest.mark.parametrize("tied", [True, False])
def test_the_config_of_a_fine_tune_gets_the_tying_of_the_base(say, tmp_path, tied, prefix):
    """The merged model has a head if BASE has one."""
    base, tuned = (updated({"text_config": {"a": 1}}, {prefix + TIED: x}) for x in (tied, not tied))
    paths = trio(tmp_path, {"config.json": base}, {"config.json": tuned})
    for path in paths:
        found = tensors(path)
        head = found["model.embed_tokens.weight"] if tied else np.ones((12, 8), np.float32)
        if not tied or path is not paths[0]:
            write(path, {"model.safetensors": found | {"lm_head.weight": head}})
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--config-from", "model:1")
    assert result.status == 0, result.err
    assert ("lm_head.weight" in tensors(out)) == (not tied)
    assert load(out / "config.json") == base


def test_every_family_as_transformers_reads_and_saves_it():
    import transformers

    for name in (
        "llama",
        "qwen2",
        "qwen3",
        "qwen2_moe",
        "qwen3_moe",
        "mistral",
        "mixtral",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "phi",
        "phi3",
        "bert",
        "roberta",
        "distilbert",
        "deberta-v2",
        "modernbert",
        "t5",
        "bart",
        "vit",
        "deit",
        "dinov2",
        "swin",
        "convnext",
        "resnet",
        "clip",
        "siglip",
        "whisper",
        "wav2vec2",
        "gpt2",
        "gpt_neox",
        "falcon",
        "opt",
        "qwen2_vl",
        "llava",
        "deepseek_v3",
    ):
        config = transformers.AutoConfig.for_model(name)
        complete = json.loads(json.dumps(config.to_dict(), default=str))
        for other in (config.to_diff_dict(), json.loads(config.to_json_string())):
            found = disagreements(complete, json.loads(json.dumps(other, default=str)))
            assert not found.grave, (name, found.grave)


def test_the_first_differing_element_of_two_long_lists_is_named():
    first = {"rope_scaling": {"long_factor": [1.0] * 40}}
    second = {"rope_scaling": {"long_factor": [1.0] * 39 + [2.0]}}
    assert disagreements(first, second).grave == {"rope_scaling.long_factor[39]": ("1.0", "2.0")}


def test_the_error_names_key_values_and_option_and_the_option_resolves_it(say, tmp_path):
    tuned = LLAMA | {"rope_theta": 1e4}
    paths = trio(tmp_path, {"config.json": LLAMA}, {"config.json": tuned})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and not (tmp_path / "out").exists()
    for part in (
        "config.json: rope_theta ",
        " 1000000.0 ",
        " 10000.0 ",
        str(paths[0]),
        str(paths[1]),
        "--config-from base",
        "--config-from model:1",
    ):
        assert part in result.err, result.err
    for choice, expected in (("base", LLAMA), ("model:1", tuned)):
        out = tmp_path / f"of_{choice}"
        assert say("merge", *paths, "--out", out, "--config-from", choice).status == 0
        assert load(out / "config.json") == expected
    # A comparison writes no config: it prints a note and continues.
    result = say("compare", *paths)
    assert result.status == 0 and any("rope_theta" in note for note in result.notes)


def test_fine_tunes_that_disagree_on_a_key_that_the_base_lacks(say, tmp_path):
    paths = trio(
        tmp_path,
        *(
            {"config.json": LLAMA | more}
            for more in ({}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 2})
        ),
    )
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and re.search("num_experts_per_tok .*1 .* 2 ", result.err)
    assert "--config-from model:2" in result.err and str(paths[0]) not in result.errors[0]


def test_keys_that_describe_tensors_are_not_called_harmless(say, tmp_path):
    base = LLAMA | {"tie_word_embeddings": False, "vocab_size": 12, "use_cache": True}
    tuned = LLAMA | {"tie_word_embeddings": True, "vocab_size": 16, "use_cache": False}
    paths = trio(tmp_path, {"config.json": base}, {"config.json": tuned})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0, result.err
    notes = {key: n for n in result.notes for key in (*base, *tuned) if f" {key} differs in " in n}
    assert notes["tie_word_embeddings"].endswith(" is written, which matches the merged tensors")
    assert notes["vocab_size"].endswith("; the value of base is written")
    assert "which does not change what the model computes; the value" in notes["use_cache"]
    assert not any("computes" in notes[key] for key in ("tie_word_embeddings", "vocab_size"))


def test_harmless_keys_are_one_note(say, tmp_path):
    tuned = LLAMA | {"torch_dtype": "bfloat16", "transformers_version": "5.0", "use_cache": False}
    paths = trio(tmp_path, {"config.json": LLAMA | {"use_cache": True}}, {"config.json": tuned})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0
    (note,) = result.notes
    for part in ("dtype", "transformers_version", "use_cache", str(paths[1]), str(paths[2])):
        assert part in note
    assert load(tmp_path / "out/config.json")["transformers_version"] == "4.44.0"


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ("model:3", "model:3: .*2"),
        ("model:2", "model:2: .*config.json"),
        ("mode:1", "base .*'mode:1'"),
        ("ft1", "base .*'ft1'"),
    ],
)
def test_a_missing_model_or_a_model_without_a_config(say, tmp_path, choice, why):
    paths = trio(tmp_path, {"config.json": LLAMA})
    result = say(
        "merge",
        *paths[:2],
        paths[2] / "model.safetensors",
        "--out",
        tmp_path / "out",
        "--config-from",
        choice,
    )
    assert result.status in (1, 2) and re.search(why, result.err) and result.err.count("\n") == 1


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"layers": 2, "width": 64},
        "text_cfg": {"heads": 8, "hf_tokenizer_name": "a"},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]},
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_cfg.quick_gelu": True}, "model_cfg.quick_gelu"),
        ({"model_cfg.vision_cfg.layers": 3}, "model_cfg.vision_cfg.layers"),
        ({"preprocess_cfg.mean": [0.4, 0.4, 0.4]}, "preprocess_cfg.mean"),
        ({"model_cfg.quick_gelu": False, "model_cfg.vision_cfg.patch_dropout": 0.5}, None),
        ({"model_cfg.text_cfg.hf_tokenizer_name": "b", "model_cfg.init_logit_scale": 4.6}, None),
    ],
)
def test_open_clip(say, tmp_path, changes, named):
    """A key that is missing in an OpenCLIP config is off; quick_gelu changes the activation."""
    name = "open_clip_config.json"
    paths = trio(tmp_path, {name: OPEN_CLIP}, {name: updated(OPEN_CLIP, changes)})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == (named is not None)
    if named:
        assert f"{name}: {named} " in result.err
        out = tmp_path / "tuned"
        assert say("merge", *paths, "--out", out, "--config-from", "model:1").status == 0
        assert load(out / name) == updated(OPEN_CLIP, changes)


def test_the_config_of_a_tower(say, tmp_path):
    base = {"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu", "dropout": 0.0}}
    tuned = {"model_type": "clip", "vision_config": {"hidden_act": "gelu", "dropout": 0.1}}
    paths = trio(tmp_path, {"config.json": base}, {"config.json": tuned})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and re.search('vision_config.hidden_act .*"quick_gelu" ', result.err)
    assert "dropout" not in result.errors[0]


@pytest.mark.parametrize(
    ("file", "base", "tuned", "named"),
    [
        (
            "unet/config.json",
            {"_class_name": "UNet2DModel", "sample_size": 32},
            {"sample_size": 64},
            "unet/config.json: sample_size .*32 .* 64",
        ),
        (
            "unet/config.json",
            {"_class_name": "UNet2DModel", "_diffusers_version": "0.3"},
            {"_diffusers_version": "0.4"},
            None,
        ),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "epsilon"},
            {"prediction_type": "v_prediction"},
            'prediction_type .*"epsilon" ',
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler", "steps_offset": 0},
            {"_class_name": "PNDMScheduler", "steps_offset": 1},
            None,
        ),
    ],
)
def test_a_component_of_a_pipeline(say, tmp_path, file, base, tuned, named):
    index = {
        "_class_name": "P",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    config = {"model_index.json": index}
    paths = trio(
        tmp_path,
        config | {file: base},
        config | {file: base | tuned},
        file="unet/diffusion_pytorch_model.safetensors",
    )
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == (named is not None), result.err
    assert named is None or re.search(named, result.err)
    if named:
        out = tmp_path / "tuned"
        assert say("merge", *paths, "--out", out, "--config-from", "model:1").status == 0
        assert load(out / file) == base | tuned


@pytest.mark.parametrize(
    ("file", "base", "tuned", "status", "named"),
    [
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True},
            {"pooling_mode_mean_tokens": False},
            1,
            "1_Pooling/config.json: pooling_mode_mean_tokens",
        ),
        (
            "modules.json",
            [{"path": "", "type": "sentence_transformers.models.Transformer"}],
            [
                {"path": "", "type": "sentence_transformers.models.Transformer"},
                {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
            ],
            1,
            "modules.json: modules ",
        ),
        (
            "modules.json",
            [{"path": "", "type": "sentence_transformers.models.Transformer"}],
            [{"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}],
            0,
            "",
        ),
        (
            "sentence_bert_config.json",
            {"max_seq_length": 128},
            {"max_seq_length": 256},
            0,
            "sentence_bert_config.json max_seq_length",
        ),
        (
            "config_sentence_transformers.json",
            {"similarity_fn_name": "dot", "__version__": {"a": 1}},
            {"similarity_fn_name": "cosine", "__version__": {"a": 2}},
            0,
            "similarity_fn_name",
        ),
    ],
)
def test_a_sentence_transformer(say, tmp_path, file, base, tuned, status, named):
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    both = {
        "modules.json": modules,
        "config.json": {"model_type": "bert"},
        "1_Pooling/config.json": {},
    }
    paths = trio(tmp_path, both | {file: base}, both | {file: tuned})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == status and named in result.err, result.err
    assert "__version__" not in result.err


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("preprocessor_config.json", lambda x: x),
        ("processor_config.json", lambda x: {"image_processor": x}),
    ],
)
def test_different_image_preprocessing_is_a_note(say, tmp_path, file, wrap):
    base, tuned = {"image_mean": [0.5], "size": 224}, {"image_mean": [0.4], "size": 224}
    paths = trio(tmp_path, {file: wrap(base)}, {file: wrap(tuned)})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 0 and len(result.notes) == 2
    assert "image_mean " in result.notes[0] and "size" not in result.notes[0]


@pytest.mark.parametrize("options", [(), ("--dtype", "bf16")])
def test_a_key_that_the_merge_itself_sets_is_in_no_note(say, tmp_path, options):
    tuned = LLAMA | {"torch_dtype": "bfloat16", "use_cache": False}
    paths = trio(tmp_path, {"config.json": LLAMA | {"use_cache": True}}, {"config.json": tuned})
    (note,) = say("merge", *paths, "--out", tmp_path / "out", *options).notes
    assert "use_cache" in note and ("dtype" in note) == (not options)


def test_a_config_that_is_not_json_is_named(say, tmp_path):
    paths = trio(tmp_path, {"config.json": LLAMA})
    write(paths[1], {"config.json": "{"})
    result = say("merge", *paths, "--out", tmp_path / "out")
    assert result.status == 1 and str(paths[1] / "config.json") in result.err
