"""Work that processes share: every task runs once, and none is lost with a killed process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from modelstock_jax.errors import UserError
from studies.ledger import Ledger, lock_run, work_queue
from tests.experiment.small_run import ROOT

WORKER = """
import sys, time
from pathlib import Path
from studies.ledger import Ledger, work_queue

directory, worker, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
ledger = Ledger(directory / "measured.jsonl")
tasks = {f"task{i}": f"task{i}" for i in range(12)}
on_wait = lambda count: print(worker, "waits for", count, flush=True)
print(worker, "is ready", flush=True)
sys.stdin.readline()
for task in work_queue(directory / "locks", tasks, ledger.look_for, on_wait):
    print(worker, "runs", task, flush=True)
    time.sleep(seconds)
    ledger.add(task, value=worker, what="task", seconds=seconds, commit="c")
assert all(task in ledger for task in tasks)
"""


def start_worker(directory, worker, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(directory), worker, str(seconds)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def start_tasks(*workers):
    """Let processes begin once all are ready: importing takes longer than all tasks."""
    for worker in workers:
        assert worker.stdout.readline().endswith(" is ready\n")
    for worker in workers:
        worker.stdin.write("start\n")
        worker.stdin.flush()


def test_processes_run_every_task_once(tmp_path):
    stuck = start_worker(tmp_path, "stuck", 1000)
    start_tasks(stuck)
    assert stuck.stdout.readline() == "stuck runs task0\n"
    others = [start_worker(tmp_path, worker, 0.2) for worker in ("first", "second")]
    start_tasks(*others)
    for process in others:
        while " waits for " not in (line := process.stdout.readline()):
            assert line, "the process ended"
    stuck.kill()
    stuck.communicate()
    for process in others:
        process.communicate(timeout=60)
    assert [process.returncode for process in others] == [0, 0]
    ledger = tmp_path / "measured.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(f"task{i}" for i in range(12))
    assert lines[-1]["key"] == "task0" and {line["value"] for line in lines} == {"first", "second"}
    assert not list((tmp_path / "locks").iterdir())


def test_a_failed_task_is_available_again(tmp_path):
    done = set()

    def work(fails):
        for task in work_queue(tmp_path, {"a": "a", "b": "b"}, done.__contains__):
            if task == fails:
                raise KeyboardInterrupt
            done.add(task)

    with pytest.raises(KeyboardInterrupt):
        work("b")
    assert done == {"a"}
    work(None)
    assert done == {"a", "b"}


def test_a_lock_waits_for_its_holder(tmp_path):
    with lock_run(tmp_path, "probe") as locked:
        assert locked
        with lock_run(tmp_path, "probe") as again, lock_run(tmp_path, "tower", wait=True) as other:
            assert not again and other
    with lock_run(tmp_path, "probe", wait=True) as locked:
        assert locked


def test_an_unwritable_lock_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.lock: .*workdir"):
        with lock_run(tmp_path / "file", "a"):
            pass


def test_lines_of_several_processes_stay_intact(tmp_path):
    path = tmp_path / "measured.jsonl"
    first, second = Ledger(path), Ledger(path)
    first.add("a", value=1, what="score", seconds=1, commit="c")
    assert "a" not in second and second.look_for("a") and second["a"] == 1
    path.write_bytes(
        path.read_bytes() + b'{"key": "b", "val'
    )  # A process was killed while writing.
    second.add("c", value=3, what="score", seconds=1, commit="c")
    assert not first.look_for("b") and first.look_for("c")
