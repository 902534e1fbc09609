"""Recipes with slices: models of layers of other models, with any method."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from modelstock_jax.checkpoint_merge.layer_stack import Layers, StackedSource
from modelstock_jax.checkpoint_merge.options import Options
from modelstock_jax.checkpoint_merge.plan import make_plan
from modelstock_jax.checkpoint_merge.sources import open_source
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors
from tests.checkpoint_merge.engine import numbers
from tests.checkpoint_merge.small import LLAMA, llama_shapes

NUM_LAYERS = LLAMA["num_hidden_layers"]
SUFFIX = "mlp.up_proj.weight"


def layer(number, suffix=SUFFIX):
    return f"model.layers.{number}.{suffix}"


@pytest.fixture
def paths(tmp_path):
    """Models a, b and c of two layers and random weights."""
    rng = np.random.default_rng(0)
    found = {}
    for name in "abc":
        found[name] = tmp_path / name
        found[name].mkdir()
        (found[name] / "config.json").write_text(json.dumps(LLAMA))
        tensors = {n: rng.standard_normal(s).astype(np.float32) for n, s in llama_shapes().items()}
        write_tensors(found[name] / "model.safetensors", tensors)
    return found


def piece(*sources, **more):
    entries = [{"model": str(model), "layer_range": list(layers)} for model, layers in sources]
    return {"sources": entries, **more}


def merge(say, tmp_path, recipe, *flags):
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    return say("merge", tmp_path / "r.yml", tmp_path / "out", "--overwrite", *flags)


def passthrough(paths, **more):
    return {
        "merge_method": "passthrough",
        "slices": [
            piece((paths["a"], (0, 2))),
            piece((paths["b"], (1, 2))),
            piece((paths["a"], (0, 1)), **more),
            piece((paths["b"], (0, 2))),
        ],
    }


ORIGINS = [("a", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0), ("b", 1)]


def test_layers_of_two_models(say, tmp_path, paths):
    result = merge(say, tmp_path, passthrough(paths))
    assert result.status == 0, result.err
    out = TensorFiles(tmp_path / "out")
    a, b = (TensorFiles(paths[name]) for name in "ab")
    per_layer = [n.removeprefix("model.layers.0") for n in llama_shapes() if ".layers.0." in n]
    assert len(out) == len(a) + (len(ORIGINS) - NUM_LAYERS) * len(per_layer)
    for number, (model, original) in enumerate(ORIGINS):
        for suffix in per_layer:
            expected = {"a": a, "b": b}[model][f"model.layers.{original}{suffix}"]
            np.testing.assert_array_equal(out[f"model.layers.{number}{suffix}"], expected)
    # The embedding is that of the first slice's model, norm and head are those of the last one's.
    np.testing.assert_array_equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(out[name], b[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == LLAMA | {"num_hidden_layers": len(ORIGINS)}
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    (model,) = report["models"]
    assert model["parts"] == [str(paths[name]) for name in "ab"] and report["base"] is None
    assert sorted(model["files"]) == sorted(f"{paths[name]}: model.safetensors" for name in "ab")


def test_scales_by_slice_and_filter(say, tmp_path, paths):
    scale = [{"filter": "up_proj", "value": 0.5}, {"value": 1.0}]
    assert merge(say, tmp_path, passthrough(paths, parameters={"scale": scale})).status == 0
    out, a = TensorFiles(tmp_path / "out"), TensorFiles(paths["a"])
    np.testing.assert_array_equal(out[layer(3)], a[layer(0)] / 2)
    for other in (0, 1):
        np.testing.assert_array_equal(out[layer(other)], a[layer(other)])
    norm = "input_layernorm.weight"
    np.testing.assert_array_equal(out[layer(3, norm)], a[layer(0, norm)])


def test_a_merge_in_every_slice(say, tmp_path, paths):
    """Slices merge layers of other numbers and other models, here into three layers."""
    a, b, c = paths.values()
    recipe = {
        "merge_method": "linear", "parameters": {"weight": [1, 3]},
        "slices": [
            {"sources": [{"model": str(a), "layer_range": [0, 2]},
                         {"model": str(b), "layer_range": [0, 2], "parameters": {"weight": 1}}]},
            piece((b, (1, 2)), (c, (0, 1)), parameters={"weight": 0.5}),
        ],
    }  # fmt: skip
    result = merge(say, tmp_path, recipe)
    assert result.status == 0, result.err
    out = TensorFiles(tmp_path / "out")
    a, b, c = (numbers(TensorFiles(path)[layer(0)]) for path in (a, b, c))
    a1, b1 = (numbers(TensorFiles(paths[name])[layer(1)]) for name in "ab")
    for number, expected in enumerate([(a + b) / 2, (3 * a1 + b1) / 4, (b1 + c) / 2]):
        np.testing.assert_allclose(out[layer(number)], expected, rtol=2**-23, atol=1e-7)


def test_slices_of_complete_models_are_complete_models(say, tmp_path, paths):
    names = [str(path) for path in paths.values()]
    common = {"merge_method": "task_arithmetic", "base_model": names[0],
              "parameters": {"weight": 0.4}}  # fmt: skip
    whole = common | {"models": [{"model": name} for name in names]}
    halves = common | {
        "slices": [piece(*((path, r) for path in paths.values())) for r in ((0, 1), (1, 2))]
    }
    files = []
    for recipe in (whole, halves):
        assert merge(say, tmp_path, recipe).status == 0
        files.append((tmp_path / "out" / "model.safetensors").read_bytes())
        report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
        assert "parts" not in report["base"]
    assert files[0] == files[1]


def test_lists_of_a_config_follow_the_layers(say, tmp_path, paths):
    kinds = {"a": ["full", "sliding"], "b": ["full", "other"]}
    for name, value in kinds.items():
        config = LLAMA | {"layer_types": value, "architectures": ["A", "B"]}
        (paths[name] / "config.json").write_text(json.dumps(config))
    # The kinds of layers are no disagreement of the two models: each layer keeps its own.
    (paths["b"] / "config.json").write_text(json.dumps(LLAMA | {
        "layer_types": kinds["a"], "architectures": ["A", "B"]}))  # fmt: skip
    assert merge(say, tmp_path, passthrough(paths)).status == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == [kinds["a"][original] for _, original in ORIGINS]
    assert config["architectures"] == ["A", "B"]


def changed(paths, name, **values):
    (paths[name] / "config.json").write_text(json.dumps(LLAMA | values))


def test_models_that_do_not_fit(say, tmp_path, paths):
    changed(paths, "b", rope_theta=5e5)
    result = merge(say, tmp_path, passthrough(paths))
    assert result.status == 1 and "rope_theta" in result.err and str(paths["b"]) in result.err
    changed(paths, "b")
    tensors = dict(TensorFiles(paths["b"]))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    write_tensors(paths["b"] / "model.safetensors", tensors)
    result = merge(say, tmp_path, passthrough(paths))
    assert result.status == 1 and "lm_head.weight" in result.err
    del tensors["lm_head.weight"]
    write_tensors(paths["b"] / "model.safetensors", tensors)
    result = merge(say, tmp_path, passthrough(paths))
    assert result.status == 1 and "lm_head.weight" in result.err and "missing" in result.err
    assert not (tmp_path / "out").exists() and result.err.count("\n") == 1


def test_layers_that_do_not_exist(say, tmp_path, paths):
    recipe = passthrough(paths)
    recipe["slices"][1]["sources"][0]["layer_range"] = [1, 3]
    result = merge(say, tmp_path, recipe)
    assert result.status == 1 and "[1, 3]" in result.err and "has 2 layers" in result.err


def test_keys_that_select_layers_by_number_are_noted(say, tmp_path, paths):
    for name in "ab":
        changed(paths, name, sliding_window_pattern=2)
    result = merge(say, tmp_path, passthrough(paths))
    assert result.status == 0 and "sliding_window_pattern" in result.err


def test_layers_of_different_kinds_without_a_list_of_kinds(say, tmp_path, paths):
    for name in "ab":
        tensors = dict(TensorFiles(paths[name]))
        tensors["model.layers.1.mlp.gate.weight"] = tensors["model.norm.weight"]
        write_tensors(paths[name] / "model.safetensors", tensors)
    result = merge(say, tmp_path, passthrough(paths))
    assert result.status == 1 and "different tensors" in result.err


def test_shards_threads_and_a_dry_run(say, tmp_path, paths):
    merge(say, tmp_path, passthrough(paths))
    whole = dict(TensorFiles(tmp_path / "out"))
    result = merge(say, tmp_path, passthrough(paths), "--max-shard-size", "2KB", "--threads", "3")
    assert result.status == 0
    out = TensorFiles(tmp_path / "out")
    assert out.keys() == whole.keys() and len(set(out.files.values())) > 3
    for name, value in whole.items():
        np.testing.assert_array_equal(out[name], value)
    plan = json.loads(merge(say, tmp_path, passthrough(paths), "--dry-run", "--json").out)
    assert sum(".layers." in tensor["name"] for tensor in plan["tensors"]) == sum(
        ".layers." in name for name in whole
    )


def test_other_layers_are_another_merge(paths):
    """Names, shapes and files are equal; an interrupted merge of other layers is not resumed."""

    def checksum(*layers):
        source = open_source(str(paths["a"]))
        stack = StackedSource([Layers(source, i, i + 1) for i in layers])
        return make_plan(stack, [stack], Options(method="passthrough"), anchored=False).checksum

    assert checksum(0, 1, 1) == checksum(0, 1, 1) != checksum(0, 0, 1)


def tokenizer(path, words):
    vocabulary = {word: i for i, word in enumerate(words)}
    text = json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []})
    (path / "tokenizer.json").write_text(text)


def test_embedding_and_head_of_models_with_other_tokens_are_an_error(say, tmp_path, paths):
    tokenizer(paths["a"], ["<unk>", "the", "cat"])
    tokenizer(paths["b"], ["<unk>", "cat", "the"])
    result = merge(say, tmp_path, passthrough(paths))
    assert result.status == 1 and "'the'" in result.err and "id 1" in result.err
    recipe = passthrough(paths)
    recipe["slices"] = recipe["slices"][:3]  # Embedding and head are both of the first model.
    assert merge(say, tmp_path, recipe).status == 0


def longer(paths, name, **config):
    """Make a model one layer longer."""
    tensors = dict(TensorFiles(paths[name]))
    for n in [n for n in tensors if ".layers.1." in n]:
        tensors[n.replace(".1.", ".2.")] = tensors[n] + 1
    write_tensors(paths[name] / "model.safetensors", tensors)
    changed(paths, name, num_hidden_layers=3, **config)


def test_models_of_other_lengths_merge_where_their_slices_fit(say, tmp_path, paths):
    longer(paths, "b")
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(paths["a"]),
        "parameters": {"weight": 0.5},
        "slices": [piece((paths["a"], (0, 1)), (paths["b"], (0, 1))),
                   piece((paths["a"], (1, 2)), (paths["b"], (2, 3)))],
    }  # fmt: skip
    result = merge(say, tmp_path, recipe)
    assert result.status == 0, result.err
    out, a, b = (TensorFiles(p) for p in (tmp_path / "out", paths["a"], paths["b"]))
    wanted = (numbers(a[layer(1)]) + numbers(b[layer(2)])) / 2
    np.testing.assert_allclose(out[layer(1)], wanted, rtol=2**-22, atol=1e-7)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


def test_layers_of_other_kinds_are_not_averaged(say, tmp_path, paths):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    for name in "ab":
        longer(paths, name, layer_types=kinds)
    recipe = {"merge_method": "linear", "parameters": {"weight": 1},
              "slices": [piece((paths["a"], (0, 2)), (paths["b"], (1, 3)))]}  # fmt: skip
    result = merge(say, tmp_path, recipe)
    assert result.status == 1 and "layer_types" in result.err
    changed(paths, "a", layer_types=kinds[:2])
    tensors = {n: x for n, x in TensorFiles(paths["a"]).items() if ".layers.2." not in n}
    write_tensors(paths["a"] / "model.safetensors", tensors)
    recipe = {"merge_method": "passthrough",
              "slices": [piece((paths["a"], (0, 2))), piece((paths["b"], (1, 3)))]}  # fmt: skip
    result = merge(say, tmp_path, recipe)
    assert result.status == 0, result.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == kinds[:2] + kinds[1:]
