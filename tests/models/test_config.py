"""Configs: read and write Hugging Face's keys, defaults, errors."""

from __future__ import annotations

import json

import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.model import config_from_dict
from tests.models import small


def test_round_trip_through_json():
    config = small.config(hidden_act="gelu")
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_absent_keys_take_hugging_faces_defaults():
    from transformers import CLIPConfig as Reference

    ours, theirs = CLIPConfig.from_dict({"model_type": "clip"}), Reference()
    assert ours.projection_dim == theirs.projection_dim
    assert ours.logit_scale_init_value == theirs.logit_scale_init_value
    for tower in ("text", "vision"):
        mine = ours.to_dict()[f"{tower}_config"]
        reference = getattr(theirs, f"{tower}_config").to_dict()
        assert {key: reference[key] for key in mine} == mine


def test_older_dictionaries_replace_newer_ones_as_in_transformers():
    from transformers import CLIPConfig as Reference

    raw = {
        "model_type": "clip",
        "text_config": {"hidden_size": 64, "eos_token_id": 2},
        "text_config_dict": {"hidden_size": 128},
        "vision_config": {"hidden_size": 96},
        "vision_config_dict": None,
    }
    ours, theirs = CLIPConfig.from_dict(raw), Reference(**raw)
    assert (ours.text.hidden_size, ours.text.eos_token_id) == (128, 49407)
    assert ours.text.hidden_size == theirs.text_config.hidden_size
    assert ours.text.eos_token_id == theirs.text_config.eos_token_id
    assert ours.vision.hidden_size == theirs.vision_config.hidden_size == 96


# Keys that transformers 4 wrote into the config of each tower, from published CLIPs.
GENERATION = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "attention_dropout": 0.0,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "do_sample": False,
    "dropout": 0.0,
    "early_stopping": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "is_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "num_beams": 1,
    "projection_dim": 512,
    "pruned_heads": {},
    "return_dict": True,
    "tie_word_embeddings": True,
    "torch_dtype": None,
    "transformers_version": "4.16.0.dev0",
    "use_bfloat16": False,
}
OPENAI_B32 = {
    "_name_or_path": "openai/clip-vit-base-patch32",
    "architectures": ["CLIPModel"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 512,
    "text_config": {
        **GENERATION,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "hidden_act": "quick_gelu",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
        "vocab_size": 49408,
    },
    "text_config_dict": None,
    "torch_dtype": "float32",
    "transformers_version": None,
    "vision_config": {
        **GENERATION,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "image_size": 224,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "patch_size": 32,
    },
    "vision_config_dict": None,
}
# With the older dictionaries in addition to the newer ones, gelu, and pooling at the first EOS.
GELU_L14 = {
    **OPENAI_B32,
    "projection_dim": 768,
    "text_config": {**GENERATION, "hidden_act": "gelu", "hidden_size": 768},
    "text_config_dict": {
        "eos_token_id": 49407,
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "vision_config": {**GENERATION, "hidden_act": "gelu", "hidden_size": 1024},
    "vision_config_dict": {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
}


@pytest.mark.parametrize("raw", [OPENAI_B32, GELU_L14], ids=["openai", "gelu"])
def test_configs_as_the_hub_has_them(raw):
    from transformers import CLIPConfig as Reference

    ours, theirs = CLIPConfig.from_dict(json.loads(json.dumps(raw))), Reference(**raw)
    assert ours.projection_dim == theirs.projection_dim == raw["projection_dim"]
    for tower in ("text", "vision"):
        mine = ours.to_dict()[f"{tower}_config"]
        reference = getattr(theirs, f"{tower}_config").to_dict()
        del mine["projection_dim"], mine["model_type"]
        assert {key: reference[key] for key in mine} == mine
    assert ours.text.pools_at_highest_id and ours.text.eos_token_id in (2, 49407)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip2"}, "model_type .*'siglip2'.*NaFlex"),
        ({"model_type": "clip_vision_model"}, "model_type .*'clip_vision_model'.* complete"),
        ({"model_type": "swin"}, "model_type .*'swin'.*siglip.*dinov2.*resnet"),
        ({"text_config": [1]}, "text_config .*dictionary"),
        ({"text_config": {"hidden_size": "96"}}, "hidden_size .*int.*'96'"),
        ({"text_config": {"eos_token_id": True}}, "eos_token_id .*int.*True"),
        ({"text_config": {"num_attention_heads": 7}}, "512 .*num_attention"),
        ({"vision_config": {"image_size": 225}}, "225 .*patch_size 32"),
        ({"vision_config": {"num_hidden_layers": 0}}, "num_hidden_layers .* 0"),
        ({"vision_config": {"hidden_act": "silu"}}, "'silu'.*quick_gelu"),
        ({"vision_config": {"hidden_size": 2**31}}, "hidden_size .*2147483648"),
        ({"vision_config": {"layer_norm_eps": float("nan")}}, "layer_norm_eps .*nan"),
        ({"text_config": {"layer_norm_eps": float("inf")}}, "layer_norm_eps .*inf"),
        ({"projection_dim": -1}, "projection_dim .*-1"),
        ({"projection_dim": 2**31}, "projection_dim .*2147483648"),
        ({"logit_scale_init_value": float("nan")}, "logit_scale_init_value .*nan"),
    ],
)
def test_errors(change, message):
    with pytest.raises(UserError, match=message):
        config_from_dict({"model_type": "clip", **change})
