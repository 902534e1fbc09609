"""The command line of the studies: real processes on a tiny model, killed and started again."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from modelstock_jax.training.launcher import STOPPED
from tests.experiment import small_run

PROGRAM = ("-m", "studies")


def arguments(anchor, workdir, *names):
    return [
        *names,
        f"--workdir={workdir}",
        "--num_seeds=2",
        "--config=configs/glyphs.py",
        f"--config.pretrained={anchor}",
        "--config.batch_size=512",
        "--config.epochs=2",
        "--config.data.shifts=('v2',)",
        "--config.evaluation.max_shift_images=100",
    ]


def test_mistakes_are_one_line(tmp_path):
    for more, message in (
        (["tabel1"], "'tabel1'.* table1.* fig1, "),
        (["shoe"], "error: .*'shoe'.* fig1, "),
        (["table1", "--num_seeds=1"], "--num_seeds=1: .*2 seeds"),
        (["table1", "--config=configs/none.py"], "configs/none.py"),
    ):
        code, output = small_run.finish(*more, f"--workdir={tmp_path}", program=PROGRAM)
        assert code == 1 and re.search(message, output) and "Traceback" not in output, output
    assert not (tmp_path / "trained").exists()


@pytest.fixture
def not_ignored():
    """A shell's background job, and so what it starts, ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind,code", [(signal.SIGINT, 130), (signal.SIGTERM, STOPPED)])
def test_a_signal_ends_it_in_a_line(tmp_path, not_ignored, kind, code):
    process = small_run.start("table1", f"--workdir={tmp_path}", program=PROGRAM)
    try:
        said = ""
        while " missing: " not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        process.send_signal(kind)
        said += process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code and "Traceback" not in said, said
    assert kind != signal.SIGINT or "same command" in said


@pytest.mark.slow
def test_a_killed_study_repeats_nothing(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    names = ("table7", "fig5", "fig7")
    command = arguments(anchor, tmp_path / "killed", *names)
    ledger = tmp_path / "killed" / "measured.jsonl"
    kills = 0
    for lines in (1, 4, 9):
        process = small_run.start(*command, program=PROGRAM)
        while process.poll() is None:
            if ledger.exists() and ledger.read_bytes().count(b"\n") >= lines:
                process.kill()
                kills += 1
                break
            time.sleep(0.05)
        process.communicate()
    assert kills == 3
    code, output = small_run.finish(*command, program=PROGRAM)
    assert code == 0, output
    keys = [json.loads(line)["key"] for line in ledger.read_text().splitlines()]
    assert len(set(keys)) == len(keys)
    code, again = small_run.finish(*command, program=PROGRAM)
    assert code == 0 and "0 runs" in again
    whole = tmp_path / "whole"
    code, output = small_run.finish(*arguments(anchor, whole, *names), program=PROGRAM)
    assert code == 0, output
    for name in ("table7.json", "fig5.json", "fig5.png", "fig7.json", "fig7.png"):
        assert (whole / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_two_at_once_share_the_work(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    command = arguments(anchor, tmp_path / "shared", "table7")
    both = [small_run.start(*command, program=PROGRAM) for _ in range(2)]
    said = [process.communicate(timeout=540)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    lines = (tmp_path / "shared" / "measured.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(set(keys)) == len(keys)
    assert [text.count(" of 2): merge.every=never") for text in said] == [1, 1], said
    code, output = small_run.finish(*arguments(anchor, tmp_path / "one", "table7"), program=PROGRAM)
    assert code == 0, output
    for name in ("table7.json", "table7.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()


@pytest.mark.slow
def test_the_committed_ledger_has_every_measurement(tmp_path):
    """A line less is missing: a key that a change of the code has lost would be found so."""
    committed = Path(__file__).parents[2] / "docs/results/measured.jsonl"
    command = ["fig2", "table1", "table7", "--dry-run", f"--workdir={tmp_path}",
               f"--out={tmp_path}"]  # fmt: skip
    code, output = small_run.finish(*command, f"--ledger={committed}", program=PROGRAM)
    assert code == 0 and re.search("0 of 175 .*0 runs", output), output
    lines = committed.read_text().splitlines(keepends=True)
    scores = (number for number, line in enumerate(lines) if json.loads(line)["what"] == "Score")
    del lines[next(scores)]
    (tmp_path / "less.jsonl").write_text("".join(lines))
    code, output = small_run.finish(*command, f"--ledger={tmp_path / 'less.jsonl'}",
                                    program=PROGRAM)  # fmt: skip
    assert code == 1 and "1 of " in output, output
