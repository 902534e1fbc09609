"""The command line of the studies: processes on a tiny model, killed and restarted."""

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


def test_user_errors_are_one_line(tmp_path):
    for extra, message in (
        (["tabel1"], "'tabel1'.* table1.* fig1, "),
        (["shoe"], "error: .*'shoe'.* fig1, "),
        (["table1", "--num_seeds=1"], "--num_seeds=1: .*2 seeds"),
        (["table1", "--config=configs/none.py"], "configs/none.py"),
    ):
        code, output = small_run.finish(*extra, f"--workdir={tmp_path}", program=PROGRAM)
        assert code == 1 and re.search(message, output) and "Traceback" not in output, output
    assert not (tmp_path / "trained").exists()


@pytest.fixture
def ctrl_c_enabled():
    """Handle Ctrl-C, which background jobs of a shell and their children ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "kind,code",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, STOPPED, marks=pytest.mark.slow)],
)
def test_a_signal_stops_without_a_traceback(tmp_path, ctrl_c_enabled, kind, code):
    ledger = tmp_path / "new.jsonl"
    process = small_run.start(
        "table1", f"--workdir={tmp_path}", f"--ledger={ledger}", program=PROGRAM
    )
    try:
        output = ""
        while " missing: " not in output:
            line = process.stdout.readline()
            assert line, output
            output += line
        process.send_signal(kind)
        output += process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code and "Traceback" not in output, output
    assert f"no ledger at {ledger} yet; it will be created" in output
    assert kind != signal.SIGINT or "same command" in output


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
    uninterrupted = tmp_path / "uninterrupted"
    command = arguments(anchor, uninterrupted, *names)
    code, output = small_run.finish(*command, program=PROGRAM)
    assert code == 0, output
    for name in ("table7.json", "fig5.json", "fig5.png", "fig7.json", "fig7.png"):
        assert (uninterrupted / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    command = arguments(anchor, tmp_path / "shared", "table7")
    processes = [small_run.start(*command, program=PROGRAM) for _ in range(2)]
    outputs = [process.communicate(timeout=540)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = (tmp_path / "shared" / "measured.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(set(keys)) == len(keys)
    assert [text.count(" of 2): merge.every=never") for text in outputs] == [1, 1], outputs
    code, output = small_run.finish(*arguments(anchor, tmp_path / "one", "table7"), program=PROGRAM)
    assert code == 0, output
    for name in ("table7.json", "table7.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()


@pytest.mark.slow
def test_the_committed_ledger_has_every_measurement(tmp_path):
    """A removed line is reported as missing, and so is a key that a code change alters."""
    committed = Path(__file__).parents[2] / "docs/results/measured.jsonl"
    command = ["fig2", "table1", "table7", "--dry-run", f"--workdir={tmp_path}",
               f"--out={tmp_path}"]  # fmt: skip
    code, output = small_run.finish(*command, f"--ledger={committed}", program=PROGRAM)
    assert code == 0 and re.search("0 of 175 .*0 runs", output), output
    lines = committed.read_text().splitlines(keepends=True)
    scores = (number for number, line in enumerate(lines) if json.loads(line)["what"] == "Score")
    del lines[next(scores)]
    (tmp_path / "shorter.jsonl").write_text("".join(lines))
    code, output = small_run.finish(*command, f"--ledger={tmp_path / 'shorter.jsonl'}",
                                    program=PROGRAM)  # fmt: skip
    assert code == 1 and "1 of " in output, output
