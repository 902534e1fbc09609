"""A workdir belongs to one config and one process at a time; an error changes nothing in it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from configs import default
from modelstock_jax import flags
from modelstock_jax.errors import UserError
from modelstock_jax.experiment import workdir as workdirs
from modelstock_jax.experiment.options import option
from modelstock_jax.experiment.workdir import changed_options, lock_workdir, unlock_workdir
from modelstock_jax.flags import current_names

# Options of the first workdirs by kind, with the names of that time. No option is added here.
FIRST = {
    None: """
    task image_size seed num_replicas compare epochs batch_size label_smoothing
    data.name data.held_out data.shifts data.real data.validation_share data.test_share
    data.cache data.cache_short_side
    data.augment.crop_area data.augment.crop_ratio data.augment.flip data.augment.randaugment_ops
    data.augment.randaugment_magnitude data.augment.mixup
    objective.name objective.head objective.car_ft_alpha objective.l2_sp_alpha objective.l2_sp_beta
    objective.probe_epochs objective.probe_learning_rate
    optimizer.name optimizer.learning_rate optimizer.weight_decay optimizer.decay_to_pretrained
    optimizer.b1 optimizer.b2 optimizer.eps optimizer.momentum optimizer.clip_norm
    optimizer.projection.name optimizer.projection.norm optimizer.projection.learning_rate
    optimizer.projection.k optimizer.projection.steps
    optimizer.warmup_steps optimizer.warmup_fraction optimizer.final_fraction
    per_replica.learning_rate per_replica.weight_decay per_replica.epochs
    per_replica.label_smoothing per_replica.mixup per_replica.augment_strength
    per_replica.randaugment_ops per_replica.randaugment_magnitude
    merge.every merge.method merge.unit merge.opt_state merge.carry_noise
    compute.dtype
    evaluation.max_shift_images evaluation.wise_ft_alphas evaluation.units
    pretrain.num_steps pretrain.tokenizer
    """,
    "extends": """
    num_seeds search.learning_rates export.layouts
    """,
    "ignored": """
    log_every checkpoint.every checkpoint.keep
    checkpoint.keep_merged compute.compilation_cache data.check_counts
    data.loading.threads data.loading.workers data.loading.prefetch data.loading.unreadable
    watch.max_events watch.spike_deviations watch.spike_window
    """,
    "numerical": """
    accumulate_steps mesh.replica mesh.data mesh.fsdp_min_size
    compute.execution compute.remat compute.attention evaluation.batch_size watch.policy
    """,
    "path": """
    pretrained data.root data.class_names data.templates
    data.paths.train data.paths.validation data.paths.test data.paths.v2 data.paths.r
    data.paths.sketch data.paths.objectnet data.paths.a data.paths.real
    """,
}


def keys() -> list[str]:
    flat = workdirs.flatten(default.get_config().to_dict())
    # Sizes as in Hugging Face's config.json: all of one kind.
    return [key for key in flat if not key.startswith("pretrain.clip.")]


def first_keys() -> dict[str, str | None]:
    """Return the kind of each of these options, by its current name."""
    kinds = {name: kind for kind, names in FIRST.items() for name in names.split()}
    return current_names(kinds)


def test_first_options_keep_their_kinds():
    assert {key: option(key).resume for key in first_keys()} == first_keys()
    assert first_keys().keys() - set(keys()) == set(), "add the current names of these to RENAMED"


def test_later_option_has_a_value_for_its_absence():
    later = set(keys()) - first_keys().keys()
    assert [key for key in later if option(key).absent is None] == []


@pytest.fixture
def run_dir(tmp_path):
    """Return a workdir in which something was trained, and its config."""
    config = default.get_config()
    lock_workdir(tmp_path, config)
    (tmp_path / "runs").mkdir()
    yield tmp_path, config
    unlock_workdir(tmp_path)


@pytest.mark.parametrize("name", ["results.json", "model"])
def test_results_without_the_runs_belong_to_their_config(run_dir, name):
    workdir, config = run_dir
    (workdir / "runs").rmdir()
    (workdir / name).mkdir()
    (workdir / ".model.1.old").mkdir()  # left by a kill
    changed = config.copy_and_resolve_references()
    changed.epochs += 1
    with pytest.raises(UserError, match="epochs"):
        lock_workdir(workdir, changed)
    assert (workdir / ".model.1.old").exists()
    lock_workdir(workdir, config)
    assert not (workdir / ".model.1.old").exists()


@pytest.mark.parametrize("text", ["{", "3"])
def test_a_damaged_config_is_a_user_error(run_dir, text):
    workdir, config = run_dir
    (workdir / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        lock_workdir(workdir, config)


def other(value):
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "more")
    return value + ("x" if isinstance(value, str) else 1)


@pytest.mark.parametrize("key", keys())
def test_change_of_each_option(run_dir, key):
    workdir, config = run_dir
    value = dict(_leaves(config))[key]
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.update_from_flattened_dict({key: other(value)})
    before = (workdir / "config.json").read_bytes()

    def unchanged() -> bool:
        return (workdir / "config.json").read_bytes() == before

    options = (c.to_dict() for c in (config, changed))
    assert changed_options(*options) == ([] if option(key).resume == "ignored" else [key])
    if option(key).resume in ("ignored", "extends"):
        lock_workdir(workdir, changed)
        assert not unchanged()
        return
    with pytest.raises(UserError, match=rf"(?m)^ *{re.escape(key)} ") as error:
        lock_workdir(workdir, changed)
    assert unchanged()
    allowed = option(key).resume is not None
    assert ("--allow_config_change" in str(error.value)) == allowed
    if allowed:
        lock_workdir(workdir, changed, allow_change=True)
        assert not unchanged()
        lock_workdir(workdir, changed)
    else:
        with pytest.raises(UserError, match=rf"(?m)^ *{re.escape(key)} "):
            lock_workdir(workdir, changed, allow_change=True)
        assert unchanged()


def _leaves(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_config_can_change_before_anything_is_trained(run_dir):
    workdir, config = run_dir
    (workdir / "runs").rmdir()
    config.epochs = 99
    lock_workdir(workdir, config)
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 99


def test_error_lists_all_differences(run_dir):
    workdir, config = run_dir
    config.epochs, config.mesh.data, config.log_every_steps = 99, 2, 1
    config.data.paths.v2 = "/elsewhere"
    for allow in (False, True):
        with pytest.raises(UserError) as error:
            lock_workdir(workdir, config, allow_change=allow)
        for line, (key, old, new, kind) in zip(
            str(error.value).splitlines()[1:-1],
            [
                ("data.paths.v2", "''", "'/elsewhere'", "path"),
                ("epochs", "10", "99", ""),
                ("mesh.data", "0", "2", "numerical"),
            ],
            strict=True,
        ):
            assert re.search(rf"^ *{key} .*{old},? .*{new}(?!\w).*{kind}", line), line


def test_error_names_an_absent_option(run_dir):
    workdir, config = run_dir
    before = json.loads((workdir / "config.json").read_text())
    del before["epochs"]
    (workdir / "config.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=" epochs .*absent.* 10"):
        lock_workdir(workdir, config)


LATER = [key for key in keys() if option(key).absent is not None]


@pytest.mark.parametrize("key", LATER)
def test_absent_later_option_has_its_value_for_absence(run_dir, key):
    workdir, config = run_dir
    before = json.loads((workdir / "config.json").read_text())
    *groups, name = key.split(".")
    group = before
    for name_of_group in groups:
        group = group[name_of_group]
    del group[name]
    (workdir / "config.json").write_text(json.dumps(before))
    config.update_from_flattened_dict({key: option(key).absent})
    lock_workdir(workdir, config)
    assert key in workdirs.flatten(json.loads((workdir / "config.json").read_text()))
    (workdir / "config.json").write_text(json.dumps(before))
    config.update_from_flattened_dict({key: other(option(key).absent)})
    if option(key).resume in ("ignored", "extends"):
        lock_workdir(workdir, config)
        return
    with pytest.raises(UserError, match=f"{key} was absent, is "):
        lock_workdir(workdir, config)


def test_config_with_old_names_is_read(run_dir, monkeypatch):
    workdir, config = run_dir
    path = workdir / "config.json"
    config.evaluation.units = ("layer", "filter")
    monkeypatch.setitem(flags.RENAMED_VALUES, "evaluation.units", {"row": "filter"})
    now = json.loads(json.dumps(config.to_dict()))
    before = json.loads(path.read_text())
    monitor = before.pop("monitor")
    before["watch"] = {
        "policy": monitor["on_non_finite"],
        "max_events": monitor["max_non_finite_steps"],
        "spike_deviations": monitor["spike_deviations"],
        "spike_window": monitor["spike_window"],
    }
    before["log_every"] = before.pop("log_every_steps")
    before["compute"]["execution"] = before["compute"].pop("replica_mode")
    before["data"]["loading"] = before["data"].pop("loader")
    before["merge"]["method"], before["evaluation"]["units"] = "stock", ["layer", "row"]
    path.write_text(json.dumps(before))
    lock_workdir(workdir, config)
    assert json.loads(path.read_text()) == now
    path.write_text(json.dumps(before))
    config.merge.method, config.monitor.on_non_finite = "uniform_mean", "skip_step"
    config.compute.replica_mode = "map"
    with pytest.raises(UserError) as error:
        lock_workdir(workdir, config)
    assert str(error.value).splitlines()[1:-1] == [
        "  compute.replica_mode was 'auto', is 'map' (numerical)",
        "  merge.method was 'model_stock', is 'uniform_mean'",
        "  monitor.on_non_finite was 'stop', is 'skip_step' (numerical)",
    ]


def test_unreadable_config_is_named_and_not_changed(run_dir):
    workdir, config = run_dir
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        lock_workdir(workdir, config)
    assert (workdir / "config.json").read_text() == "{"


LOCK = """
import sys, time
from pathlib import Path
from configs import default
from modelstock_jax.experiment.workdir import changed_options, lock_workdir
lock_workdir(Path(sys.argv[1]), default.get_config())
print("locked", flush=True)
time.sleep(600)
"""


def test_directory_is_locked_until_its_process_ends(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {holder.pid} .*{os.uname()[1]}"):
            lock_workdir(tmp_path, default.get_config())
        # The lock file is unchanged, so that the next process gets the same message.
        assert (tmp_path / ".lock").read_text().startswith(f"process {holder.pid} ")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    lock_workdir(tmp_path, default.get_config())
    lock_workdir(tmp_path, default.get_config())  # The same process can lock it again.
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    unlock_workdir(tmp_path)


def test_only_a_partial_model_is_removed(run_dir):
    workdir, config = run_dir
    left = (".model.abc.tmp", ".model.abc.old", ".model_openai.abc.tmp")
    for name in (*left, "model", ".other.tmp"):
        (workdir / name).mkdir()
        (workdir / name / "file").touch()
    lock_workdir(workdir, config)
    assert {p.name for p in workdir.iterdir() if p.is_dir()} == {"model", ".other.tmp", "runs"}


def test_error_if_the_directory_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="workdir.*file"):
        lock_workdir(tmp_path / "file", default.get_config())
    with pytest.raises(UserError, match="--workdir=.*file/run"):
        lock_workdir(tmp_path / "file" / "run", default.get_config())

    def read_only(*_):
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, which ignores the mode of a directory.
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UserError, match="--workdir.*Permission denied"):
        lock_workdir(tmp_path / "run", default.get_config())


def test_full_disk_damages_nothing(run_dir, monkeypatch):
    workdir, config = run_dir
    before = (workdir / "config.json").read_bytes()
    config.num_seeds += 1

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="config.json.*No space left"):
        lock_workdir(workdir, config)
    assert (workdir / "config.json").read_bytes() == before
    assert sorted(p.name for p in workdir.iterdir()) == [".lock", "config.json", "runs"]
