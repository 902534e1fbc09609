"""Checkpoints on disk: round trips are bitwise exact; every corruption is reported."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.param_mapping import flatten
from tests.models import small

CONFIG = small.config()
CHECKPOINT = small.checkpoint(CONFIG)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return checkpoint_io.save(tmp_path_factory.mktemp("clip") / "model", CHECKPOINT)


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)


def test_save_and_load_are_bit_for_bit(saved, tmp_path):
    once = checkpoint_io.load(saved)
    assert_same(once.params, CHECKPOINT.params)
    assert (once.config, once.preprocessor) == (CONFIG, CHECKPOINT.preprocessor)
    assert (once.head, once.labels, once.directory) == (None, None, saved)
    again = checkpoint_io.save(tmp_path / "again", once)
    for file in ("model.safetensors", "config.json", "preprocessor_config.json"):
        assert (again / file).read_bytes() == (saved / file).read_bytes()
    assert checkpoint_io.load(again).checksum == once.checksum == CHECKPOINT.checksum


def test_format_is_hugging_faces(saved):
    tensors = load_file(saved / "model.safetensors")
    params = CHECKPOINT.params
    block = params["image_tower"]["blocks"]["block_01"]
    name = "vision_model.encoder.layers.1"
    expected = {
        f"{name}.self_attn.k_proj.weight": block["self_attn"]["k_proj"]["kernel"].T,
        f"{name}.mlp.fc1.bias": block["mlp"]["fc1"]["bias"],
        f"{name}.layer_norm2.weight": block["layer_norm2"]["scale"],
        "vision_model.pre_layrnorm.bias": params["image_tower"]["pre_layernorm"]["bias"],
        "visual_projection.weight": params["image_tower"]["projection"]["kernel"].T,
        "text_projection.weight": params["text_tower"]["projection"]["kernel"].T,
        "logit_scale": params["logit_scale"],
    }
    for key, value in expected.items():
        np.testing.assert_array_equal(tensors[key], value)
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    kernel = params["image_tower"]["patch_embedding"]["kernel"]
    assert patch.shape == (96, 3, 6, 6)
    assert patch[5, 2, 1, 4] == kernel[(1 * 6 + 4) * 3 + 2, 5]
    assert len(tensors) == len(list(flatten(params)))


def test_sharded(saved, tmp_path):
    checkpoint_io.save(tmp_path / "m", CHECKPOINT, max_shard_bytes=300_000)
    assert not (tmp_path / "m" / "model.safetensors").exists()
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 3
    assert checkpoint_io.load(tmp_path / "m").checksum == CHECKPOINT.checksum


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(copy, dtype):
    edit(copy, lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
    loaded = checkpoint_io.load(copy).params
    assert_same(
        loaded, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), CHECKPOINT.params)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def test_position_ids_of_older_checkpoints_are_ignored(copy):
    edit(copy, lambda t: t.update({"text_model.embeddings.position_ids": np.arange(16)[None]}))
    assert_same(checkpoint_io.load(copy).params, CHECKPOINT.params)


def test_head_and_labels_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    head = {
        "kernel": rng.standard_normal((64, 3)).astype(np.float32),
        "bias": rng.standard_normal(3).astype(np.float32),
    }
    replica = {"image_tower": small.perturbed(CONFIG, 1)["image_tower"], "head": head}
    tuned = CHECKPOINT.with_replica(replica, ("cat", "dog", "gull é"))
    saved = checkpoint_io.save(tmp_path / "m", tuned, texts={"README.md": "# Card\n"})
    loaded = checkpoint_io.load(saved)
    assert_same(loaded.replica(), replica)
    assert_same(loaded.params["text_tower"], CHECKPOINT.params["text_tower"])
    assert loaded.labels == ("cat", "dog", "gull é")
    assert loaded.checksum == tuned.checksum != CHECKPOINT.checksum
    assert (tmp_path / "m" / "README.md").read_text() == "# Card\n"
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert raw["id2label"]["1"] == "dog" and raw["label2id"]["gull é"] == 2
    assert load_file(tmp_path / "m" / "head.safetensors")["weight"].shape == (3, 64)
    with pytest.raises(UserError, match="head"):
        CHECKPOINT.replica()


def test_labels_must_fit_the_head(tmp_path):
    head = {"kernel": np.zeros((64, 2), np.float32), "bias": np.zeros(2, np.float32)}
    for labels in (("a",), ("a", "a", "b")):
        with pytest.raises(UserError, match="head .*2 classes.*labels"):
            wrong = dataclasses.replace(CHECKPOINT, head=head, labels=labels)
            checkpoint_io.save(tmp_path / "m", wrong)
    assert list(tmp_path.iterdir()) == []
    tuned = dataclasses.replace(CHECKPOINT, head=head, labels=("a", "b"))
    checkpoint_io.save(tmp_path / "m", tuned)
    edit_json(tmp_path / "m" / "config.json", id2label={"0": "a"})
    with pytest.raises(UserError, match="head .*2 classes.* 1 labels"):
        checkpoint_io.load(tmp_path / "m")


def test_tokenizer_files_are_copied(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer" / "notes.txt").write_text("not a tokenizer's")
    source = dataclasses.replace(CHECKPOINT, directory=tmp_path / "tokenizer")
    checkpoint_io.save(tmp_path / "m", source)
    assert (tmp_path / "m" / "vocab.json").read_text() == "{}"
    assert not (tmp_path / "m" / "notes.txt").exists()


def test_all_tensors_that_do_not_match_are_listed(copy):
    def break_it(tensors):
        del tensors["visual_projection.weight"], tensors["text_model.final_layer_norm.bias"]
        tensors["vision_model.class_head.weight"] = np.zeros((2, 3), np.float32)
        tensors["text_projection.weight"] = np.zeros((64, 95), np.float32)
        tensors["vision_model.pre_layrnorm.bias"] = np.zeros(96, np.int32)
        bad = tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].copy()
        bad[3, 4] = np.nan
        tensors["vision_model.encoder.layers.0.mlp.fc1.weight"] = bad

    edit(copy, break_it)
    with pytest.raises(UserError) as error:
        checkpoint_io.load(copy)
    for part in (
        str(copy),
        "missing: visual_projection.weight [64, 96]",
        "missing: text_model.final_layer_norm.bias [96]",
        "unused: vision_model.class_head.weight [2, 3]",
        "misshapen: text_projection.weight ",
        "floating-point: vision_model.pre_layrnorm.bias ",
        "finite: vision_model.encoder.layers.0.mlp.fc1.weight",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_saving_checks_the_tree_too(tmp_path):
    params = {**CHECKPOINT.params, "logit_scale": np.float32("inf"), "extra": np.zeros(2)}
    params["text_tower"] = dict(params["text_tower"], token_embedding=np.zeros((2, 96)))
    del params["image_tower"]
    with pytest.raises(UserError) as error:
        checkpoint_io.save(tmp_path / "m", dataclasses.replace(CHECKPOINT, params=params))
    for part in (
        "missing: image_tower.class_embedding [96]",
        "unused: extra",
        "finite: logit_scale",
        "misshapen: text_tower.token_embedding ",
    ):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_without_overwrite(copy):
    with pytest.raises(UserError, match="copy: "):
        checkpoint_io.save(copy, CHECKPOINT)
    (copy / "stale.txt").write_text("old")
    checkpoint_io.save(copy, CHECKPOINT, overwrite=True)
    assert not (copy / "stale.txt").exists()
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_truncated_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors: "):
        checkpoint_io.load(copy)


def test_no_such_path_and_no_checkpoint(tmp_path, saved):
    with pytest.raises(UserError, match="nowhere: "):
        checkpoint_io.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="model.safetensors.index.json"):
        checkpoint_io.load(tmp_path)
    shutil.copy(saved / "model.safetensors", tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match="CLIP .*OpenAI.*config.json"):
            checkpoint_io.load(path)


def test_another_architecture(copy):
    edit_json(copy / "config.json", model_type="bert")
    with pytest.raises(UserError, match="config.json: .*model_type .*'bert'.*clip"):
        checkpoint_io.load(copy)


def test_more_layers_than_tensors_are_not_counted_up_to(copy):
    """A number in a small file must not create modules until memory is exhausted."""
    raw = json.loads((copy / "config.json").read_text())
    edit_json(copy / "config.json", text_config=raw["text_config"] | {"num_hidden_layers": 10**9})
    with pytest.raises(UserError, match="1,000,000,002 layers.* 62 tensors"):
        checkpoint_io.load(copy)


def test_pickles_are_an_error(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: .*pickle.*save_file"):
        checkpoint_io.load(copy)


def test_preprocessor_must_fit(copy):
    path = copy / "preprocessor_config.json"
    good = json.loads(path.read_text())
    edit_json(path, size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    with pytest.raises(UserError, match=" 32.* 24"):
        checkpoint_io.load(copy)
    # The older key and the newer file.
    path.write_text(json.dumps({**good, "size": 24, "crop_size": 24}))
    assert checkpoint_io.load(copy).preprocessor == CHECKPOINT.preprocessor
    path.unlink()
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": good}))
    assert checkpoint_io.load(copy).preprocessor == CHECKPOINT.preprocessor
    path.write_text(json.dumps({**good, "rescale_factor": 1.0}))
    with pytest.raises(UserError, match="1 / 255"):
        checkpoint_io.load(copy)
    for unknown in (None, "1/255", float("nan")):
        path.write_text(json.dumps({**good, "rescale_factor": unknown}))
        with pytest.raises(UserError, match="1 / 255"):
            checkpoint_io.load(copy)
    for statistics in ({"image_mean": [0.5, float("nan"), 0.5]}, {"image_std": [float("inf")] * 3}):
        path.write_text(json.dumps({**good, **statistics}))
        with pytest.raises(UserError, match="preprocessor_config.json: mean "):
            checkpoint_io.load(copy)
    path.write_text(json.dumps({**good, "crop_size": float("inf")}))
    with pytest.raises(UserError, match="crop_size .*inf"):
        checkpoint_io.load(copy)
    path.write_text("{}")
    with pytest.raises(UserError, match="image_mean, image_std"):
        checkpoint_io.load(copy)
    path.write_text("{")
    with pytest.raises(UserError, match="preprocessor_config.json: .*JSON"):
        checkpoint_io.load(copy)


def test_preprocessor_by_numpy():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    p = CHECKPOINT.preprocessor
    mean, std = (np.array(x)[None, None, None] for x in (p.mean, p.std))
    # Two float32 rounding errors of values up to 2.7.
    np.testing.assert_allclose(p(pixels), (pixels / 255 - mean) / std, atol=6e-7, rtol=0)
