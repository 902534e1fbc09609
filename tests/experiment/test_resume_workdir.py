"""Whose a run's directory is: one config, one process at a time, and nothing damaged by a no."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from configs import default
from modelstock_jax.errors import UserError
from modelstock_jax.experiment import workdir as workdirs
from modelstock_jax.experiment.workdir import FREE, PLACES, ROUNDING, claim, release

# Results depend on these. A key that is new goes here or, if the reasons there hold for it, to one
# of the lists of experiment/workdir.py.
REFUSED = """
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
""".split()


def keys() -> list[str]:
    flat = workdirs.flat(default.get_config().to_dict())
    # Sizes as in Hugging Face's config.json: all of one class, whatever they are.
    return [key for key in flat if not key.startswith("pretrain.clip.")]


def test_every_option_has_exactly_one_class():
    classes = [*FREE, *ROUNDING, *PLACES, *REFUSED]
    assert len(set(classes)) == len(classes)
    assert set(keys()) - set(classes) == set(), "say in which class these are"
    assert set(classes) - set(keys()) == set(), "these are no options"


@pytest.fixture
def made(tmp_path):
    """A workdir in which something was trained, and its config."""
    config = default.get_config()
    claim(tmp_path, config)
    (tmp_path / "runs").mkdir()
    yield tmp_path, config
    release(tmp_path)


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, "more")
    return value + ("x" if isinstance(value, str) else 1)


@pytest.mark.parametrize("key", keys())
def test_each_option_by_its_class(made, key):
    workdir, config = made
    value = dict(_leaves(config))[key]
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.update_from_flattened_dict({key: other(value)})
    before = (workdir / "config.json").read_bytes()

    def kept() -> bool:
        return (workdir / "config.json").read_bytes() == before

    if key in FREE:
        claim(workdir, changed)
        assert not kept()
        return
    with pytest.raises(UserError, match=rf"(?m)^ *{re.escape(key)} ") as refusal:
        claim(workdir, changed)
    assert kept()
    allowed = key in (*ROUNDING, *PLACES)
    assert ("--allow_config_change" in str(refusal.value)) == allowed
    if allowed:
        claim(workdir, changed, allow_change=True)
        assert not kept()
        claim(workdir, changed)
    else:
        with pytest.raises(UserError, match=rf"(?m)^ *{re.escape(key)} "):
            claim(workdir, changed, allow_change=True)
        assert kept()


def _leaves(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_a_mistake_is_mended_where_nothing_was_trained(made):
    workdir, config = made
    (workdir / "runs").rmdir()
    config.epochs = 99
    claim(workdir, config)
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 99


def test_a_refusal_shows_all_that_differs_at_once(made):
    workdir, config = made
    config.epochs, config.mesh.data, config.log_every = 99, 2, 1
    config.data.paths.v2 = "/elsewhere"
    for allow in (False, True):
        with pytest.raises(UserError) as refusal:
            claim(workdir, config, allow_change=allow)
        for line, (key, old, new, kind) in zip(
            str(refusal.value).splitlines()[1:-1],
            [
                ("data.paths.v2", "''", "'/elsewhere'", "place"),
                ("epochs", "10", "99", ""),
                ("mesh.data", "0", "2", "rounding"),
            ],
            strict=True,
        ):
            assert re.search(rf"^ *{key} .*{old}.* {new}.*{kind}", line), line


def test_an_option_that_was_not_there_is_named(made):
    workdir, config = made
    before = json.loads((workdir / "config.json").read_text())
    del before["epochs"]
    (workdir / "config.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=" epochs .*absent.* 10"):
        claim(workdir, config)


def test_a_config_that_cannot_be_read_is_named_and_left(made):
    workdir, config = made
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        claim(workdir, config)
    assert (workdir / "config.json").read_text() == "{"


HOLD = """
import sys, time
from pathlib import Path
from configs import default
from modelstock_jax.experiment.workdir import claim
claim(Path(sys.argv[1]), default.get_config())
print("held", flush=True)
time.sleep(600)
"""


def test_a_directory_in_use_is_refused_until_its_process_dies(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} .*{os.uname()[1]}"):
            claim(tmp_path, default.get_config())
        # Nothing of the holder's was touched: the next one is refused in the same words.
        assert (tmp_path / ".lock").read_text().startswith(f"process {holder.pid} ")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    claim(tmp_path, default.get_config())
    claim(tmp_path, default.get_config())  # The same process may do so again.
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    release(tmp_path)


def test_a_half_written_model_is_removed_and_nothing_else(made):
    workdir, config = made
    for name in (".model.abc.tmp", ".model_openai.abc.tmp", "model", ".other.tmp"):
        (workdir / name).mkdir()
        (workdir / name / "file").touch()
    claim(workdir, config)
    assert {p.name for p in workdir.iterdir() if p.is_dir()} == {"model", ".other.tmp", "runs"}


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="workdir.*file"):
        claim(tmp_path / "file", default.get_config())
    with pytest.raises(UserError, match="--workdir=.*file/run"):
        claim(tmp_path / "file" / "run", default.get_config())

    def read_only(*_):
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, whom no mode of a directory stops.
    monkeypatch.setattr(workdirs.os, "open", read_only)
    with pytest.raises(UserError, match="--workdir.*Permission denied"):
        claim(tmp_path / "run", default.get_config())


def test_a_full_disk_damages_nothing(made, monkeypatch):
    workdir, config = made
    before = (workdir / "config.json").read_bytes()
    config.num_seeds += 1

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="config.json.*No space left"):
        claim(workdir, config)
    assert (workdir / "config.json").read_bytes() == before
    assert sorted(p.name for p in workdir.iterdir()) == [".lock", "config.json", "runs"]
