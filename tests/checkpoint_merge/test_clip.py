"""CLIP checkpoints of different libraries give the same merge, including the classifier."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import commands
from modelstock_jax.checkpoint_merge.cli import main
from modelstock_jax.errors import UserError
from modelstock_jax.models.checkpoint_io import load, save
from modelstock_jax.tensor_files.reader import TensorFiles
from tests.checkpoint_merge.engine import deltas, plan, stock_ratio
from tests.models import small

CLASSES = 5
# OpenAI's files have no config, so the number of heads is an option.
FORMATS = {"hugging_face": (), "open_clip": (), "openai": ("--num-heads", "2")}


@pytest.fixture(autouse=True)
def _no_figure(monkeypatch):
    monkeypatch.setattr(commands.PlotProcess, "finish", lambda drawing: None)


@pytest.fixture(scope="module")
def checkpoints():
    """An anchor and two fine-tunes whose task vectors have a cosine of 0.5, with classifiers."""
    config, rng = small.config(eos_token_id=59), np.random.default_rng(0)
    for tower in ("vision", "text"):  # 64 elements per head, which OpenAI's format requires.
        size = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
        config = small.replaced(config, tower, **size)
    anchor = small.checkpoint(config)
    head = {"kernel": (config.projection_dim, CLASSES), "bias": (CLASSES,)}
    head = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in head.items()}
    trees = {"params": anchor.params, "head": head}

    def moved(seed):
        common, own = np.random.default_rng(9), np.random.default_rng(seed)

        def move(w):
            step = common.standard_normal(np.shape(w)) + own.standard_normal(np.shape(w))
            return np.asarray(w + 1e-2 * step, np.float32)

        return jax.tree.map(move, trees)

    labels = tuple(f"class {i}" for i in range(CLASSES))
    return [
        dataclasses.replace(anchor, **tree, labels=labels) for tree in (trees, moved(1), moved(2))
    ]


@pytest.fixture(scope="module")
def folders(checkpoints, tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    return {
        name: [
            str(save(root / name / str(i), model, format=name))
            for i, model in enumerate(checkpoints)
        ]
        for name in FORMATS
    }


@pytest.mark.parametrize("unit", ["head", "layer", "block"])
def test_all_formats_give_the_same_merge(folders, tmp_path, unit):
    merged = []
    for name, options in FORMATS.items():
        out = tmp_path / name
        options = options if unit == "head" else ()
        assert main(["merge", *folders[name], "--out", str(out), "--unit", unit, *options]) == 0
        found = load(out, format=name)
        merged.append({"params": found.params, "head": found.head})
    first, *others = merged
    anchor = load(folders["hugging_face"][0]).params
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(first["params"]), jax.tree.leaves(anchor), strict=True)
    )
    for other in others:
        # The same sums in another order: the last digits of a ratio, then one rounding.
        jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, maxulp=1), first, other)


def test_the_classifier_is_merged_with_its_model(checkpoints, folders, tmp_path, capsys):
    paths, out = folders["hugging_face"], tmp_path / "out"
    assert main(["merge", *paths, "--out", str(out), "--max-shard-size", "200KB"]) == 0
    heads = [dict(TensorFiles(f"{path}/head.safetensors")) for path in paths]
    merged = TensorFiles(out / "head.safetensors")
    assert sorted(merged) == ["bias", "weight"]
    for name in merged:
        d = deltas(heads, name)
        expected = heads[0][name].ravel() + stock_ratio(d) * d.mean(axis=0)
        np.testing.assert_allclose(merged[name].ravel(), expected, rtol=1e-6, atol=1e-7)
    model = load(out)
    assert model.labels == checkpoints[0].labels and model.head["kernel"].shape[1] == CLASSES
    # The index lists only the model, because its library reads it.
    index = (out / "model.safetensors.index.json").read_text()
    assert "head.safetensors" not in index and len(list(out.glob("model-*.safetensors"))) > 1
    # A separate merge of the classifier is bitwise identical.
    files = [f"{path}/head.safetensors" for path in paths]
    assert main(["merge", *files, "--out", str(tmp_path / "alone")]) == 0
    alone = (tmp_path / "alone" / "model.safetensors").read_bytes()
    assert alone == (out / "head.safetensors").read_bytes()


def test_a_classifier_that_some_models_lack_is_named(checkpoints, folders, tmp_path):
    bare = save(tmp_path / "bare", dataclasses.replace(checkpoints[1], head=None, labels=None))
    base, _, other = folders["hugging_face"]
    problem = (
        "head.safetensors:bias, head.safetensors:weight are missing in .*bare .*"
        "--missing-tensors base"
    )
    with pytest.raises(UserError, match=problem):
        plan([base, bare, other])
    made = plan([base, bare, other], missing_tensors="base")
    assert made.tensors["head.safetensors:weight"].action == "base"
    with pytest.raises(UserError, match=f"head.safetensors:bias, .*{base} but not in .*bare "):
        plan([bare, base, other])
    assert "head.safetensors" not in plan([bare, base, other], missing_tensors="base").files
