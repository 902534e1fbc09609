"""Complete runs as separate processes, from the command to the results, with kills."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections import Counter

import jax
import numpy as np
import pytest

from configs import glyphs
from modelstock_jax.experiment.comparison import merged_models
from modelstock_jax.merging import report
from modelstock_jax.models import checkpoint_io
from modelstock_jax.reporting.timeline import read_timeline
from tests.experiment import small_run


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    return small_run.save_anchor(tmp_path_factory.mktemp("anchor") / "clip")


@pytest.fixture(scope="module")
def finished(anchor, tmp_path_factory):
    """The workdir and output of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    code, output = small_run.finish(*small_run.arguments(anchor, workdir))
    assert code == 0, output
    return workdir, output


def test_single_replica_without_merging_has_no_merged_rows():
    """A merge would be an error, but only after the training."""
    config = glyphs.get_config()
    config.num_replicas, config.merge.every = 1, "never"
    anchor, replicas = {"w": np.zeros(4, np.float32)}, {"w": np.ones((1, 4), np.float32)}
    stats, models, count = merged_models(config, anchor, replicas, num_heads=1)
    rows = [(model.method, model.details.get("alpha")) for model in models]
    alphas = config.evaluation.wise_ft_alphas
    assert rows == [("single_model", None), *(("wise_ft", alpha) for alpha in alphas)]
    assert count == len(rows) and report(stats)[0]["angle"] is None


def test_run_writes_everything(finished):
    workdir, output = finished
    results = json.loads((workdir / "results.json").read_text())
    methods = [row["method"] for row in results["rows"]]
    assert methods[0] == "zero_shot" and methods[-1] == "periodic_model_stock"
    assert {"single_model", "uniform_mean", "wise_ft", "constant_ratio", "model_stock"} <= {
        *methods
    }
    assert "weighted_model_stock" in methods
    for row in results["rows"]:
        assert {"method", "id", "shifts", "avg_shifts", "seed", "cost"} <= row.keys()
        assert set(row["shifts"]) == {"v2", "sketch"}
        assert row["avg_shifts"] == pytest.approx(np.mean(list(row["shifts"].values())))
        assert 0 <= row["id"] <= 100
    rows = {row["method"]: row for row in results["rows"]}
    # By definition, constant_ratio has the distance of model_stock to the anchor; float32 weights.
    assert rows["constant_ratio"]["distance_to_anchor"] == pytest.approx(
        rows["model_stock"]["distance_to_anchor"], rel=1e-5
    )
    assert rows["zero_shot"]["distance_to_anchor"] == 0 and rows["zero_shot"]["cost"] == 0
    assert (
        rows["periodic_model_stock"]["cost"] == 2
        and rows["periodic_model_stock"]["predicted_distance"] is None
    )
    predicted = [
        rows[m]["predicted_distance"] for m in ("single_model", "uniform_mean", "model_stock")
    ]
    assert predicted[0] > predicted[1] > predicted[2] > 0
    assert (workdir / "results.md").read_text().count("|") > 50
    for name in ("id_against_shifts", "angle_by_layer", "ratio_over_epochs"):
        assert (workdir / f"figures/{name}.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"seed_0/merged", "seed_0/unmerged"}
    assert list(workdir.rglob("events.out.tfevents*"))
    assert "Model Stock" in output and "images/s" in output
    assert re.search(r"[\d.]+ s per merge, [\d.]+ % of an epoch", output)
    table = output[output.index("Time by phase") :]
    for phase in ("training", "merging", "saving", "evaluating", "exporting", "compiling"):
        assert phase in table, table


def test_timeline_has_the_start_and_end_of_every_phase(finished):
    workdir, _ = finished
    lines = read_timeline(workdir / "timeline.jsonl")
    depth = Counter()
    for line in lines:
        depth[line["phase"]] += 1 if line["event"] == "begin" else -1
        assert depth[line["phase"]] >= 0
    assert set(depth.values()) == {0}
    assert set(depth) == {"restore", "merge", "save", "evaluate", "export"}
    merged = [line["step"] for line in lines if line["phase"] == "merge"]
    assert merged == [8, 8, 16, 16]
    saves = [line["step"] for line in lines if line["phase"] == "save" and line["event"] == "end"]
    assert Counter(saves)[16] == 3, "the states of both runs, and the merged model"


def test_exported_model_is_the_evaluated_one(finished, anchor):
    workdir, _ = finished
    model = checkpoint_io.load(workdir / "model")
    assert model.labels is not None and len(model.labels) == 62
    text = checkpoint_io.load(anchor).params["text_tower"]
    jax.tree.map(np.testing.assert_array_equal, model.params["text_tower"], text)
    card = (workdir / "model/README.md").read_text()
    assert "model-stock" in card and checkpoint_io.load(anchor).checksum in card
    last = workdir / "runs/seed_0/merged/models/16"
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    (exported,) = (row for row in rows if row.get("exported"))
    # configs/glyphs.py exports Model Stock after training.
    assert exported["method"] == "model_stock"
    assert rows[-1]["method"] == "periodic_model_stock"
    assert "after training (exported) |" in (workdir / "results.md").read_text()
    assert "merge after training" in card and "after training (exported) |" in card
    for checkpoint, row in ((workdir / "model", exported), (last, rows[-1])):
        code, output = small_run.finish(
            "--mode=eval",
            f"--checkpoint={checkpoint}",
            f"--config.pretrained={anchor}",
            "--config.data.shifts=('v2','sketch')",
        )
        assert code == 0, output
        assert f"{row['id']:.2f}" in output and f"{row['avg_shifts']:.2f}" in output


@pytest.mark.parametrize("which", [pytest.param("merged", marks=pytest.mark.slow), "best"])
def test_a_finished_run_can_export_another_model(finished, anchor, tmp_path, which):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    arguments = small_run.arguments(anchor, workdir, f"--config.export.which={which}")
    code, output = small_run.finish(*arguments)
    assert code == 0, output
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    before = json.loads((finished[0] / "results.json").read_text())["rows"]
    (exported,) = (row for row in rows if row.get("exported"))
    if which == "merged":
        assert exported["method"] == "periodic_model_stock"
    else:
        seed_0 = [row for row in rows if row["seed"] == 0]
        assert exported["validation"] == max(row["validation"] for row in seed_0)
        assert "validation" in output
    for row, old in zip(rows, before, strict=True):  # Nothing was trained again.
        assert {**row, "exported": 0, "validation": 0} == {**old, "exported": 0, "validation": 0}
    code, output = small_run.finish(
        "--mode=eval",
        f"--checkpoint={workdir / 'model'}",
        "--config.data.shifts=('v2','sketch')",
    )
    assert code == 0 and f"{exported['id']:.2f}" in output, output
    assert f"{exported['avg_shifts']:.2f}" in output


@pytest.mark.slow  # It compiles other programs than the other tests.
def test_a_run_without_a_merge_says_that_it_exports_no_model(anchor, tmp_path):
    options = ("--config.num_replicas=1", "--config.merge.every=never")
    code, output = small_run.finish(*small_run.arguments(anchor, tmp_path, *options))
    assert code == 0 and (tmp_path / "results.json").exists(), output
    assert not (tmp_path / "model").exists()
    (line,) = [line for line in output.splitlines() if "exported" in line]
    assert "no model" in line and "--config.export.which=best" in line


def test_same_command_again_changes_nothing(finished, anchor):
    workdir, first_output = finished

    def everything():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in (workdir, *workdir.rglob("*"))
        }

    before = everything()
    ignored = ("--config.log_every_steps=7", "--config.checkpoint.keep=2")
    code, output = small_run.finish(*small_run.arguments(anchor, workdir), *ignored)
    assert code == 0 and everything() == before, output
    code, output = small_run.finish(*small_run.arguments(anchor, workdir))
    assert code == 0 and everything() == before, output
    start = first_output.index("method")
    end = first_output.index("Time by phase")
    assert first_output[start:end].strip() in output
    assert "compiling" not in output and "evaluate " not in output
    # A missing result is written again.
    (workdir / "results.md").unlink()
    code, output = small_run.finish(*small_run.arguments(anchor, workdir))
    assert code == 0 and "Time by phase" in output, output
    after = everything()
    for name in ("results.md", "results.json", "metrics.jsonl", "model/README.md"):
        assert after[workdir / name][1] == before[workdir / name][1], name


@pytest.mark.parametrize(
    "kind", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_resume_after_a_kill_in_the_middle_of_an_epoch(finished, anchor, tmp_path, kind):
    arguments = small_run.arguments(anchor, tmp_path)
    process = small_run.start(*arguments)
    # Step 11 is in the middle of the second epoch, after one merge.
    state = tmp_path / "runs/seed_0/merged/state"
    deadline = time.monotonic() + 400
    while not any(int(p.name) >= 9 for p in state.glob("*") if p.name.isdigit()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(kind)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if kind == signal.SIGKILL else 143), output
    assert not (tmp_path / "results.json").exists()
    if kind == signal.SIGTERM:
        assert "same command" in output
    code, output = small_run.finish(*arguments)
    assert code == 0, output
    assert "from step" in output
    uninterrupted, _ = finished
    for name in ("results.md", "model/model.safetensors", "model/head.safetensors"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    directories = (tmp_path, uninterrupted)
    resumed, expected = (json.loads((d / "results.json").read_text()) for d in directories)
    assert resumed == expected
    resumed, expected = ((d / "metrics.jsonl").read_text() for d in directories)
    assert resumed == expected
