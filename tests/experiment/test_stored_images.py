"""Complete runs on stored images: a small ImageNet in its original formats, and image folders."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.data.made_images import write_folders, write_imagenet
from tests.experiment import small_run


def arguments(config, anchor, root, workdir, *more):
    return [
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.data.root={root}",
        f"--config.pretrained={anchor}",
        "--config.batch_size=8",
        "--config.epochs=2",
        "--config.evaluation.batch_size=8",
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["", ":strong"])
def test_config_of_the_paper_on_a_small_imagenet(tmp_path, setup):
    """Twelve training images of four classes; every shift and ReaL with its own rule."""
    anchor = small_run.save_anchor(tmp_path / "clip")
    root = write_imagenet(tmp_path / "data")
    # Short names: the small text tower has few positions.
    (tmp_path / "names.txt").write_text("".join(f"{n:03d}\n" for n in range(1000)))
    (tmp_path / "prompts.txt").write_text("{}\n")
    command = arguments(
        f"configs/vitb32.py{setup}",
        anchor,
        root,
        tmp_path / "run",
        "--config.compute.dtype=float32",
        "--config.optimizer.warmup_steps=1",
        f"--config.data.class_names={tmp_path / 'names.txt'}",
        f"--config.data.templates={tmp_path / 'prompts.txt'}",
    )
    code, output = small_run.finish(*command)
    assert code == 1 and "Traceback" not in output
    assert re.search("'train': 4 .*1,000 classes", output)
    code, output = small_run.finish(*command, "--config.data.check_counts=False")
    assert code == 0, output
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = document["rows"]
    assert [row["method"] for row in rows][:1] == ["zero_shot"] and len(rows) == 2
    for row in rows:
        assert set(row["shifts"]) == {"v2", "r", "sketch", "objectnet", "a"}
        assert row["avg_shifts"] == pytest.approx(sum(row["shifts"].values()) / 5)
        # Twelve images; four of them have no reassessed label, nine are ObjectNet's.
        for accuracy, counted in ((row["id"], 12), (row["real"], 8)):
            assert accuracy * counted / 100 == pytest.approx(round(accuracy * counted / 100))
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir())


@pytest.mark.slow
def test_image_folders(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    write_folders(tmp_path / "mine" / "train", ["a", "b", "c"], 12)
    write_folders(tmp_path / "mine" / "shifts" / "sketch", ["a", "c"], 3)
    command = arguments("configs/folder.py", anchor, tmp_path / "mine", tmp_path / "run")
    code, output = small_run.finish(*command, "--config.compare=False")
    assert code == 0, output
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [list(row["shifts"]) for row in rows] == [["sketch"]] * 2
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_records_and_worker_processes_change_nothing(tmp_path):
    """The same folders as ArrayRecord, read by two worker processes."""
    anchor = small_run.save_anchor(tmp_path / "clip")
    folders, records = tmp_path / "folders", tmp_path / "records"
    for split in ("train", "validation", "test"):
        write_folders(folders / split, ["a", "b", "c"], 12)
        code, output = small_run.finish(
            "prepare",
            str(folders / split),
            "--set=folder",
            f"--out={records}",
            f"--name={split}",
            program=("-m", "modelstock_jax.data"),
        )
        assert code == 0, output
    runs = {
        "folders": (folders, ()),
        "records": (records, ("--config.data.loader.workers=2",)),
    }
    for name, (root, more) in runs.items():
        command = arguments("configs/folder.py", anchor, root, tmp_path / name, *more)
        code, output = small_run.finish(*command, "--config.compare=False")
        assert code == 0, output
    first, second = (tmp_path / name / "model" / "model.safetensors" for name in runs)
    assert first.read_bytes() == second.read_bytes()
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in runs)
    assert first["rows"] == second["rows"]


@pytest.mark.slow
def test_a_run_that_resizes_on_the_device_resumes(tmp_path):
    """From a cache, with flips and RandAugment; killed after the third step."""
    anchor = small_run.save_anchor(tmp_path / "clip")
    write_folders(tmp_path / "mine" / "train", ["a", "b", "c"], 12)
    commands = {
        name: arguments(
            "configs/folder.py",
            anchor,
            tmp_path / "mine",
            tmp_path / name,
            "--config.compare=False",
            "--config.data.resize_on=device",
            f"--config.data.decoded_cache_dir={tmp_path / 'cache'}",
            "--config.data.decoded_cache_short_side=32",
            "--config.data.augment.randaugment_ops=2",
            "--config.data.augment.randaugment_magnitude=9",
            "--config.checkpoint.save_every_steps=1",
        )
        for name in ("complete", "killed")
    }
    code, output = small_run.finish(*commands["complete"])
    assert code == 0, output
    process = small_run.start(*commands["killed"])
    state = tmp_path / "killed/runs/seed_0/merged/state/3"
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    output, _ = process.communicate()
    assert state.exists() and not (tmp_path / "killed/results.json").exists(), output
    code, output = small_run.finish(*commands["killed"])
    assert code == 0, output
    for name in ("model/model.safetensors", "results.json"):
        complete, killed = ((tmp_path / run / name).read_bytes() for run in commands)
        assert complete == killed, name
