"""One call of the studies on drawn models: what it trains, from which anchors, and what it says."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from configs import glyphs
from modelstock_jax.errors import UserError
from studies import runner
from studies.bench import StudyContext
from studies.catalog import STUDIES
from studies.ledger import Ledger
from tests.studies.bench import DrawnBench

WORLD = SimpleNamespace(shifts={"v2": None})


class Trainings:
    """As `studies.run_store.RunStore`; remembers what it was asked for."""

    steps_per_epoch = 10

    def __init__(self):
        self.done = {}

    def title(self, run):
        return f"replicas of seed {run.seed}"

    def is_here(self, run):
        return run in self.done

    def steps(self, run):
        return 20

    def train(self, run, title):
        self.done[run] = title


class Drawn(DrawnBench, StudyContext):
    def __init__(self, config, workdir, ledger, data=None):
        super().__init__()
        self.config, self.ledger, self.data = config, ledger, data or WORLD
        self.fingerprint = config.pretrained.upper()
        self.trained = Trainings()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Bench", Drawn)

    def start(name, anchors):
        config = glyphs.get_config()
        config.pretrained = "one"
        ledger = Ledger(tmp_path / "measured.jsonl")
        made = runner.Runner(config, tmp_path, ledger, tmp_path, 2, anchors, ["--config.seed=3"])
        made.plan([STUDIES[name]])
        made.run(STUDIES[name])
        return made

    return start


def test_a_study_from_two_anchors(run, tmp_path, capsys):
    benches = run("fig6", ["two"])._benches
    assert benches["two"].data is benches["one"].data
    for bench in benches.values():
        assert list(bench.trained.done.values()) == ["fig6: replicas of seed 0 (1 of 1)"]
    said = capsys.readouterr().out
    assert re.search("2 of 2 .*2 runs", said)
    document = json.loads((tmp_path / "fig6_anchors.json").read_text())
    assert set(document["further"]) == {"two"}
    command = "python -m studies fig6 --config.seed=3 --num_seeds=2 --anchors=two"
    assert document["command"] == command
    assert f"`{command}`" in (tmp_path / "fig6_anchors.md").read_text()
    run("fig6", ["two"])
    assert re.search("0 of 2 .*0 runs", capsys.readouterr().out)
    # The page of one anchor is made of the same lines, and leaves the other as it is.
    run("fig6", [])
    assert "further" not in json.loads((tmp_path / "fig6.json").read_text())
    assert "further" in json.loads((tmp_path / "fig6_anchors.json").read_text())


@pytest.mark.parametrize(
    "argument,message",
    [
        ("--config.num_seeds=8", "--config.num_seeds=8: .* --num_seeds"),
        ("--config.num_replicas=3", "num_replicas=3"),
        ("--config.merge.every=never", "merge.every=never"),
    ],
)
def test_what_a_study_would_pass_over_is_refused(tmp_path, argument, message):
    ledger = Ledger(tmp_path / "measured.jsonl")
    with pytest.raises(UserError, match=message):
        runner.Runner(glyphs.get_config(), tmp_path, ledger, tmp_path, 2, (), [argument])


def test_where_nothing_can_be_written_is_known_first(tmp_path):
    ledger, taken = Ledger(tmp_path / "measured.jsonl"), tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(UserError, match="--out=.*taken: "):
        runner.Runner(glyphs.get_config(), tmp_path, ledger, taken)


def test_an_anchor_that_comes_twice(run):
    with pytest.raises(UserError, match="--anchors=ONE: .* one"):
        run("fig6", ["ONE"])
