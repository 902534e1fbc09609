"""Numbers of attention heads, read from the config for a merge per head."""

from __future__ import annotations

import json

import pytest

from modelstock_jax.checkpoint_merge.hf_config import num_heads, parse_num_heads
from modelstock_jax.errors import UserError

CLIP = ["vision_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.x", "logit_scale"]
OPEN_CLIP = ["visual.transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0.x"]


@pytest.mark.parametrize(("file", "config", "names", "expected"), [
    ("config.json", {"num_attention_heads": 32}, ["model.layers.0.x"], 32),
    ("config.json", {"vision_config": {"num_attention_heads": 12},
                     "text_config": {"num_attention_heads": 8}}, CLIP,
     {"": 8, "vision_model": 12}),
    # transformers leaves out values that equal its defaults.
    ("config.json", {"model_type": "clip", "vision_config": {}, "text_config": {}}, CLIP,
     {"": 8, "vision_model": 12}),
    ("config.json", {"model_type": "siglip", "vision_config": {"num_attention_heads": 16},
                     "text_config": {"model_type": "siglip_text_model"}}, CLIP,
     {"": 12, "vision_model": 16}),
    ("config.json", {"vision_config": {"num_attention_heads": 16},
                     "text_config": {"num_attention_heads": 32}},
     ["model.vision_tower.blocks.0.x", "model.language_model.layers.0.x"],
     {"": 32, "model.vision_tower": 16}),
    ("open_clip_config.json", {"model_cfg": {
        "vision_cfg": {"width": 768}, "text_cfg": {"heads": 8, "width": 512}}}, OPEN_CLIP,
     {"": 8, "visual": 12}),
])  # fmt: skip
def test_heads_from_the_config(tmp_path, file, config, names, expected):
    (tmp_path / file).write_text(json.dumps(config))
    assert num_heads(tmp_path, names) == expected


@pytest.mark.parametrize("config", [{}, {"num_attention_heads": "8"}, [1], {"text_config": 3}])
def test_error_for_unknown_heads_names_the_option(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--num-heads 12"):
        num_heads(tmp_path, CLIP)
    with pytest.raises(UserError, match="'head': .*file .*--num-heads 12"):
        num_heads(None, CLIP)


def test_heads_from_the_option():
    assert parse_num_heads("vision_model=12,text_model=8") == {"vision_model": 12, "text_model": 8}
    for text in ("x", "a=b", "a=1=2"):
        with pytest.raises(UserError, match=f"--num-heads '{text}'"):
            parse_num_heads(text)
