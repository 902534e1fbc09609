"""The commands that verify published models, on local stand-ins."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import verify_imagenet, verify_models
from configs import vitb32
from modelstock_jax.errors import UserError
from modelstock_jax.models import checkpoint_io
from modelstock_jax.models.param_mapping import flatten
from tests.data.made_images import encoded, write_imagenet
from tests.experiment import small_run

NAMES = [f"{n:03d}" for n in range(1000)]  # Short: the small text tower has few positions.


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The script's config with a small ImageNet and a small CLIP."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (tmp_path / "prompts.txt").write_text("{}\n")
    config = vitb32.get_config()
    config.data.root = str(write_imagenet(tmp_path / "data"))
    shutil.rmtree(tmp_path / "data/train")  # An evaluation does not need it.
    config.data.class_names = str(tmp_path / "names.txt")
    config.data.templates = str(tmp_path / "prompts.txt")
    config.data.check_counts, config.compute.dtype = False, "float32"
    config.pretrained = str(small_run.save_anchor(tmp_path / "clip"))
    config.evaluation.batch_size = 8
    return config


def write_fine_tuned(path, base, seed):
    """A fine-tuned image tower and head in the format of Model Soups' code."""
    rng = np.random.default_rng(seed)
    leaves = {
        key: leaf + 0.1 * (key[0] == "image_tower") * rng.standard_normal(leaf.shape, np.float32)
        for key, leaf in flatten(base.params)
    }
    state = {
        f"model.{row.name}": np.array(row.write(leaves), order="C")
        for row in base.config.rows("openai")
        if not row.name.startswith("transformer.")
    }
    state["classification_head.weight"] = rng.standard_normal((1000, 8)).astype(np.float32)
    state["classification_head.bias"] = np.zeros(1000, np.float32)
    save_file(state, path)
    return str(path)


def published(row):
    return {"ImageNet": row["id"], "mean": row["avg_shifts"]} | row["shifts"]


def test_zero_shot_and_merged_accuracies(config, tmp_path, monkeypatch, capsys):
    base = checkpoint_io.load(config.pretrained)
    files = [write_fine_tuned(tmp_path / f"ft{i}.safetensors", base, i) for i in (1, 2)]
    rows, evaluate = [], verify_imagenet.evaluate_checkpoint

    def record(*args):
        rows.append(evaluate(*args))
        return rows[-1]

    monkeypatch.setattr(verify_imagenet, "evaluate_checkpoint", record)
    assert not verify_imagenet.verify(config, files, NAMES, ["{}"])
    zero_shot, merged = rows
    assert set(zero_shot["shifts"]) == {"v2", "r", "sketch", "objectnet", "a"}
    monkeypatch.setattr(verify_imagenet, "ZERO_SHOT", published(zero_shot))
    monkeypatch.setattr(verify_imagenet, "MERGED", published(merged))
    assert verify_imagenet.verify(config, files, NAMES, ["{}"])
    monkeypatch.setitem(verify_imagenet.MERGED, "r", merged["shifts"]["r"] + 0.11)
    assert not verify_imagenet.verify(config, files, NAMES, ["{}"])
    assert "-0.11" in capsys.readouterr().out


def test_the_merge_is_that_of_the_files(config, tmp_path):
    """The script's model equals `modelstock merge base ft1 ft2 --unit layer` of the page."""
    from modelstock_jax.checkpoint_merge.cli import main as modelstock
    from modelstock_jax.models.convert import main as convert
    from modelstock_jax.models.zero_shot import zero_shot_head

    clip = checkpoint_io.load(config.pretrained)
    files = [write_fine_tuned(tmp_path / f"ft{i}.safetensors", clip, i) for i in (1, 2)]
    verify_imagenet.merge(config.pretrained, files, tmp_path / "ours", NAMES, ["{}"])
    head = zero_shot_head(clip, NAMES, ["{}"])
    anchor = {"image_tower": clip.params["image_tower"], "head": head}
    checkpoint_io.save(tmp_path / "base", clip.with_replica(anchor, NAMES))
    for file in files:
        out = file.removesuffix(".safetensors")
        convert([file, "--base", config.pretrained, "--to", "hugging_face", "--out", out])
    paths = [str(tmp_path / name) for name in ("base", "ft1", "ft2")]
    modelstock(["merge", *paths, "--unit", "layer", "--out", str(tmp_path / "theirs")])
    ours, theirs = (checkpoint_io.load(tmp_path / name) for name in ("ours", "theirs"))
    for (key, a), (_, b) in zip(flatten(ours.replica()), flatten(theirs.replica()), strict=True):
        # Float64 sums rounded once, and float32: some rounding errors of the largest element.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max(), err_msg=str(key))


def test_missing_model_is_an_error_before_the_evaluation(config, monkeypatch):
    monkeypatch.setattr(verify_imagenet, "evaluate_checkpoint", pytest.fail)
    with pytest.raises(UserError, match="fine_tuned.* ft1.safetensors"):
        verify_imagenet.verify(config, ["ft1.safetensors", "ft2.safetensors"])


@pytest.mark.parametrize(
    ("arguments", "noun"),
    [
        (["--image", "/nowhere.jpg"], "/nowhere.jpg"),
        (["--image", "broken.jpg", "--weights", "clip"], "broken.jpg: "),
        (["--image", "cats.jpg", "--weights", "/nowhere"], "/nowhere"),
        (["--image", "cats.jpg", "--weights", "clip", "--models", "vit"], "classifier"),
    ],
)
def test_mistakes_are_one_line(arguments, noun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.jpg").write_bytes(encoded(1))
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    small_run.save_anchor(tmp_path / "clip")
    with pytest.raises(SystemExit, match=noun) as error:
        verify_models.main(arguments)
    assert "\n" not in str(error.value)
