"""Work that real processes share: every piece once, and nothing lost with a killed one."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from modelstock_jax.errors import UserError
from studies.ledger import Ledger, lock_run, work_queue
from tests.experiment.small_run import ROOT

SHARE = """
import sys, time
from pathlib import Path
from studies.ledger import Ledger
from studies.ledger import turns

place, who, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
ledger = Ledger(place / "measured.jsonl")
pieces = {f"piece{i}": f"piece{i}" for i in range(12)}
waits = lambda count: print(who, "waits for", count, flush=True)
for piece in turns(place / "locks", pieces, ledger.look_for, waits):
    print(who, "is at", piece, flush=True)
    time.sleep(seconds)
    ledger.add(piece, value=who, what="piece", seconds=seconds, commit="c")
assert all(piece in ledger for piece in pieces)
"""


def share(place, who, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", SHARE, str(place), who, str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_do_every_piece_once(tmp_path):
    stuck = share(tmp_path, "stuck", 1000)
    assert stuck.stdout.readline() == "stuck is at piece0\n"
    others = [share(tmp_path, who, 0.2) for who in ("first", "second")]
    ledger = tmp_path / "measured.jsonl"
    while not ledger.exists() or ledger.read_bytes().count(b"\n") < 11:
        assert all(process.poll() is None for process in (stuck, *others))
        time.sleep(0.05)
    stuck.kill()
    stuck.communicate()
    said = [process.communicate(timeout=60)[0] for process in others]
    assert [process.returncode for process in others] == [0, 0]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(f"piece{i}" for i in range(12))
    assert lines[-1]["key"] == "piece0" and {line["value"] for line in lines} == {"first", "second"}
    assert all(" waits for " in text for text in said), said
    assert not list((tmp_path / "locks").iterdir())


def test_a_piece_that_fails_is_free_again(tmp_path):
    done = set()

    def work(fails):
        for piece in work_queue(tmp_path, {"a": "a", "b": "b"}, done.__contains__):
            if piece == fails:
                raise KeyboardInterrupt
            done.add(piece)

    with pytest.raises(KeyboardInterrupt):
        work("b")
    assert done == {"a"}
    work(None)
    assert done == {"a", "b"}


def test_one_waits_for_another(tmp_path):
    with lock_run(tmp_path, "probe") as ours:
        assert ours
        with lock_run(tmp_path, "probe") as again, lock_run(tmp_path, "tower", wait=True) as other:
            assert not again and other
    with lock_run(tmp_path, "probe", wait=True) as ours:
        assert ours


def test_a_place_that_takes_no_lock_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.lock: .*workdir"):
        with lock_run(tmp_path / "file", "a"):
            pass


def test_lines_of_several_processes_stay_whole(tmp_path):
    path = tmp_path / "measured.jsonl"
    one, other = Ledger(path), Ledger(path)
    one.add("a", value=1, what="score", seconds=1, commit="c")
    assert "a" not in other and other.look_for("a") and other["a"] == 1
    path.write_bytes(path.read_bytes() + b'{"key": "b", "val')  # Killed while it wrote.
    other.add("c", value=3, what="score", seconds=1, commit="c")
    assert not one.look_for("b") and one.look_for("c")
