"""The config: Hugging Face's keys both ways, its defaults, and what is refused."""

from __future__ import annotations

import json

import pytest

from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.errors import UserError
from tests.clip import small


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


def test_the_older_dictionaries_stand_for_the_newer_as_in_transformers():
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "model_type is 'siglip', not 'clip'"),
        ({"text_config": [1]}, "text_config must be a dictionary"),
        ({"text_config": {"hidden_size": "96"}}, "hidden_size must be int, not '96'"),
        ({"text_config": {"eos_token_id": True}}, "eos_token_id must be int, not True"),
        ({"text_config": {"num_attention_heads": 7}}, "512 is not a multiple of num_attention"),
        ({"vision_config": {"image_size": 225}}, "225 is not a multiple of patch_size 32"),
        ({"vision_config": {"num_hidden_layers": 0}}, "num_hidden_layers must be positive"),
        ({"vision_config": {"hidden_act": "relu"}}, "'relu' is not known; known are quick_gelu"),
        ({"projection_dim": -1}, "projection_dim must be positive"),
    ],
)
def test_refused(change, message):
    with pytest.raises(UserError, match=message):
        CLIPConfig.from_dict({"model_type": "clip", **change})
