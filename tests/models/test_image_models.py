"""Every kind of model on disk: round trips are bitwise exact; every mistake is one line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.model import MODELS, config_from_dict
from tests.models.small_models import CASES, checkpoint, directory, leaves

FILES = ("model.safetensors", "config.json", "preprocessor_config.json")
# One case of every model_type, with a classifier if the model has one.
BY_TYPE = {case.config.model_type: name for name, case in CASES.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name of a case -> its directory; not to be changed."""
    root = tmp_path_factory.mktemp("models")
    return {name: directory(case, root / str(i)) for i, (name, case) in enumerate(CASES.items())}


@pytest.fixture
def copy(saved, tmp_path):
    """Name of a case -> a directory that a test may change."""
    return lambda name: shutil.copytree(saved[name], tmp_path / "copy", dirs_exist_ok=True)


def edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_config(path, file="config.json", **values):
    """Replace entries, and those of the sections of a dual encoder."""
    raw = json.loads((path / file).read_text())
    for key, value in values.items():
        section = key.endswith("_config") and isinstance(value, dict)
        raw[key] = {**raw[key], **value} if section else value
    (path / file).write_text(json.dumps(raw))


def message(path) -> str:
    """The error of a directory: one line that starts with its path."""
    with pytest.raises(UserError) as error:
        checkpoint_io.load(path)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and not re.search(r"[^.]\.$", text)
    return text


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        assert (leaf.shape, leaf.tobytes()) == (b[name].shape, b[name].tobytes()), name


def test_every_model_is_here():
    assert BY_TYPE.keys() == MODELS.keys()


@pytest.mark.parametrize("name", CASES)
def test_save_and_load_are_bit_for_bit(saved, tmp_path, name):
    expected, once = checkpoint(CASES[name]), checkpoint_io.load(saved[name])
    assert_same(once.params, expected.params)
    assert_same(once.head or {}, expected.head or {})
    assert (once.config, once.preprocessor) == (expected.config, expected.preprocessor)
    assert (once.labels, once.checksum) == (expected.labels, expected.checksum)
    again = checkpoint_io.save(tmp_path / "again", once)
    for file in FILES:
        assert (again / file).read_bytes() == (saved[name] / file).read_bytes()
    assert sorted(file.name for file in again.iterdir()) == sorted(FILES)


# Some names of transformers' released files -> our leaf, transposed where it is a kernel.
NAMES = {
    "siglip": {
        "vision_model.head.attention.in_proj_weight": "image_tower.pool.in_proj.kernel",
        "text_model.head.bias": "text_tower.projection.bias",
        "vision_model.encoder.layers.1.mlp.fc1.weight": (
            "image_tower.blocks.block_01.mlp.fc1.kernel"
        ),
    },
    "vit": {
        "encoder.layer.1.attention.attention.key.weight": (
            "image_tower.blocks.block_01.self_attn.k_proj.kernel"
        ),
        "pooler.dense.bias": "pooler.bias",
        "layernorm.weight": "image_tower.post_layernorm.scale",
    },
    "deit, two classifiers": {
        "distillation_classifier.weight": "head.distillation.kernel",
        "deit.encoder.layer.0.intermediate.dense.bias": (
            "image_tower.blocks.block_00.mlp.fc1.bias"
        ),
    },
    "dinov2, SwiGLU, classifier": {
        "dinov2.encoder.layer.1.layer_scale2.lambda1": "image_tower.blocks.block_01.layer_scale2",
        "dinov2.encoder.layer.1.mlp.weights_in.weight": (
            "image_tower.blocks.block_01.mlp.weights_in.kernel"
        ),
    },
    "convnext, layer scale, classifier": {
        "convnext.encoder.stages.2.layers.0.layer_scale_parameter": (
            "image_tower.blocks.block_02.layer_scale"
        ),
        "convnext.encoder.stages.2.downsampling_layer.0.bias": (
            "image_tower.downsample_02.norm.bias"
        ),
    },
    "resnet, basic, classifier": {
        "resnet.encoder.stages.1.layers.0.shortcut.normalization.running_var": (
            "image_tower.blocks.block_02.shortcut_norm.var"
        ),
        "classifier.1.weight": "head.kernel",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_format_is_hugging_faces(saved, name):
    tensors, model = load_file(saved[name] / FILES[0]), checkpoint(CASES[name])
    ours = leaves({**model.params, "head": model.head or {}})
    for theirs, path in NAMES[name].items():
        expected = ours[path].T if path.endswith("kernel") else ours[path]
        np.testing.assert_array_equal(tensors[theirs], expected, err_msg=theirs)
    assert len(tensors) == len(ours)


def test_convolutions_are_stored_as_torch_has_them(saved):
    name = "convnext, layer scale, classifier"
    tensors, tower = (
        load_file(saved[name] / FILES[0]),
        checkpoint(CASES[name]).params["image_tower"],
    )
    depthwise = tensors["convnext.encoder.stages.1.layers.0.dwconv.weight"]
    kernel = tower["blocks"]["block_01"]["depthwise"]["kernel"]
    assert depthwise.shape == (20, 1, 7, 7) and depthwise[3, 0, 2, 5] == kernel[2 * 7 + 5, 3]
    down = tensors["convnext.encoder.stages.1.downsampling_layer.1.weight"]
    kernel = tower["downsample_01"]["conv"]["kernel"]
    assert down.shape == (20, 12, 2, 2) and down[7, 5, 1, 0] == kernel[(1 * 2 + 0) * 12 + 5, 7]


@pytest.mark.parametrize("name", BY_TYPE.values())
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(copy, name, dtype):
    def rounded(tree):
        return jax.tree.map(
            lambda x: x if np.issubdtype(x.dtype, np.integer) else x.astype(dtype).astype("f4"),
            tree,
        )

    path, model = copy(name), checkpoint(CASES[name])
    edit(
        path,
        lambda t: t.update({k: v.astype(dtype) for k, v in t.items() if v.dtype == np.float32}),
    )
    loaded = checkpoint_io.load(path)
    assert_same(loaded.params, rounded(model.params))
    assert_same(loaded.head or {}, rounded(model.head or {}))


@pytest.mark.parametrize("name", BY_TYPE.values())
def test_shards(tmp_path, name):
    model = checkpoint(CASES[name])
    path = checkpoint_io.save(tmp_path / "model", model, max_shard_bytes=5_000)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    assert checkpoint_io.load(path).checksum == model.checksum


def test_position_ids_of_older_checkpoints_are_ignored(copy):
    path = copy("siglip")
    more = {f"{x}_model.embeddings.position_ids": np.arange(9)[None] for x in ("text", "vision")}
    edit(path, lambda t: t.update(more))
    assert checkpoint_io.load(path).checksum == checkpoint(CASES["siglip"]).checksum


def test_what_a_model_does_not_compute_with_may_be_missing(copy):
    for name, prefix, part in [("vit", "pooler.", "pooler"), ("dinov2", "embeddings.mask", "mask")]:
        path = copy(name)
        edit(path, lambda t, p=prefix: [t.pop(key) for key in list(t) if key.startswith(p)])
        loaded, full = checkpoint_io.load(path), checkpoint(CASES[name]).params
        left = {key: x for key, x in full.items() if not key.startswith(part)}
        assert len(left) < len(full)
        assert_same(loaded.params, left)
        again = checkpoint_io.save(path.parent / part, loaded)
        assert checkpoint_io.load(again).checksum == loaded.checksum


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "convnextv2", "resnet, bottleneck"])
def test_a_base_model_becomes_a_classifier(saved, tmp_path, name):
    base = checkpoint_io.load(saved[name])
    rng = np.random.default_rng(0)
    head = {
        "kernel": rng.standard_normal((base.config.feature_size, 3), np.float32),
        "bias": rng.standard_normal(3, np.float32),
    }
    replica = {"image_tower": base.params["image_tower"], "head": head}
    tuned = base.with_replica(replica, ("cat", "dog", "gull é"))
    path = checkpoint_io.save(tmp_path / "tuned", tuned)
    loaded = checkpoint_io.load(path)
    assert_same(loaded.replica(), replica)
    assert loaded.labels == ("cat", "dog", "gull é")
    raw = json.loads((path / "config.json").read_text())
    assert raw["architectures"] == [base.config.classifier_class]
    assert raw["id2label"]["2"] == "gull é" and raw["label2id"]["dog"] == 1
    names = load_file(path / FILES[0]).keys()
    assert all(key.startswith((base.config.prefix, "classifier.")) for key in names)
    assert not any("pooler" in key for key in names)
    assert not (path / "head.safetensors").exists()


def test_the_head_of_a_siglip_is_a_separate_file(saved, tmp_path):
    base, rng = checkpoint_io.load(saved["siglip"]), np.random.default_rng(0)
    head = {
        "kernel": rng.standard_normal((36, 2), np.float32),
        "bias": rng.standard_normal(2, np.float32),
    }
    replica = {"image_tower": base.params["image_tower"], "head": head}
    path = checkpoint_io.save(tmp_path / "tuned", base.with_replica(replica, ("a", "b")))
    assert (path / FILES[0]).read_bytes() == (saved["siglip"] / FILES[0]).read_bytes()
    loaded = checkpoint_io.load(path)
    assert loaded.labels == ("a", "b")
    assert_same(loaded.replica(), replica)


@pytest.mark.parametrize("name", BY_TYPE.values())
def test_all_tensors_that_do_not_match_are_listed(copy, name):
    path = copy(name)
    names = sorted(load_file(path / FILES[0]))
    floats = [key for key in names if not re.search("num_batches|mask_token|pooler", key)]
    missing, misshapen, integer, infinite = floats[3], floats[5], floats[7], floats[9]

    def break_it(tensors):
        del tensors[missing]
        tensors[misshapen] = np.zeros((2, 3), np.float32)
        tensors[integer] = tensors[integer].astype(np.int32)
        tensors[infinite] = np.full_like(tensors[infinite], np.inf)
        tensors["decoder.0.weight"] = np.zeros((2, 3), np.float32)

    edit(path, break_it)
    text = message(path)
    for part in (
        f"missing: {missing} [",
        f"misshapen: {misshapen} is [2, 3], not [",
        f"floating-point: {integer} ",
        f"finite: {infinite}",
        "unused: decoder.0.weight [2, 3]",
    ):
        assert part in text


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.classes])
def test_a_classifier_must_be_complete(copy, name):
    path = copy(name)
    biases = [key for key in load_file(path / FILES[0]) if re.search(r"classifier.*bias$", key)]
    edit(path, lambda tensors: [tensors.pop(bias) for bias in biases])
    text = message(path)
    assert all(f"missing: {bias}" in text for bias in biases)


def test_statistics_of_a_batch_norm(copy):
    name = "resnet, basic, classifier"
    path, norm = copy(name), "resnet.embedder.embedder.normalization."

    def break_it(tensors):
        tensors[f"{norm}running_var"][2] = -1e-3
        tensors[f"{norm}num_batches_tracked"] = np.array(7.0, np.float32)
        tensors[f"{norm}running_mean"][:] = -1  # No mistake.

    edit(path, break_it)
    text = message(path)
    assert f"negative: {norm}running_var" in text and "running_mean" not in text
    assert f"not an integer: {norm}num_batches_tracked" in text
    model = checkpoint(CASES[name])
    model.params["image_tower"]["stem_norm"]["var"] -= 2
    with pytest.raises(UserError, match="negative: image_tower.stem_norm.var"):
        checkpoint_io.save(path.parent / "out", model)
    # Files from before torch counted batches.
    path = copy(name)
    edit(path, lambda t: [t.pop(key) for key in list(t) if key.endswith("num_batches_tracked")])
    assert "num_batches_tracked" not in checkpoint_io.load(path).params


def test_another_architecture_is_named(copy):
    path = copy("vit")
    for model_type, part in [
        ("swin", "clip, siglip, vit, deit, dinov2, dinov2_with_registers, convnext"),
        ("siglip2", "NaFlex"),
        ("siglip_vision_model", "complete model"),
        (None, "convnextv2, resnet"),
        (["vit"], "choose one of"),
    ]:
        edit_config(path, model_type=model_type)
        text = message(path)
        assert f"config.json: config: model_type {model_type!r}" in text and part in text


def test_a_model_of_another_type_lists_its_tensors(copy):
    path = copy("dinov2")
    edit_config(path, model_type="dinov2_with_registers")
    assert "missing: embeddings.register_tokens [1, 4, 36]" in message(path)
    path = copy("convnextv2")
    edit_config(path, model_type="convnext")
    text = message(path)
    assert "unused: encoder.stages.0.layers.0.grn.weight [1, 1, 1, 48]" in text
    assert "missing: encoder.stages.0.layers.0.layer_scale_parameter [12]" in text


# (model_type, entries of its config.json, part of the message)
MISTAKES = [
    ("siglip", {"text_config": {"projection_size": 5}}, "projection_size 5.*768"),
    ("siglip", {"vision_config": {"vision_use_head": False}}, "vision_use_head"),
    ("siglip", {"vision_config": {"hidden_act": "gelu_fast"}}, "vision_config: .*'gelu_fast'"),
    ("siglip", {"vision_config": "base"}, "vision_config .*dictionary.*'base'"),
    ("siglip", {"text_config": {"vocab_size": 2**31}}, "vocab_size .*2147483648"),
    ("vit", {"image_size": [224, 192]}, r"image_size .*int.*\[224, 192\]"),
    ("vit", {"image_size": 8}, "image_size 8 .*16"),
    ("vit", {"num_attention_heads": 7}, "768 .*num_attention_heads 7"),
    ("vit", {"hidden_act": "silu"}, "'silu'.*gelu_pytorch_tanh"),
    ("vit", {"qkv_bias": 1}, "qkv_bias .*bool.*1"),
    ("vit", {"num_hidden_layers": True}, "num_hidden_layers .*int.*True"),
    ("vit", {"hidden_size": "768"}, "hidden_size .*int.*'768'"),
    ("vit", {"layer_norm_eps": float("nan")}, "layer_norm_eps .*nan"),
    ("vit", {"layer_norm_eps": 10**400}, "layer_norm_eps .*large"),
    ("vit", {"pooler_output_size": -1}, "pooler_output_size .*-1"),
    ("deit", {"patch_size": 0}, "patch_size .* 0"),
    ("dinov2", {"mlp_ratio": float("inf")}, "mlp_ratio .*inf"),
    ("dinov2", {"layerscale_value": float("nan")}, "layerscale_value .*nan"),
    ("dinov2", {"use_swiglu_ffn": "yes"}, "use_swiglu_ffn .*bool.*'yes'"),
    ("dinov2_with_registers", {"num_register_tokens": -4}, "num_register_tokens .*-4"),
    ("convnext", {"depths": [3, 3, 9]}, r"hidden_sizes .*depths \(3, 3, 9\)"),
    ("convnext", {"depths": []}, "depths "),
    ("convnext", {"depths": [3, 3, 9, True]}, "depths .*integers.*True"),
    ("convnext", {"hidden_sizes": [96, 0, 384, 768]}, "hidden_sizes .* 0"),
    ("convnext", {"layer_scale_init_value": float("nan")}, "layer_scale_init_value .*nan"),
    ("convnextv2", {"hidden_sizes": 96}, "hidden_sizes .*integers.*96"),
    ("resnet", {"layer_type": "wide"}, "layer_type 'wide'.*basic, bottleneck"),
    ("resnet", {"depths": [3, 4, 6]}, r"hidden_sizes .*depths \(3, 4, 6\)"),
    ("resnet", {"downsample_in_bottleneck": 0}, "downsample_in_bottleneck .*bool.*0"),
    ("resnet", {"hidden_act": "tanh"}, "'tanh'"),
]


@pytest.mark.parametrize(("model_type", "change", "expected"), MISTAKES)
def test_config_errors(model_type, change, expected):
    with pytest.raises(UserError, match=expected) as error:
        config_from_dict({"model_type": model_type, **change})
    assert "\n" not in str(error.value)


# Sizes that would not fit into memory, in the config of a small file.
HUGE = {
    "siglip": {"vision_config": {"hidden_size": 2**31 - 1, "num_attention_heads": 1}},
    "vit": {"intermediate_size": 2**31 - 1},
    "deit, one classifier": {"hidden_size": 3 * 2**29},
    "dinov2": {"mlp_ratio": 2**31 - 1, "hidden_size": 3 * 2**29},
    "dinov2_with_registers": {"num_register_tokens": 2**31 - 1},
    "convnext": {"hidden_sizes": [2**31 - 1] * 2},
    "convnextv2, classifier": {"patch_size": 2**31 - 1, "num_channels": 2**31 - 1},
    "resnet, bottleneck": {"embedding_size": 2**31 - 1, "hidden_sizes": [2**31 - 1] * 2},
}
DEEP = {
    "siglip": {"text_config": {"num_hidden_layers": 10**9}},
    **dict.fromkeys(["vit", "deit", "dinov2"], {"num_hidden_layers": 10**9}),
    **dict.fromkeys(["convnext", "resnet, bottleneck"], {"depths": [1, 10**9]}),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_sizes_are_found_before_memory_is_allocated(copy, name):
    path = copy(name)
    edit_config(path, **HUGE[name])
    text = message(path)
    assert any(part in text for part in ("misshapen: ", "projection_size", "image_size"))


@pytest.mark.parametrize("name", DEEP)
def test_more_blocks_than_tensors_are_not_created(copy, name):
    path = copy(name)
    edit_config(path, **DEEP[name])
    assert "1,000,000,00" in message(path)


def test_labels_must_fit_the_classifier(copy):
    name = "convnext, layer scale, classifier"
    for id2label, part in [
        ({"0": "a", "1": "b"}, "5 classes, but there are 2 labels"),
        ({str(i): "a" for i in range(1, 6)}, "id2label"),
        ({str(i): i for i in range(5)}, "strings, not 0"),
        (["a"] * 5, "id2label"),
    ]:
        path = copy(name)
        edit_config(path, id2label=id2label)
        assert part in message(path)
    model = dataclasses.replace(checkpoint(CASES[name]), labels=("a",))
    with pytest.raises(UserError, match="5 classes.* 1 labels"):
        checkpoint_io.save(path.parent / "out", model)


def test_classes_without_names_stay_without_names(tmp_path):
    model = dataclasses.replace(checkpoint(CASES["resnet, basic, classifier"]), labels=None)
    path = checkpoint_io.save(tmp_path / "model", model)
    # transformers counts the classes here.
    assert len(json.loads((path / "config.json").read_text())["id2label"]) == 5
    assert checkpoint_io.load(path).labels is None


def test_two_classifiers_are_an_error(copy):
    path = copy("vit, classifier, no qkv bias")
    head = {"weight": np.zeros((5, 36), np.float32), "bias": np.zeros(5, np.float32)}
    save_file(head, path / "head.safetensors")
    text = message(path)
    assert "head.safetensors: " in text and "classifier" in text


def test_a_file_without_the_base_of_its_classifier_is_listed(copy):
    path = copy("deit, one classifier")
    edit(path, lambda t: [t.pop(key) for key in list(t) if key.startswith("deit.")])
    text = message(path)
    assert "missing: deit.embeddings.cls_token [1, 1, 36]" in text and "classifier" not in text


def test_the_preprocessor_must_fit_a_model_that_does_not_resize(copy):
    crop = {"crop_size": {"height": 21, "width": 21}}
    for name in ("siglip", "vit"):
        path = copy(name)
        edit_config(path, "preprocessor_config.json", **crop)
        assert " 21 " in message(path)
    for name in ("dinov2", "convnext", "resnet, bottleneck"):
        path = copy(name)
        edit_config(path, "preprocessor_config.json", **crop)
        assert checkpoint_io.load(path).preprocessor.image_size == 21
