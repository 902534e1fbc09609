"""Checkpoint formats: names and shapes of the originals; conversions keep every bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io, formats
from modelstock_jax.models.checkpoint import param_shapes
from modelstock_jax.models.clip import CLIPConfig
from modelstock_jax.models.formats import infer
from modelstock_jax.models.open_clip_format import read_model, write_model
from tests.models import small
from tests.models.all_formats import CHECKPOINT, CONFIG, with_head, with_tokenizer

FILES = {
    "hugging_face": "model.safetensors",
    "open_clip": "open_clip_model.safetensors",
    "openai": "model.safetensors",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One directory per format."""
    root = tmp_path_factory.mktemp("formats")
    return {name: checkpoint_io.save(root / name, CHECKPOINT, format=name) for name in FILES}


def tensors_of(directory):
    return load_file(directory / FILES[directory.name])


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)


@pytest.mark.parametrize("name", FILES)
def test_save_load_save_is_bit_for_bit(saved, tmp_path, name):
    once = checkpoint_io.load(saved[name])
    assert_same(once.params, CHECKPOINT.params)
    assert once.format == name and once.preprocessor == CHECKPOINT.preprocessor
    again = checkpoint_io.save(tmp_path / name, once, format=name)
    files = sorted(p.name for p in again.iterdir())
    assert files == sorted(p.name for p in saved[name].iterdir())
    for file in files:
        assert (again / file).read_bytes() == (saved[name] / file).read_bytes(), file
    assert checkpoint_io.load(again).checksum == CHECKPOINT.checksum


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(FILES, 2)))
def test_every_format_converts_to_every_other(saved, tmp_path, source, target):
    moved = checkpoint_io.save(tmp_path / target, checkpoint_io.load(saved[source]), format=target)
    ours, expected = tensors_of(moved), tensors_of(saved[target])
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].tobytes() == value.tobytes(), name
    config = checkpoint_io.load(moved).config
    assert config.vision == CONFIG.vision
    # In all formats texts end at the highest id, expressed in two ways.
    ids = {"eos_token_id": 59, "pad_token_id": None, "bos_token_id": None}
    assert config.text.pools_at_highest_id
    assert dataclasses.replace(config.text, **ids) == CONFIG.text


def test_openais_names_and_orientations(saved):
    tensors, params = tensors_of(saved["openai"]), CHECKPOINT.params
    block = params["image_tower"]["blocks"]["block_01"]
    name = "visual.transformer.resblocks.1"
    joined = [block["self_attn"][f"{x}_proj"] for x in "qkv"]
    words = params["text_tower"]["blocks"]["block_00"]
    expected = {
        f"{name}.attn.in_proj_weight": np.concatenate([x["kernel"].T for x in joined]),
        f"{name}.attn.in_proj_bias": np.concatenate([x["bias"] for x in joined]),
        f"{name}.attn.out_proj.weight": block["self_attn"]["out_proj"]["kernel"].T,
        f"{name}.ln_1.weight": block["layer_norm1"]["scale"],
        f"{name}.ln_2.bias": block["layer_norm2"]["bias"],
        f"{name}.mlp.c_fc.weight": block["mlp"]["fc1"]["kernel"].T,
        f"{name}.mlp.c_proj.bias": block["mlp"]["fc2"]["bias"],
        "transformer.resblocks.0.mlp.c_proj.weight": words["mlp"]["fc2"]["kernel"].T,
        "visual.class_embedding": params["image_tower"]["class_embedding"],
        "visual.positional_embedding": params["image_tower"]["position_embedding"],
        "visual.ln_pre.weight": params["image_tower"]["pre_layernorm"]["scale"],
        "visual.ln_post.bias": params["image_tower"]["post_layernorm"]["bias"],
        # Multiplied from the right, so stored as [in, out].
        "visual.proj": params["image_tower"]["projection"]["kernel"],
        "text_projection": params["text_tower"]["projection"]["kernel"],
        "token_embedding.weight": params["text_tower"]["token_embedding"],
        "positional_embedding": params["text_tower"]["position_embedding"],
        "ln_final.weight": params["text_tower"]["final_layernorm"]["scale"],
        "logit_scale": params["logit_scale"],
    }
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key], value, err_msg=key)
    kernel = params["image_tower"]["patch_embedding"]["kernel"]
    assert tensors["visual.conv1.weight"].shape == (128, 3, 4, 4)
    assert tensors["visual.conv1.weight"][5, 2, 1, 3] == kernel[(1 * 4 + 3) * 3 + 2, 5]
    assert tensors.keys() == tensors_of(saved["open_clip"]).keys()


# As in the published state dicts; q, k and v are joined.
B32 = {
    "visual.conv1.weight": (768, 3, 32, 32),
    "visual.positional_embedding": (50, 768),
    "visual.proj": (768, 512),
    "visual.transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": (3072, 768),
    "transformer.resblocks.11.attn.in_proj_bias": (1536,),
    "transformer.resblocks.3.mlp.c_proj.weight": (512, 2048),
    "token_embedding.weight": (49408, 512),
    "positional_embedding": (77, 512),
    "text_projection": (512, 512),
    "logit_scale": (),
}


def test_sizes_are_inferred_from_the_shapes_of_vit_b_32():
    config = CLIPConfig()
    shapes = param_shapes(config)
    named = {row.name: row.shape(shapes) for row in config.rows("openai")}
    assert {name: named[name] for name in B32} == B32
    assert sum(name.startswith("visual.") for name in named) == 152 and len(named) == 302
    told = infer(named)
    assert told.vision == config.vision and told.projection_dim == config.projection_dim
    assert dataclasses.replace(told.text, eos_token_id=49407) == config.text


def test_openais_half_precision_and_scalars(saved, tmp_path):
    tensors = {k: v.astype(np.float16) for k, v in tensors_of(saved["openai"]).items()}
    scalars = {k: np.array(7) for k in ("input_resolution", "context_length", "vocab_size")}
    save_file({**tensors, **scalars}, tmp_path / "ViT.safetensors")
    for path in (tmp_path, tmp_path / "ViT.safetensors"):
        loaded = checkpoint_io.load(path)
        half = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), CHECKPOINT.params)
        assert_same(loaded.params, half)
        assert loaded.format == "openai" and loaded.config.vision == CONFIG.vision
    assert loaded.directory is None
    save_file({**tensors, "vocabulary": np.array(7)}, tmp_path / "ViT.safetensors")
    with pytest.raises(UserError, match=r"unused: vocabulary \[\]"):
        checkpoint_io.load(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_every_format_lists_all_tensors_that_do_not_match(saved, tmp_path, name):
    directory = shutil.copytree(saved[name], tmp_path / name)
    path = directory / FILES[name]
    tensors = load_file(path)
    names = {row.path[0]: row.name for row in CONFIG.rows(formats.WRITABLE[name].column)}

    def of(*path):
        return names[("image_tower", "blocks", "block_01", *path)]

    missing, misshapen = of("mlp", "fc1", "kernel"), of("mlp", "fc2", "bias")
    unfinished, whole = of("self_attn", "q_proj", "kernel"), of("layer_norm1", "scale")
    del tensors[missing]
    tensors[misshapen] = np.zeros(7, np.float32)
    tensors[unfinished] = tensors[unfinished].copy()
    tensors[unfinished][3, 4] = np.nan
    tensors[whole] = tensors[whole].astype(np.int32)
    save_file({**tensors, "extra": np.zeros((2, 3), np.float32)}, path)
    with pytest.raises(UserError) as error:
        checkpoint_io.load(directory)
    for part in (
        f"missing: {missing} [512, 128]",
        f"misshapen: {misshapen} ",
        f"finite: {unfinished}",
        f"floating-point: {whole} ",
        "unused: extra [2, 3]",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{FILES[name]}: "):
        checkpoint_io.load(directory)
    path.rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: .*pickle"):
        checkpoint_io.load(directory)


@pytest.mark.parametrize("name", FILES)
def test_every_format_saves_head_labels_and_tokenizer(tmp_path, name):
    tuned = with_head(with_tokenizer(tmp_path / "tokenizer"))
    loaded = checkpoint_io.load(checkpoint_io.save(tmp_path / "m", tuned, format=name))
    assert_same(loaded.replica(), tuned.replica())
    assert loaded.labels == ("crane", "gull é", "crane")
    assert loaded.checksum == tuned.checksum
    assert checkpoint_io.has_tokenizer(loaded)
    # Equal models give bitwise identical files.
    again = checkpoint_io.save(tmp_path / "again", loaded, format=name)
    for path in (tmp_path / "m").iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    if name != "hugging_face":
        (tmp_path / "m" / "labels.json").write_text('["crane"]')
        with pytest.raises(UserError, match="head .*3 classes.* 1 labels"):
            checkpoint_io.load(tmp_path / "m")
        (tmp_path / "m" / "labels.json").write_text('{"0": "crane"}')
        with pytest.raises(UserError, match="labels.json: .*list"):
            checkpoint_io.load(tmp_path / "m")


def test_which_of_several_formats_is_chosen(saved, tmp_path):
    both = shutil.copytree(saved["hugging_face"], tmp_path / "both")
    shutil.copytree(saved["open_clip"], both, dirs_exist_ok=True)
    assert checkpoint_io.load(both).format == "hugging_face"
    assert checkpoint_io.load(both, format="open_clip").format == "open_clip"
    # The first format has only a pickle; the second is complete.
    (both / "model.safetensors").rename(both / "pytorch_model.bin")
    assert checkpoint_io.load(both).format == "open_clip"
    with pytest.raises(UserError, match="model.safetensors, .*open_clip_model"):
        checkpoint_io.load(both, format="hugging_face")
    other = tmp_path / "pickled"
    other.mkdir()
    shutil.copy(both / "config.json", other)
    shutil.copy(both / "pytorch_model.bin", other)
    with pytest.raises(UserError, match="pytorch_model.bin: .*pickle"):
        checkpoint_io.load(other)
    # timm's config is not a Hugging Face config.
    (both / "config.json").write_text(json.dumps({"architecture": "vit_base_patch32_clip_224"}))
    shutil.copy(saved["hugging_face"] / "model.safetensors", both)
    assert checkpoint_io.load(both).format == "open_clip"
    (both / "config.json").write_text("5")
    assert checkpoint_io.load(both).format == "open_clip"
    # OpenCLIP's other file name.
    shutil.copy(both / "open_clip_model.safetensors", both / "model.safetensors")
    (both / "open_clip_model.safetensors").unlink()
    assert checkpoint_io.load(both).format == "open_clip"
    with pytest.raises(UserError, match="'clip'.*hugging_face,"):
        checkpoint_io.load(both, format="clip")
    with pytest.raises(UserError, match="'model_soups'.*hugging_face,"):
        checkpoint_io.save(tmp_path / "m", CHECKPOINT, format="model_soups")


def test_what_is_fetched_from_a_hub(saved, tmp_path, monkeypatch):
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    shutil.copytree(saved["hugging_face"], hub)
    shutil.copytree(saved["open_clip"], hub, dirs_exist_ok=True)
    cache.mkdir()

    def resolve(name, patterns):
        assert name == "org/model"
        for path in (p for pattern in patterns for p in hub.glob(pattern)):
            shutil.copy(path, cache)
        return cache

    monkeypatch.setattr(checkpoint_io, "resolve", resolve)
    assert checkpoint_io.load("org/model").format == "hugging_face"
    # Weights of the other format are not downloaded.
    assert sorted(p.name for p in cache.glob("*.safetensors")) == ["model.safetensors"]
    for path in (hub / "model.safetensors", hub / "open_clip_model.safetensors"):
        path.unlink()
    shutil.rmtree(cache)
    cache.mkdir()
    with pytest.raises(UserError, match=r"org/model: .*model\*.safetensors.*@refs"):
        checkpoint_io.load("org/model")


# From open_clip's model_configs, without whitespace.
PUBLISHED = {
    "ViT-B-32": (False, 512, (224, 12, 768, 32), (512, 8, 12)),
    "ViT-B-32-quickgelu": (True, 512, (224, 12, 768, 32), (512, 8, 12)),
    "ViT-B-16": (False, 512, (224, 12, 768, 16), (512, 8, 12)),
    "ViT-L-14": (False, 768, (224, 24, 1024, 14), (768, 12, 12)),
    "ViT-L-14-336-quickgelu": (True, 768, (336, 24, 1024, 14), (768, 12, 12)),
}


@pytest.mark.parametrize(("quick", "dim", "image", "text"), PUBLISHED.values(), ids=PUBLISHED)
def test_open_clips_published_configs(quick, dim, image, text):
    model = {
        "embed_dim": dim,
        **({"quick_gelu": True} if quick else {}),
        "vision_cfg": dict(
            zip(("image_size", "layers", "width", "patch_size"), image, strict=True)
        ),
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            **dict(zip(("width", "heads", "layers"), text, strict=True)),
        },
    }
    config = read_model(model)
    assert config.vision.num_attention_heads == image[2] // 64
    assert config.vision.intermediate_size == 4 * image[2]
    assert config.text.hidden_act == ("quick_gelu" if quick else "gelu")
    assert write_model(config) == model


def test_open_clips_other_sizes_come_back():
    # bigG's published ratio is rounded, so the product is not an integer.
    model = {
        "embed_dim": 1280,
        "vision_cfg": {"width": 1664, "head_width": 104, "mlp_ratio": 4.9231, "layers": 48},
        "text_cfg": {"pool_type": "eos", "eos_id": 1, "norm_kwargs": {"eps": 1e-6}},
    }
    config = read_model(model)
    assert (config.vision.intermediate_size, config.vision.num_attention_heads) == (8192, 16)
    assert (config.text.eos_token_id, config.text.layer_norm_eps) == (1, 1e-6)
    assert read_model(write_model(config)) == config
    for inner in range(1, 200):
        vision = dataclasses.replace(CONFIG.vision, hidden_size=98, intermediate_size=inner)
        sizes = dataclasses.replace(CONFIG, vision=vision)
        assert read_model(write_model(sizes)).vision.intermediate_size == inner


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_cfg", {"timm_model_name": "convnext_base"}, "vision_cfg.timm_model_name = 'conv"),
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool = True"),
        ("vision_cfg", {"no_ln_pre": True}, "vision_cfg.no_ln_pre = True"),
        ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value = 0.1"),
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type = 'avg'"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "vision_cfg.layers .*ResNet"),
        ("vision_cfg", {"new_idea": 1}, "vision_cfg.new_idea = 1"),
        ("vision_cfg", {"width": "768"}, "vision_cfg.width .*integer.*'768'"),
        ("vision_cfg", {"mlp_ratio": -1}, "vision_cfg.mlp_ratio .*-1"),
        ("vision_cfg", {"mlp_ratio": float("inf")}, "vision_cfg.mlp_ratio .*inf"),
        ("vision_cfg", {"width": 10**400}, "vision_cfg.width .*integer"),
        ("text_cfg", {"norm_kwargs": {"eps": float("nan")}}, "norm_kwargs.eps .*nan"),
        ("vision_cfg", {"norm_kwargs": {"bias": 0}}, "vision_cfg.norm_kwargs.eps .*number"),
        ("vision_cfg", {"image_size": [12, 16]}, r"image_size .*integer.*\["),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name = 'roberta-base'"),
        ("text_cfg", {"embed_cls": True}, "text_cfg.embed_cls = True"),
        ("text_cfg", {"pool_type": "last"}, "pool_type .*'last'"),
        ("text_cfg", {"pool_type": "eos"}, "'eos' .*eos_id 2"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "x"}}, "text_cfg.tokenizer_kwargs"),
        ("model_cfg", {"custom_text": True}, "model_cfg.custom_text = True"),
        ("model_cfg", {"init_logit_bias": -10}, "model_cfg.init_logit_bias = -10"),
        ("model_cfg", {"multimodal_cfg": {"width": 1}}, "model_cfg.multimodal_cfg"),
        ("model_cfg", {"quick_gelu": "yes"}, "quick_gelu .*'yes'"),
        ("model_cfg", {"embed_dim": None}, "embed_dim .*None"),
        ("model_cfg", {"text_cfg": None}, "text_cfg .*dictionary"),
        ("preprocess_cfg", {"resize_mode": "squash"}, "preprocess_cfg.resize_mode = 'squash'"),
        ("preprocess_cfg", {"interpolation": "bilinear"}, "interpolation = 'bilinear'"),
        ("preprocess_cfg", {"mean": [0.5]}, "mean .* 3 values"),
        ("preprocess_cfg", {"mean": [0.5, float("nan"), 0.5]}, "mean .* and std "),
        ("preprocess_cfg", {"std": "0.5"}, "mean and std .*lists"),
    ],
)
def test_unsupported_open_clip_keys(saved, tmp_path, part, change, message):
    directory = shutil.copytree(saved["open_clip"], tmp_path / "copy")
    path = directory / "open_clip_config.json"
    raw = json.loads(path.read_text())
    {**raw, **raw["model_cfg"]}[part].update(change)
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"open_clip_config.json: .*{message}"):
        checkpoint_io.load(directory)


def test_a_resnet_is_an_error(tmp_path):
    save_file({"visual.layer1.0.conv1.weight": np.zeros(2)}, tmp_path / "RN50.safetensors")
    with pytest.raises(UserError, match="ResNet .*visual.layer1"):
        checkpoint_io.load(tmp_path)


def test_openai_format_rejects_models_that_its_readers_would_misread(tmp_path):
    vision = {"hidden_act": "gelu", "num_attention_heads": 4}
    text = {"layer_norm_eps": 1e-6, "intermediate_size": 32, "eos_token_id": 7}
    config = small.replaced(small.replaced(CONFIG, "vision", **vision), "text", **text)
    pixels = dataclasses.replace(CHECKPOINT.preprocessor, mean=(0.5, 0.5, 0.5))
    other = dataclasses.replace(CHECKPOINT, config=config, preprocessor=pixels)
    with pytest.raises(UserError) as error:
        checkpoint_io.save(tmp_path / "m", other, format="openai")
    for part in (
        "OpenAI",
        "vision num_attention_heads .*4.* 2",
        "vision hidden_act .*'gelu'.*'quick_gelu'",
        "text intermediate_size .*32.* 256",
        "text layer_norm_eps .*1e-06.* 1e-05",
        "text eos_token_id 7 ",
        r"mean \(0.5, 0.5, 0.5\)",
    ):
        assert re.search(part, str(error.value))
    narrow = dataclasses.replace(CHECKPOINT, config=small.replaced(CONFIG, "text", hidden_size=32))
    with pytest.raises(UserError, match="OpenAI.*num_attention_heads .* 0"):
        checkpoint_io.save(tmp_path / "m", narrow, format="openai")
    assert list(tmp_path.iterdir()) == []


def test_open_clip_rejects_models_that_it_cannot_represent(tmp_path):
    for tower, change, message in (
        ("text", {"hidden_act": "gelu"}, "activation"),
        ("vision", {"num_channels": 4}, "3 channels.* 4"),
    ):
        other = dataclasses.replace(CHECKPOINT, config=small.replaced(CONFIG, tower, **change))
        with pytest.raises(UserError, match=message):
            checkpoint_io.save(tmp_path / "m", other, format="open_clip")
    # An end-of-text token that is not the highest id is stored.
    other = dataclasses.replace(CHECKPOINT, config=small.replaced(CONFIG, "text", eos_token_id=7))
    assert (
        checkpoint_io.load(
            checkpoint_io.save(tmp_path / "m", other, format="open_clip")
        ).config.text.eos_token_id
        == 7
    )
