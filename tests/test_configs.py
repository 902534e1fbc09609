"""The configs match the paper, and every config can be planned without its data."""

from __future__ import annotations

import importlib
from pathlib import Path

import jax
import pytest

from configs import default, imagenet
from modelstock_jax.data import benchmark
from modelstock_jax.errors import UserError
from modelstock_jax.experiment.dry_run import abstract_step_functions, num_merges

MODELS = ("vitb32", "vitb16", "vitl14")  # of the paper
OTHERS = {
    "siglip": "google/siglip2-base-patch16-224",
    "vit": "google/vit-base-patch16-224-in21k",
    "resnet50": "microsoft/resnet-50",
}
FILES = sorted(p.stem for p in (Path(__file__).parents[1] / "configs").glob("[a-z]*.py"))


def load(name: str, *setup: str):
    return importlib.import_module(f"configs.{name}").get_config(*setup)


@pytest.mark.parametrize("name", MODELS)
def test_setups_match_the_paper(name):
    """Section 4.1 and footnote 4."""
    plain, strong = load(name), load(name, "strong")
    for config in (plain, strong):
        assert config.batch_size == (64 if name == "vitl14" else 512)
        assert config.num_replicas == 2 and config.merge.every == "epoch"
        assert config.optimizer.weight_decay == 0.1
        assert (
            config.data.shifts == ("v2", "r", "sketch", "objectnet", "a")
            and config.data.real_labels
        )
    assert (plain.epochs, strong.epochs) == (10, 16)
    assert plain.data.augment.crop_area == (0.9, 1.0) and plain.label_smoothing == 0
    assert plain.data.augment.randaugment_ops == 0 and plain.data.augment.mixup == 0
    assert strong.data.augment.crop_area == (0.08, 1.0) and strong.label_smoothing > 0
    assert strong.data.augment.randaugment_ops > 0 and strong.data.augment.mixup > 0
    assert load(name, "plain").to_dict() == plain.to_dict()
    with pytest.raises(UserError, match=":strongest.*:plain, :strong"):
        load(name, "strongest")


@pytest.mark.parametrize("setup", imagenet.SETUPS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_have_the_setups_of_the_paper(name, setup):
    """Only what the docstring of the config names differs from `imagenet`."""
    config, base = load(name, setup), imagenet.get_config(setup)
    assert config.pretrained == OTHERS[name]
    if name == "vit":
        base.objective.name = "lp_ft"
    if name == "resnet50":
        optimizer = config.optimizer
        assert (optimizer.name, optimizer.momentum, optimizer.learning_rate) == ("sgd", 0.9, 0.003)
        assert optimizer.weight_decay == optimizer.clip_norm == 0
        base.data.augment.flip, base.merge.unit = True, "tensor"
        base.optimizer = optimizer
    base.pretrained = config.pretrained
    assert config.to_dict() == base.to_dict()


@pytest.mark.parametrize(
    ("name", "tower", "text", "steps"),
    [
        # Counted from the published tensors of each model; the image tower excludes the head.
        ("vitb32", 87_849_216, 63_428_096, 2502),
        ("vitb16", 86_192_640, 63_428_096, 2502),
        ("vitl14", 303_966_208, 123_650_304, 20018),
        # Together with logit_scale and logit_bias: 375,187,970.
        ("siglip", 92_884_224, 282_303_744, 2502),
        # Together with the pooler: 86,389,248.
        ("vit", 85_798_656, 0, 2502),
        # torchvision's 25,557,032 parameters without the 2,049,000 of the classifier, and a mean
        # and a variance for each of 26,560 channels.
        ("resnet50", 23_561_152, 0, 2502),
    ],
)
def test_sizes_and_steps_are_known_without_data_or_weights(name, tower, text, steps):
    config = load(name)
    config.mesh.replica = config.mesh.data = 1
    programs, outline = abstract_step_functions(config)
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in programs.task.params.items()}
    assert sizes == {"image_tower": tower, "head": (outline.model.feature_size + 1) * 1000}
    from modelstock_jax.models.model import abstract_params

    leaves = jax.tree.leaves(abstract_params(outline.model).get("text_tower", {}))
    assert sum(x.size for x in leaves) == text
    # Table 6: "1 epoch is ~ 2500 iterations" at batch 512.
    assert programs.task.steps_per_epoch == steps and programs.task.num_steps == 10 * steps
    assert num_merges(config, programs) == 10


@pytest.mark.parametrize("name", FILES)
def test_every_config_states_its_command_and_has_only_known_options(name):
    known = set(default.get_config().to_dict())
    assert set(load(name).to_dict()) == known
    text = (importlib.import_module(f"configs.{name}").__doc__) or ""
    if name not in ("default", "imagenet"):
        assert f"python launch.py --config=configs/{name}.py" in text


def test_imagenet_reports_what_is_missing(tmp_path):
    config = imagenet.get_config().data
    with pytest.raises(UserError, match="data.root .*--config.data.root=DIR"):
        benchmark.load(config)
    config.root = str(tmp_path / "nowhere")
    assert "/nowhere: " in benchmark.missing(config)[0]
    config.name = "imagenets"
    with pytest.raises(UserError, match="imagenets.*glyphs, imagenet"):
        benchmark.summarize(config)


def test_glyphs_reject_unsupported_options():
    config = default.get_config().data
    config.real_labels = True
    with pytest.raises(UserError, match="data.real_labels"):
        benchmark.load(config)
    config.real_labels, config.shifts = False, ("v2", "rendition")
    with pytest.raises(UserError, match="'rendition'.*sketch"):
        benchmark.load(config)
