"""Ten kills of a short run at random times (`make kill-test` does a hundred), and SIGTERM."""

from __future__ import annotations

import signal
import time

import pytest

from tests.experiment import small_run
from tests.kill.series import PHASES, KillSeries, kills_per_phase


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    return KillSeries(tmp_path_factory.mktemp("kill"), seed=1)


@pytest.mark.slow
def test_ten_kills_do_not_change_the_result(series):
    series.until(kills_per_phase(10))
    assert not series.failures, "\n".join(series.failures)
    assert all(series.kills[phase] >= 2 for phase in (*PHASES, "train")), series.kills


@pytest.mark.slow
def test_sigterm_in_each_phase_exits_143_and_the_run_resumes(series, tmp_path):
    for phase in ("evaluate", "restore", "save", "merge", "export"):
        run = series.start(tmp_path)
        while phase not in run.open_phases():
            assert run.process.poll() is None, run.process.communicate()[0]
            run.events()
            time.sleep(0.0005)
        run.process.send_signal(signal.SIGTERM)
        output, _ = run.process.communicate(timeout=120)
        assert run.process.returncode == 143, (phase, output)
        # The process had time to stop: no phase is open.
        run.events()
        assert not run.open_phases() - {"save"}, phase
        assert not (tmp_path / "results.json").exists()
        assert not list(tmp_path.glob(".*.tmp"))
    assert small_run.finish(*series.arguments(tmp_path))[0] == 0
    assert series.differences(tmp_path) == []


# Kills itself before a file is renamed into place, or at the next audit event after that.
KILL_AT_RENAME = """
import os, runpy, signal, sys
name, when = sys.argv.pop(1), sys.argv.pop(1)
renamed = False
def watch(event, arguments):
    global renamed
    if event == "os.kill":  # The kill below; do not handle it recursively.
        return
    if renamed or (event == "os.rename" and str(arguments[1]).endswith(name)):
        if renamed or when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        renamed = True
sys.addaudithook(watch)
sys.argv[0] = "launch.py"
runpy.run_path("launch.py", run_name="__main__")
"""


@pytest.mark.slow
def test_kills_when_each_file_is_renamed_into_place(series, tmp_path):
    workdir = tmp_path / "run"
    head = ".safetensors"  # The first such file is the zero-shot head.
    names = [
        ("run/config.json", "before"),
        (head, "before"),
        (head, "after"),
        ("runs/zero_shot/results.json", "before"),
        ("runs/seed_0/results.json", "before"),
        ("runs/seed_0/results.json", "after"),
        ("run/model", "before"),
        ("run/model", "after"),
        ("run/metrics.jsonl", "before"),
        ("figures/id_against_shifts.png", "before"),
        ("run/results.md", "after"),
        ("run/results.json", "before"),
        ("run/results.json", "after"),
    ]
    for name, when in names:
        code, output = small_run.finish(
            name, when, *series.arguments(workdir), program=("-c", KILL_AT_RENAME)
        )
        assert code == -signal.SIGKILL, (name, when, output)
    # results.json is the last file: the run is finished.
    code, output = small_run.finish(*series.arguments(workdir))
    assert code == 0 and "Time by phase" not in output, output
    assert series.differences(workdir) == []
    assert not list(workdir.glob(".model*"))


def kill_and_resume(arguments, path) -> str:
    """Kill a run when `path` exists and start it again; return the output of the second start."""
    process = small_run.start(*arguments)
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    code, output = small_run.finish(*arguments)
    assert code == 0, output
    return output


@pytest.mark.slow
def test_a_learning_rate_search_resumes(tmp_path):
    anchor = small_run.save_anchor(tmp_path / "clip")
    rates = ("--config.task=learning_rate", "--config.search.learning_rates=(1e-3,2e-3)")
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    assert small_run.finish(*small_run.arguments(anchor, complete, *rates))[0] == 0
    output = kill_and_resume(
        small_run.arguments(anchor, killed, *rates), killed / "runs/learning_rate_0.002/state/6"
    )
    assert "learning_rate_0.002: " in output and "from step" in output
    name = "learning_rate.json"
    assert (killed / name).read_bytes() == (complete / name).read_bytes()


@pytest.mark.slow
def test_pretraining_resumes(tmp_path):
    def arguments(workdir):
        return [
            "--config=configs/glyph_pretrain.py",
            f"--workdir={workdir}",
            "--config.pretrain.num_steps=24",
            "--config.optimizer.warmup_steps=4",
            "--config.batch_size=64",
            "--config.checkpoint.save_every_steps=4",
        ]

    complete, killed = tmp_path / "complete", tmp_path / "killed"
    assert small_run.finish(*arguments(complete))[0] == 0
    output = kill_and_resume(arguments(killed), killed / "runs/seed_0/pretrain/state/8")
    assert "from step" in output
    name = "model/model.safetensors"
    assert (killed / name).read_bytes() == (complete / name).read_bytes()
