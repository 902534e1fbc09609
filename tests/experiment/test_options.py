"""Invalid options end a run before anything is opened, and leave no files."""

from __future__ import annotations

import pytest
from ml_collections import ConfigDict

from configs import default, glyphs, vitb16, vitb32, vitl14
from modelstock_jax import flags
from modelstock_jax.errors import UserError
from modelstock_jax.experiment import evaluate_checkpoint, run
from modelstock_jax.experiment.options import OPTIONS, check_options
from modelstock_jax.fileio import flatten

INVALID = {
    "task": ("fine-tune", "finetune, learning_rate"),
    "data.name": ("glyph", "glyphs, imagenet"),
    "data.augment.crop_area": ((0.9, 1.1), "at most 1"),
    "data.augment.randaugment_magnitude": (31, "between 0 and 30"),
    "data.loader.unreadable": ("ignore", "error, skip"),
    # Valid, but the synthetic images are not stored.
    "data.resize_on": ("device", "data.resize_on='host'"),
    "objective.name": ("car_fft", "cross_entropy, car_ft"),
    "objective.head": ("zeroshot", "zero_shot, random"),
    "optimizer.name": ("adam", "adamw, sgd"),
    "optimizer.projection.name": ("ftpp", "none, ftp"),
    "optimizer.projection.norm": ("l3", "l2, mars"),
    "per_replica.learning_rate": (
        (1e-3,),
        "has 1 value for 2 replicas; set one value per replica, for example "
        '--config.per_replica.learning_rate="(0.001,0.001)"',
    ),
    "merge.every": ("epochs", "'epoch', 'end'"),
    "merge.method": ("stocks", "model_stock, uniform_mean"),
    "merge.unit": ("tensors", "tensor, layer"),
    "merge.opt_state": ("kept", "keep, average"),
    "merge.carry_noise": ("no", "off, every"),
    "compute.dtype": ("float23", "float32, bfloat16"),
    "compute.attention_impl": ("flash", "xla, cudnn"),
    "compute.replica_mode": ("pmap", "auto, vmap"),
    "monitor.on_non_finite": ("ignore", "stop, skip_step"),
    "monitor.transfer_guard": ("forbid", "allow, log"),
    "evaluation.units": (("layers",), "tensor, layer"),
    "export.which": ("after-training", "merged, after_training"),
    "export.formats": (("huggingface",), "hugging_face, open_clip"),
    # Numbers that caused a division by zero, an empty list or a step in the wrong direction.
    "seed": (-1, "at least 0"),
    "num_seeds": (0, "at least 1"),
    "num_replicas": (0, "at least 1"),
    "epochs": (0, "at least 1"),
    "batch_size": (0, "at least 1"),
    "label_smoothing": (1.0, "in [0, 1)"),
    "data.augment.mixup": (-0.1, "at least 0"),
    "optimizer.clip_norm": (-1.0, ">= 0"),
    "optimizer.final_lr_fraction": (-0.1, "in [0, 1]"),
    "checkpoint.save_every_steps": (0, "at least 1"),
    "checkpoint.keep": (-1, "at least 0"),
    "monitor.spike_window": (0, "at least 1"),
    "log_every_steps": (0, "at least 1"),
    "evaluation.batch_size": (0, "at least 1"),
    "search.learning_rates": ((), "at least one learning rate"),
}


@pytest.mark.parametrize("key", INVALID)
def test_invalid_option_is_an_error_before_anything_is_opened(key, tmp_path):
    config = glyphs.get_config()
    config.pretrained = str(tmp_path / "opened")  # It does not exist: opening it is another error.
    value, choices = INVALID[key]
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=key.rsplit(".", 1)[-1]) as error:
        run(config, tmp_path / "run")
    assert choices in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("old", [name for name in flags.RENAMED if not name.endswith(".")])
def test_an_old_name_in_a_config_file_is_an_error_with_the_new_name(old):
    """Without the error, assigning it would add an option that nothing reads."""
    config = glyphs.get_config()
    with config.unlocked():
        group, _, last = old.rpartition(".")
        if group and group not in config:
            config[group] = ConfigDict()
        (config[group] if group else config)[last] = 5
    (new,) = flags.current_names({old: 5})
    with pytest.raises(UserError, match=f"^{old} is now {new};"):
        check_options(config)


@pytest.mark.parametrize(("old", "new"), flags.RENAMED_VALUES["merge.method"].items())
def test_an_old_merge_method_is_an_error_with_the_new_name(old, new):
    config = glyphs.get_config()
    config.merge.method = old
    with pytest.raises(UserError, match=f"'{old}' is now '{new}'"):
        check_options(config)


@pytest.mark.parametrize("module", [default, glyphs, vitb32, vitb16, vitl14])
def test_configs_are_valid(module):
    check_options(module.get_config())


def test_a_single_replica_is_an_error_only_if_it_would_be_merged():
    config = glyphs.get_config()
    config.num_replicas = 1
    message = "num_replicas=1: a merge needs at least 2 replicas; set --config.num_replicas=2 or "
    with pytest.raises(UserError, match=message + "--config.merge.every=never"):
        check_options(config)
    config.merge.every = "never"
    check_options(config)
    config.merge.every, config.task = "epoch", "learning_rate"
    check_options(config)


def test_every_row_belongs_to_an_option():
    names = flatten(default.get_config().to_dict())
    unknown = [key for key in OPTIONS
            if not any(name == key or name.startswith(key.removesuffix("*"))
                       for name in names)]  # fmt: skip
    assert not unknown
    wrong = [key for key, row in OPTIONS.items()
                if row.resume in ("ignored", "numerical") and row.in_checksum]  # fmt: skip
    assert not wrong, "a weight depends on these"


def test_evaluation_uses_the_options_of_a_run(tmp_path):
    """It uses the compilation cache of a run, and checks names first."""
    config = glyphs.get_config()
    (tmp_path / "file").write_text("a file")
    config.compute.compilation_cache = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="compute.compilation_cache=.*file"):
        evaluate_checkpoint(config, str(tmp_path / "nowhere"))
    config.compute.dtype = "float23"
    with pytest.raises(UserError, match="float23"):
        evaluate_checkpoint(config, str(tmp_path / "nowhere"))
