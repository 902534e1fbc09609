"""One call of the studies on random models: what it trains, from which anchors, and its output."""

from __future__ import annotations

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest

from configs import glyphs
from modelstock_jax.errors import UserError
from studies import runner
from studies.catalog import STUDIES
from studies.image_context import ImageContext
from studies.ledger import Ledger
from tests.studies.context import DrawnContext

DATA = SimpleNamespace(shifts={"v2": None})


class FakeRunStore:
    """Like `studies.run_store.RunStore`, without training; records the runs."""

    steps_per_epoch = 10

    def __init__(self):
        self.done = {}

    def title(self, run):
        return f"replicas of seed {run.seed}"

    def is_trained(self, run):
        return run in self.done

    def steps(self, run):
        return 20

    def train(self, run, title):
        self.done[run] = title


class FakeContext(DrawnContext, ImageContext):
    def __init__(self, config, workdir, ledger, data=None):
        super().__init__()
        self.config, self.ledger, self.data = config, ledger, data or DATA
        self.checksum = config.pretrained.upper()
        self.runs = FakeRunStore()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ImageContext", FakeContext)

    def start(name, anchors):
        config = glyphs.get_config()
        config.pretrained = "one"
        ledger = Ledger(tmp_path / "measured.jsonl")
        study_runner = runner.Runner(
            config,
            tmp_path,
            ledger,
            tmp_path,
            2,
            anchors,
            ["--config.seed=3"],
            ["--ledger=some.jsonl", "--out=pages"],
        )
        study_runner.plan([STUDIES[name]])
        study_runner.run(STUDIES[name])
        return study_runner

    return start


def test_a_study_from_two_anchors(run, tmp_path, capsys):
    contexts = run("fig6", ["two"])._contexts
    assert contexts["two"].data is contexts["one"].data
    for context in contexts.values():
        assert list(context.runs.done.values()) == ["fig6: replicas of seed 0 (1 of 1)"]
    output = capsys.readouterr().out
    assert re.search("2 of 2 measurements missing: 2 runs", output)
    document = json.loads((tmp_path / "fig6_anchors.json").read_text())
    assert set(document["further"]) == {"two"}
    command = "python -m studies fig6 --config.seed=3 --num_seeds=2 --anchors=two"
    command += " --ledger=some.jsonl --out=pages"
    assert document["command"] == command
    assert f"`{command}`" in (tmp_path / "fig6_anchors.md").read_text()
    run("fig6", ["two"])
    assert re.search("0 of 2 .*0 runs", capsys.readouterr().out)
    # The page of one anchor uses the same lines and does not change the other page.
    run("fig6", [])
    assert "further" not in json.loads((tmp_path / "fig6.json").read_text())
    assert "further" in json.loads((tmp_path / "fig6_anchors.json").read_text())


def test_a_study_with_seeds_that_no_other_study_uses(run, monkeypatch):
    study = dataclasses.replace(STUDIES["fig6"], name="fig6_final", seed_offset=200)
    monkeypatch.setitem(STUDIES, study.name, study)
    for name, seeds in (("fig6", (0, 1)), ("fig6_final", (200, 201))):
        setup = run(name, [])._setup(STUDIES[name], FakeContext(glyphs.get_config(), None, None))
        assert setup.seeds == seeds


@pytest.mark.parametrize(
    "argument,message",
    [
        ("--config.num_seeds=8", "--config.num_seeds=8: .* --num_seeds"),
        ("--config.num_replicas=3", "num_replicas=3"),
        ("--config.merge.every=never", "merge.every=never"),
    ],
)
def test_an_option_that_studies_ignore_is_an_error(tmp_path, argument, message):
    ledger = Ledger(tmp_path / "measured.jsonl")
    with pytest.raises(UserError, match=message):
        runner.Runner(glyphs.get_config(), tmp_path, ledger, tmp_path, 2, (), [argument])


def test_an_unwritable_directory_is_an_error_before_anything_runs(tmp_path):
    ledger, file = Ledger(tmp_path / "measured.jsonl"), tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="--out=.*file: "):
        runner.Runner(glyphs.get_config(), tmp_path, ledger, file)


def test_a_duplicate_anchor_is_an_error(run):
    with pytest.raises(UserError, match="--anchors=ONE: .* one"):
        run("fig6", ["ONE"])


def test_options_that_a_sentence_study_ignores_are_named(tmp_path, capsys):
    """It plans without any download; only the first seed applies, also in the page's command."""
    study, ledger = STUDIES["sentence_encoder"], Ledger(tmp_path / "measured.jsonl")
    arguments = ["--config.seed=3", "--config.optimizer.learning_rate=1"]
    config = glyphs.get_config()
    config.seed = 3
    for anchors, given in (("other",), arguments[:1]), ((), arguments), ((), arguments[:1]):
        made = runner.Runner(config, tmp_path, ledger, tmp_path, 2, anchors, given)
        made.plan([study])
        named = "--anchors" in capsys.readouterr().out
        assert named == (anchors != () or given == arguments)
        command = "python -m studies sentence_encoder --config.seed=3 --num_seeds=2"
        assert made._command(study) == command
        (context,) = made._contexts_of(study).values()
        assert context.setup(2).seeds == (3, 4)
