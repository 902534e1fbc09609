"""Files of an earlier version, with the old names of methods and options, are read.

`old_workdir` has the files of a run of that version: a CLIP of one block, one seed, 8 steps. Its
value of `pretrained` is replaced.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from modelstock_jax.experiment import comparison
from modelstock_jax.registry import RENAMED_ROWS, ROWS
from modelstock_jax.reporting.tables import read_results, summarize
from tests.experiment import small_run

OLD = Path(__file__).parent / "old_workdir"
SEED_0 = OLD / "runs/seed_0/results.json"
METHODS = [
    ("replica", None, "single_model", None),
    ("replica", None, "single_model", None),
    ("wise_ft", "replica", "wise_ft", "single_model"),
    ("mean", None, "uniform_mean", None),
    ("wise_ft", "mean", "wise_ft", "uniform_mean"),
    ("constant_ratio", None, "constant_ratio", None),
    ("model_stock", None, "model_stock", None),
    ("weighted", None, "weighted_model_stock", None),
    ("periodic", None, "periodic_model_stock", None),
]


def names(rows):
    return [(row["method"], row.get("of")) for row in rows]


def values(rows):
    return [{key: row[key] for key in row if key not in ("method", "of")} for row in rows]


def test_finished_seed_has_the_current_names():
    old = json.loads(SEED_0.read_text())
    assert names(old["rows"]) == [(method, of) for method, of, _, _ in METHODS]
    document = comparison._read(SEED_0)
    assert names(document["rows"]) == [(method, of) for _, _, method, of in METHODS]
    assert values(document["rows"]) == values(old["rows"])
    assert document["geometry"] == old["geometry"]


@pytest.mark.parametrize("path", [OLD, small_run.ROOT / "docs/results/glyphs.json"])
def test_results_file_has_the_current_names(path):
    file = path / "results.json" if path.is_dir() else path
    old, document = json.loads(file.read_text()), read_results(path)
    rows = document["rows"]
    assert {row["method"] for row in rows} <= ROWS.keys() - RENAMED_ROWS.keys()
    assert {row.get("of") for row in rows} == {None, "single_model", "uniform_mean"}
    assert values(rows) == values(old["rows"]) and document["config"] == old["config"]
    # The summary has the same values under the names and labels of its rows.
    for entry, before, summary in zip(
        document["summary"], old["summary"], summarize(rows), strict=True
    ):
        assert (entry["method"], entry["of"]) == (summary.method, summary.of)
        assert entry["label"] == summary.label
        for key in before.keys() - {"method", "of", "label"}:
            assert entry[key] == before[key], key


@pytest.mark.slow
def test_run_with_a_finished_seed_of_the_old_version_continues(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    workdir = tmp_path / "run"
    shutil.copytree(OLD, workdir)
    config = json.loads((OLD / "config.json").read_text())
    assert "watch" in config and config["merge"]["method"] == "stock"
    (workdir / "config.json").write_text(json.dumps(config | {"pretrained": str(anchor)}))
    code, output = small_run.finish(
        "--config=configs/glyphs.py",
        f"--workdir={workdir}",
        f"--config.pretrained={anchor}",
        "--config.num_seeds=2",
        "--config.batch_size=512",
        "--config.epochs=1",
        "--config.evaluation.wise_ft_alphas=(0.5,)",
        "--config.data.shifts=('v2',)",
    )
    assert code == 0, output
    rows = json.loads((workdir / "results.json").read_text())["rows"]
    seeds = {seed: [row for row in rows if row["seed"] == seed] for seed in (None, 0, 1)}
    assert names(seeds[None]) == [("zero_shot", None)]
    assert names(seeds[0]) == names(seeds[1]) == [(method, of) for _, _, method, of in METHODS]
    # The option export.which is newer; configs/glyphs.py sets it.
    (exported,) = (row for row in rows if row.pop("exported", False))
    assert (exported["method"], exported["seed"]) == ("model_stock", 0)
    # The old seed was read, not trained again.
    assert values(seeds[0]) == values(json.loads(SEED_0.read_text())["rows"])
    assert (workdir / "runs/seed_0/results.json").read_bytes() == SEED_0.read_bytes()
    # Both seeds are one row of the table.
    table = (workdir / "results.md").read_text()
    assert "over 2 seeds" in table
    assert table.count("| Uniform mean of 2 replicas |") == table.count("| Single fine-tuned") == 1
    assert json.loads((workdir / "config.json").read_text())["merge"]["method"] == "model_stock"
