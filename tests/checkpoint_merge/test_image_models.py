"""Merges of SigLIP, ViT, DeiT, DINOv2, ConvNeXt and ResNet, in the names of transformers."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.tensor_names import is_classifier
from modelstock_jax.merging import model_stock, stack_replicas
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.model import abstract_params
from modelstock_jax.models.preprocessor import Preprocessor
from tests.checkpoint_merge.typed import load, stock, tensors, weights, write
from tests.merging.image_models import BODIES, CONFIGS, classified

NAMES = ("cat", "dog", "owl")
CLASSES = {
    "id2label": {str(i): name for i, name in enumerate(NAMES)},
    "label2id": {name: i for i, name in enumerate(NAMES)},
}
COUNTER = "num_batches_tracked"
STATISTICS = ("running_mean", "running_var")
CONVOLUTIONAL = [name for name in BODIES if "convnext" in name or "resnet" in name]


def config(model, **changes):
    """Return the part of a config.json that a merge reads."""
    kind = model.split()[0]
    towers = {"vision_config": {}, "text_config": {"model_type": "siglip_text_model"}}
    heads = {} if model in CONVOLUTIONAL else {"num_attention_heads": 2}
    return {"model_type": kind, **(towers if kind == "siglip" else heads), **changes}


def base_tensors(shapes):
    """Return random weights; statistics are positive, and counters integers."""
    values = weights(shapes)
    for name in values:
        if name.endswith(STATISTICS):
            values[name] = np.abs(values[name])
        elif name.endswith(COUNTER):
            values[name] = np.int64(1000)
    return values


def tuned(base, seed):
    """Return a fine-tune that keeps statistics, counters, the pooler and the mask token."""
    kept = (*STATISTICS, COUNTER, "pooler.dense.weight", "pooler.dense.bias", "mask_token")
    moved = weights({n: np.shape(x) for n, x in base.items()}, seed, base)
    return {n: base[n] if n.endswith(kept) else moved[n] for n in base}


def save(root, base, fine_tunes, base_config, tuned_config):
    """Write a base and its fine-tunes."""
    models = zip(("base", "ft1", "ft2"), (base, *fine_tunes), strict=True)
    return [
        write(
            root / name,
            {
                "model.safetensors": values,
                "config.json": base_config if name == "base" else tuned_config,
            },
        )
        for name, values in models
    ]


def assert_merged(merged, base, fine_tunes):
    """Compare with equation 3 per tensor; what no fine-tune moved is bitwise the base's."""
    for name, value in merged.items():
        moved = [x[name] for x in fine_tunes]
        if all(np.array_equal(x, base[name]) for x in moved):
            assert value.tobytes() == np.asarray(base[name]).tobytes(), name
        elif value.size == 1:
            np.testing.assert_allclose(value, np.mean(moved, axis=0), rtol=1e-6)
        else:  # One rounding to float32, of a ratio computed from float32 dot products.
            expected = stock(base[name], *moved)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("model", BODIES)
def test_every_tensor_is_merged_or_copied(say, tmp_path, model):
    base = base_tensors(classified(model))
    fine_tunes = [tuned(base, seed) for seed in (1, 2)]
    paths = save(tmp_path, base, fine_tunes, config(model), config(model))
    result = say("merge", *paths, "--out", tmp_path / "out")
    # Updates with a cosine of 0.5 on few elements can look like those of another base.
    notes = [note for note in result.notes if "equally far" not in note]
    assert result.status == 0 and not notes, result.err
    merged = tensors(tmp_path / "out")
    assert merged.keys() == base.keys()
    assert_merged(merged, base, fine_tunes)
    report = load(tmp_path / "out/merge_report.json")
    reasons = {row["name"]: row["reason"] for row in report["not_merged"]}
    assert set(reasons) == {n for n in base if n.endswith((*STATISTICS, COUNTER))}


@pytest.mark.parametrize("model", BODIES)
def test_a_base_without_prefix_and_classifier(say, tmp_path, model):
    """As on the hub: the base is the body, with its pooler, and the fine-tunes are classifiers."""
    body = base_tensors(BODIES[model])
    new = classified(model)
    kind = model.split()[0]
    start = weights(new, 9) | {
        name: body[old] for name in new if (old := name.removeprefix(f"{kind}.")) in body
    }
    fine_tunes = [tuned(start, seed) for seed in (1, 2)]
    paths = save(
        tmp_path,
        body,
        fine_tunes,
        config(model, architectures=["Model"], transformers_version="4.13.0"),
        config(model, architectures=["ForImageClassification"], problem_type="x", **CLASSES),
    )
    result = say("merge", *paths, "--out", tmp_path / "error")
    assert result.status == 1 and "--head finetuned" in result.err, result.err
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--head", "finetuned")
    assert result.status == 0, result.err
    merged = tensors(out)
    heads = [name for name in new if is_classifier(name)]
    assert len(heads) == 2
    for name in heads:
        mean = np.mean([model[name] for model in fine_tunes], axis=0, dtype=np.float64)
        np.testing.assert_allclose(merged.pop(name), mean, rtol=1e-6, atol=1e-7)
    # The base's names, without its pooler or its text tower.
    renamed = [{n.removeprefix(f"{kind}."): x for n, x in model.items()} for model in fine_tunes]
    assert merged.keys() == renamed[0].keys() - set(heads)
    assert_merged(merged, body, renamed)
    assert load(out / "config.json")["id2label"] == CLASSES["id2label"]


@pytest.mark.parametrize("model", ["vit", "dinov2", "convnext", "resnet basic"])
def test_a_base_with_other_classes(say, tmp_path, model):
    base = base_tensors(classified(model, classes=5))
    names = {str(i): f"old {i}" for i in range(5)}
    start = base | {n: x for n, x in weights(classified(model), 9).items() if is_classifier(n)}
    fine_tunes = [tuned(start, seed) for seed in (1, 2)]
    paths = save(
        tmp_path, base, fine_tunes, config(model, id2label=names), config(model, **CLASSES)
    )
    assert "--head finetuned" in say("merge", *paths, "--out", tmp_path / "error").err
    out = tmp_path / "out"
    assert say("merge", *paths, "--out", out, "--head", "finetuned").status == 0
    merged = tensors(out)
    assert merged.keys() == base.keys()
    for name in list(filter(is_classifier, base)):
        mean = np.mean([model[name] for model in fine_tunes], axis=0, dtype=np.float64)
        np.testing.assert_allclose(merged.pop(name), mean, rtol=1e-6, atol=1e-7)
    assert_merged(merged, base, fine_tunes)
    assert load(out / "config.json")["id2label"] == CLASSES["id2label"]


@pytest.mark.parametrize("unit", ["layer", "filter", "head", "block"])
@pytest.mark.parametrize("model", BODIES)
def test_every_unit(say, tmp_path, model, unit):
    base = base_tensors(BODIES[model])
    fine_tunes = [tuned(base, seed) for seed in (1, 2)]
    heads = {"num_attention_heads": 2}
    towers = {"vision_config": heads, "text_config": heads} if model == "siglip" else {}
    paths = save(tmp_path, base, fine_tunes, config(model, **towers), config(model, **towers))
    result = say("merge", *paths, "--out", tmp_path / "out", "--unit", unit)
    if unit == "head" and model in CONVOLUTIONAL:
        assert result.status == 1 and "attention" in result.err and "num-heads" not in result.err
        return
    assert result.status == 0, result.err
    rows = load(tmp_path / "out/merge_report.json")["units"]
    units = {row["unit"] for row in rows}
    joined = {"layer": 0 if model in CONVOLUTIONAL else 4, "block": 4, "head": 4, "filter": 0}[unit]
    if unit == "block" and model not in (*CONVOLUTIONAL, "siglip"):
        joined = 2
    if unit in ("layer", "head") and model == "siglip":  # Two towers; the pooling attention.
        joined = 8 if unit == "layer" else 10
    assert len(units - base.keys()) == joined


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_an_image_tower_of_siglip_without_its_prefix(say, tmp_path, prefix):
    """transformers 5 saves SiglipVisionModel without `vision_model.`, earlier releases with it."""
    tower = {
        name.removeprefix("vision_model."): x
        for name, x in base_tensors(BODIES["siglip"]).items()
        if name.startswith("vision_model.")
    }
    base = {f"{prefix}{name}": x for name, x in tower.items()}
    other = "" if prefix else "vision_model."
    fine_tunes = [tuned(tower, seed) for seed in (1, 2)]
    renamed = [{f"{other}{name}": x for name, x in model.items()} for model in fine_tunes]
    same = {"model_type": "siglip_vision_model", "num_attention_heads": 2}
    paths = save(tmp_path, base, renamed, same, same)
    result = say("merge", *paths, "--out", tmp_path / "out", "--unit", "tensor")
    assert result.status == 0, result.err
    merged = tensors(tmp_path / "out")
    assert merged.keys() == base.keys()
    assert_merged({n.removeprefix(prefix): x for n, x in merged.items()}, tower, fine_tunes)


def test_statistics_that_differ_are_the_mean_and_noted(say, tmp_path):
    base = base_tensors(BODIES["resnet basic"])
    fine_tunes = [tuned(base, seed) for seed in (1, 2)]
    for i, model in enumerate(fine_tunes):
        for name in model:
            if name.endswith(STATISTICS):
                model[name] = model[name] * np.float32(0.01 + 0.01 * i)
    paths = save(tmp_path, base, fine_tunes, config("resnet"), config("resnet"))
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--unit", "block")
    assert result.status == 0 and len(result.notes) == 1
    assert "statistics" in result.notes[0] and "training images" in result.notes[0]
    merged = tensors(out)
    for name in base:
        if name.endswith(STATISTICS):
            mean = (fine_tunes[0][name] + fine_tunes[1][name]) / 2
            np.testing.assert_allclose(merged[name], mean, rtol=1e-6)
            assert "var" not in name or merged[name].min() > 0


def test_the_pooling_head_of_siglip_is_no_classifier():
    heads = {name for name in BODIES["siglip"] if is_classifier(name)}
    assert not heads
    assert {n for n in classified("siglip") if is_classifier(n)} == {
        "classifier.weight",
        "classifier.bias",
    }


def draw(config, seed):
    """Return random parameters; a fine-tune (seed > 0) keeps statistics and counters."""
    common, own = np.random.default_rng(99), np.random.default_rng(seed)

    def values(path, leaf):
        start = np.random.default_rng(len(str(path))).uniform(0.5, 1.5, leaf.shape)
        step = common.standard_normal(leaf.shape) + own.standard_normal(leaf.shape)
        names = [str(key.key) for key in path]
        if leaf.dtype.kind != "f":
            return np.full(leaf.shape, 1000, leaf.dtype)
        kept = seed == 0 or names[-1] in ("mean", "var")
        return np.asarray(start if kept else start + 0.05 * step, leaf.dtype)

    return jax.tree.map_with_path(values, abstract_params(config))


@pytest.mark.filterwarnings("ignore:unit 'layer' found no attention")
@pytest.mark.parametrize(
    ("model", "unit"),
    [
        (model, unit)
        for model in BODIES
        for unit in ("layer", "filter", "head", "block")
        if unit != "head" or model not in CONVOLUTIONAL
    ],
)
def test_a_merge_of_exported_models_equals_the_merge_of_their_trees(say, tmp_path, model, unit):
    config = CONFIGS[model]
    preprocessor = Preprocessor((0.5,) * 3, (0.25,) * 3, image_size=8)
    trees = [draw(config, seed) for seed in range(3)]
    paths = [
        checkpoint_io.save(tmp_path / str(i), Checkpoint(config, tree, preprocessor))
        for i, tree in enumerate(trees)
    ]
    out = tmp_path / "out"
    result = say("merge", *paths, "--out", out, "--unit", unit)
    assert result.status == 0, result.err
    heads = {"num_heads": 2} if unit == "head" else {}
    merged, _ = model_stock(trees[0], stack_replicas(trees[1:]), unit=unit, **heads)
    # Sums in another order: the last digits of a ratio, then one rounding.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        checkpoint_io.load(out).params,
        jax.device_get(merged),
    )
