"""Conversion on the command line; fine-tuned models of the Model Soups code."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from modelstock_jax.errors import UserError
from modelstock_jax.merging import model_stock, stack_replicas
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.convert import main
from tests.models.all_formats import CHECKPOINT, CONFIG, with_head, with_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The pretrained model in Hugging Face's format, with a tokenizer."""
    root = tmp_path_factory.mktemp("base")
    return checkpoint_io.save(root / "base", with_tokenizer(root / "tokenizer"))


def state_dict(seed: int, prefix: str = "", text: bool = True) -> dict[str, np.ndarray]:
    """A fine-tuned model as the Model Soups code saves it: without the text transformer."""
    tuned = with_head(seed=seed)
    left = {}
    for row in CONFIG.rows("openai"):
        name, tower = row.name, row.path[0][0]
        if tower == "image_tower" or (text and not name.startswith("transformer.")):
            leaves = {path: walk(tuned.params, path) for path in row.path}
            left[f"{prefix}model.{name}"] = np.asarray(row.write(leaves), order="C")
    left[f"{prefix}classification_head.weight"] = np.asarray(tuned.head["kernel"].T, order="C")
    left[f"{prefix}classification_head.bias"] = tuned.head["bias"]
    return left


def walk(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("prefix", "text"), [("", True), ("module.", True), ("", False)])
def test_a_fine_tuned_model_gets_its_text_tower_from_the_base(base, tmp_path, prefix, text):
    save_file(state_dict(1, prefix, text), tmp_path / "ft.safetensors")
    loaded = checkpoint_io.load(tmp_path / "ft.safetensors", base=checkpoint_io.load(base))
    tuned = with_head(seed=1)
    assert_same(loaded.replica(), tuned.replica())
    assert_same(loaded.params["text_tower"], CHECKPOINT.params["text_tower"])
    assert (loaded.format, loaded.labels, loaded.directory) == ("model_soups", None, base)


def test_names_are_those_of_the_released_state_dicts():
    names = state_dict(1).keys()
    assert {
        "model.visual.conv1.weight",
        "model.visual.proj",
        "model.visual.transformer.resblocks.0.attn.in_proj_weight",
        "model.positional_embedding",
        "model.text_projection",
        "model.logit_scale",
        "model.token_embedding.weight",
        "model.ln_final.weight",
        "classification_head.weight",
        "classification_head.bias",
    } <= names
    assert not any("model.transformer" in name for name in names)


def test_what_is_wrong_with_a_fine_tuned_model(base, tmp_path):
    path, opened = tmp_path / "ft.safetensors", checkpoint_io.load(base)
    tensors = state_dict(1)

    def refused(change, message, given=opened):
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            checkpoint_io.load(path, base=given)

    refused({}, "text tower.* base", None)
    refused({"model.visual.proj": None}, r"missing: model.visual.proj \[128, 32\]")
    refused({"classification_head.bias": None}, "missing: classification_head.bias")
    refused({"ema.weight": np.zeros(2)}, r"unused: ema.weight \[2\]")
    refused({"model.visual.proj": np.zeros((4, 32))}, r"misshapen: model.visual.proj .*\[4, 32\]")
    refused({"model.visual.proj": np.full((128, 32), np.inf)}, "finite: model.visual.proj")
    other = 1.01 * tensors["model.token_embedding.weight"]
    refused({"model.token_embedding.weight": other}, "base.* text_to")
    # A base in half precision counts as the same base.
    save_file({k: v.astype(np.float16) for k, v in tensors.items()}, path)
    assert checkpoint_io.load(path, base=opened).format == "model_soups"
    with pytest.raises(UserError, match="base: .*complete model"):
        checkpoint_io.load(base, base=opened)


@pytest.mark.slow  # A merge of 51 tensors is compiled.
def test_the_released_models_are_converted_merged_and_saved(base, tmp_path, capsys):
    """The steps of docs/reproduce.md on random weights, compared with the formula."""
    for seed in (1, 2):
        save_file(state_dict(seed, "module."), tmp_path / f"ft{seed}.safetensors")
        source, out = str(tmp_path / f"ft{seed}.safetensors"), str(tmp_path / f"ft{seed}")
        main([source, "--base", str(base), "--to", "hugging_face", "--out", out])
    assert "hugging_face, from model_soups; " in capsys.readouterr().out
    tuned = [checkpoint_io.load(tmp_path / f"ft{seed}") for seed in (1, 2)]
    anchor = with_head(seed=3)
    merge = jax.jit(functools.partial(model_stock, unit="layer"))
    merged, _ = merge(anchor.replica(), stack_replicas([model.replica() for model in tuned]))
    merged = tuned[0].with_replica(jax.tree.map(np.asarray, merged))
    saved = checkpoint_io.load(checkpoint_io.save(tmp_path / "merged", merged, format="openai"))
    assert_same(saved.params["text_tower"], CHECKPOINT.params["text_tower"])

    w0, w1, w2 = (state_dict(seed, text=False) for seed in (3, 1, 2))
    found = load_file(tmp_path / "merged" / "model.safetensors")
    found |= {f"head.{k}": v for k, v in load_file(tmp_path / "merged/head.safetensors").items()}
    assert len(w0) == 32 + 2  # The image tower of two blocks, q, k and v joined, and the head.
    for name, start in w0.items():
        d1, d2 = (np.float64(w[name] - start) for w in (w1, w2))
        cosine = (d1 * d2).sum() / np.sqrt((d1**2).sum() * (d2**2).sum())
        ratio = max(0.0, 2 * cosine / (1 + cosine))
        expected = ratio * (w1[name] + w2[name]) / 2 + (1 - ratio) * start
        ours = found[name.removeprefix("model.").replace("classification_head", "head")]
        # Sums of up to 65,536 float32 products, then two roundings of values below 5.
        np.testing.assert_allclose(ours, expected, atol=2e-6, rtol=0, err_msg=name)


def test_every_format_on_the_command_line(base, tmp_path, capsys):
    steps = [(base, "open_clip"), ("open_clip", "openai"), ("openai", "hugging_face")]
    for source, format in steps:
        main([str(tmp_path / source), "--to", format, "--out", str(tmp_path / format)])
    last = capsys.readouterr().out.splitlines()[-1]
    count = sum(leaf.size for leaf in jax.tree.leaves(CHECKPOINT.params))
    assert last == f"{tmp_path / 'hugging_face'}: hugging_face, from openai; {count:,} parameters"
    # The tokenizer was copied, so no other one is required.
    assert (tmp_path / "hugging_face" / "tokenizer.json").read_text() == "{}"
    ours, theirs = (load_file(d / "model.safetensors") for d in (tmp_path / "hugging_face", base))
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
    with pytest.raises(SystemExit, match="hugging_face: .*--overwrite"):
        main([str(base), "--to", "hugging_face", "--out", str(tmp_path / "hugging_face")])
    main([str(base), "--to", "openai", "--out", str(tmp_path / "hugging_face"), "--overwrite"])
    assert checkpoint_io.load(tmp_path / "hugging_face").format == "openai"


def test_a_missing_tokenizer_is_an_error(base, tmp_path, capsys):
    bare = checkpoint_io.save(tmp_path / "bare", CHECKPOINT, format="openai")
    to = ["--to", "open_clip", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="error: .*bare: .*tokenizer.*open_clip"):
        main([str(bare), *to])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*empty.*tokenizer\.json.*vocab\.json"):
        main([str(bare), *to, "--tokenizer", str(tmp_path / "empty")])
    main([str(bare), *to, "--tokenizer", str(base)])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    # OpenAI's format never has one.
    main([str(bare), "--to", "openai", "--out", str(tmp_path / "copy")])
    with pytest.raises(SystemExit) as usage:
        main([str(bare), "--to", "onnx", "--out", str(tmp_path / "other")])
    assert usage.value.code == 2 and "'onnx'" in capsys.readouterr().err


def test_as_a_program(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "modelstock_jax.models.convert", str(tmp_path / "nowhere")),
            *("--to", "openai", "--out", str(tmp_path / "out")),
        ],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'nowhere'}: ")
    assert done.stderr.count("\n") == 1
