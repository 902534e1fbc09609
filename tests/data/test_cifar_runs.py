"""Complete runs and a study on CIFAR in separate processes: a tiny random CLIP, small datasets."""

from __future__ import annotations

import json
import re

import pytest

from modelstock_jax.data.cifar import CLASS_NAMES
from modelstock_jax.models import checkpoint_io
from tests.data.made_records import cifar_set, write_cifar10
from tests.experiment import small_run

STUDIES = ("-m", "studies")


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    return small_run.save_anchor(tmp_path_factory.mktemp("anchor") / "clip")


def arguments(anchor, root, workdir, *more):
    return [
        "--config=configs/cifar10.py",
        f"--workdir={workdir}",
        f"--config.data.root={root}",
        f"--config.pretrained={anchor}",
        "--config.data.check_counts=False",
        "--config.data.held_out_per_class=1",
        "--config.batch_size=10",
        "--config.epochs=2",
        "--config.evaluation.batch_size=10",
        *more,
    ]


@pytest.mark.slow
def test_a_run(anchor, tmp_path):
    root = write_cifar10(tmp_path / "tfds")
    command = arguments(anchor, root, tmp_path / "run", "--config.evaluation.wise_ft_alphas=(0.5,)")
    code, output = small_run.finish(*command)
    assert code == 0, output
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= {
        "zero_shot",
        "uniform_mean",
        "model_stock",
        "periodic_model_stock",
    }
    for row in rows:
        assert list(row["shifts"]) == ["cifar10_1/v6"]
        assert row["avg_shifts"] == row["shifts"]["cifar10_1/v6"]
        # An accuracy over twenty test images is a multiple of 5 %.
        assert row["id"] / 5 == pytest.approx(round(row["id"] / 5))
    assert checkpoint_io.load(tmp_path / "run" / "model").labels == CLASS_NAMES["cifar10"]


@pytest.mark.slow
def test_generality_study_without_shifts(anchor, tmp_path):
    """The ledger also contains CIFAR-100, whose test set has the same name and size."""
    each = {"cifar10": {"train": 30, "test": 10}, "cifar100": {"train": 3, "test": 1}}
    for name, names in CLASS_NAMES.items():
        cifar_set(tmp_path / "tfds" / name / "3.0.2", names, each[name])
    base = arguments(anchor, tmp_path / "tfds", tmp_path / "study", "--num_seeds=2")
    code, output = small_run.finish("table1", *base, program=STUDIES)
    assert code == 1 and "Traceback" not in output
    assert "data.name='cifar10': " in output and "shifts" in output
    code, output = small_run.finish("generality", *base, "--anchors=tower:resnet", program=STUDIES)
    assert code == 1 and "data.name='cifar10' " in output and "CLIP" in output
    base += ["--config.batch_size=100", "--config.objective.probe_epochs=1"]
    code, output = small_run.finish("generality", *base, program=STUDIES)
    assert code == 0, output
    page = (tmp_path / "study" / "generality.md").read_text()
    assert "The data has no shifts" in page and "avg. shifts" not in page
    assert "SGD: all models have the same distance" in page and "out of distribution" not in page
    hundred = [*base, "--config.data.name=cifar100", "--dry-run"]
    code, output = small_run.finish("generality", *hundred, program=STUDIES)
    # The small text tower has 26 positions.
    assert code == 1 and "Traceback" not in output, output
    assert "context length" in output and " 26" in output, output
    (tmp_path / "prompts.txt").write_text("{}\n")
    hundred.append(f"--config.data.templates={tmp_path / 'prompts.txt'}")
    code, output = small_run.finish("generality", *hundred, program=STUDIES)
    assert code == 1 and re.search("30 of 30 .*10 runs", output), output
