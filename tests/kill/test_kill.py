"""Ten kills of a short run at random instants; `make kill-test` does a hundred. And SIGTERM."""

from __future__ import annotations

import signal
import time

import pytest

from tests.experiment import small_run
from tests.kill.series import PHASES, Series, wanted


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return Series(tmp_path_factory.mktemp("kill"), seed=1)


@pytest.mark.slow
def test_ten_kills_change_nothing(series):
    series.until(wanted(10))
    assert not series.failures, "\n".join(series.failures)
    assert all(series.kills[phase] >= 2 for phase in (*PHASES, "train")), series.kills


@pytest.mark.slow
def test_sigterm_inside_each_phase_exits_143_and_the_run_goes_on(series, tmp_path):
    for phase in ("evaluate", "restore", "save", "merge", "export"):
        life = series.start(tmp_path)
        while phase not in life.inside():
            assert life.process.poll() is None, life.process.communicate()[0]
            life.events()
            time.sleep(0.0005)
        life.process.send_signal(signal.SIGTERM)
        output, _ = life.process.communicate(timeout=120)
        assert life.process.returncode == 143, (phase, output)
        # It was asked to stop, and had time: no phase is left open.
        life.events()
        assert not life.inside() - {"save"}, phase
        assert not (tmp_path / "results.json").exists()
        assert not list(tmp_path.glob(".*.tmp"))
    assert small_run.finish(*series.arguments(tmp_path))[0] == 0
    assert series.differences(tmp_path) == []


# Dies as a file takes its name, or at the very next thing that Python does.
DYING = """
import os, runpy, signal, sys
name, when = sys.argv.pop(1), sys.argv.pop(1)
met = False
def watch(event, arguments):
    global met
    if event == "os.kill":  # Its own: the hook must not ask itself for ever.
        return
    if met or (event == "os.rename" and str(arguments[1]).endswith(name)):
        if met or when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        met = True
sys.addaudithook(watch)
sys.argv[0] = "launch.py"
runpy.run_path("launch.py", run_name="__main__")
"""


@pytest.mark.slow
def test_killed_as_each_file_takes_its_name(series, tmp_path):
    workdir = tmp_path / "run"
    head = ".safetensors"  # The first such file is the zero-shot head's.
    names = [
        ("run/config.json", "before"),
        (head, "before"),
        (head, "after"),
        ("runs/zero_shot/results.json", "before"),
        ("runs/seed_0/results.json", "before"),
        ("runs/seed_0/results.json", "after"),
        ("run/model", "before"),
        ("run/model", "after"),
        ("run/results.json", "before"),
        ("run/results.json", "after"),
        ("run/metrics.jsonl", "before"),
        ("figures/id_against_shifts.png", "before"),
    ]
    for name, when in names:
        code, output = small_run.finish(
            name, when, *series.arguments(workdir), program=("-c", DYING)
        )
        assert code == -signal.SIGKILL, (name, when, output)
    assert small_run.finish(*series.arguments(workdir))[0] == 0
    assert series.differences(workdir) == []
    assert not list(workdir.glob(".model*"))


def killed_and_resumed(arguments, there) -> str:
    """Output of a run that was killed once the path `there` was on the disk, and started again."""
    process = small_run.start(*arguments)
    while not there.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    code, output = small_run.finish(*arguments)
    assert code == 0, output
    return output


@pytest.mark.slow
def test_the_choice_of_a_learning_rate_goes_on(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    rates = ("--config.task=learning_rate", "--config.search.learning_rates=(1e-3,2e-3)")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert small_run.finish(*small_run.arguments(anchor, whole, *rates))[0] == 0
    output = killed_and_resumed(
        small_run.arguments(anchor, killed, *rates), killed / "runs/learning_rate_0.002/state/6"
    )
    assert "learning_rate_0.002: " in output and "from step" in output
    name = "learning_rate.json"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_pretraining_goes_on(tmp_path):
    def arguments(workdir):
        return [
            "--config=configs/glyph_pretrain.py",
            f"--workdir={workdir}",
            "--config.pretrain.num_steps=24",
            "--config.optimizer.warmup_steps=4",
            "--config.batch_size=64",
            "--config.checkpoint.save_every_steps=4",
        ]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert small_run.finish(*arguments(whole))[0] == 0
    output = killed_and_resumed(arguments(killed), killed / "runs/seed_0/pretrain/state/8")
    assert "from step" in output
    name = "model/model.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()
