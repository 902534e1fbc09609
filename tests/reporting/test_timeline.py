"""A timeline has complete lines at any time, counts every second once and survives a full disk."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import threading

import pytest
from rich.console import Console

from modelstock_jax.errors import UserError
from modelstock_jax.reporting import timeline as module
from modelstock_jax.reporting.timeline import Timeline, read_timeline


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def events(path):
    return [(line["phase"], line["event"], line["step"]) for line in read_timeline(path)]


def test_phase_ends_if_a_signal_arrives_with_its_first_line(tmp_path, monkeypatch):
    path = tmp_path / "timeline.jsonl"
    handled, write = signal.getsignal(signal.SIGTERM), os.write

    def write_and_raise_sigterm(*args):
        written = write(*args)
        if b"begin" in args[1]:
            signal.raise_signal(signal.SIGTERM)
        return written

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    monkeypatch.setattr(os, "write", write_and_raise_sigterm)
    try:
        with Timeline(path) as timeline, pytest.raises(SystemExit), timeline.phase("evaluate"):
            pass
    finally:
        signal.signal(signal.SIGTERM, handled)
    assert events(path) == [("evaluate", "begin", None), ("evaluate", "end", None)]


def test_line_is_on_disk_when_its_phase_begins(tmp_path):
    path = tmp_path / "new" / "timeline.jsonl"
    with Timeline(path) as timeline:
        with timeline.phase("save", step=3):
            assert events(path) == [("save", "begin", 3)]
        with pytest.raises(KeyError), timeline.phase("merge", step=4):
            raise KeyError
        for _ in range(5):
            with timeline.phase("data"), timeline.phase("train"):
                pass
        thread = threading.Thread(target=timeline.end, args=("save", 3))
        thread.start()
        thread.join()
    timeline.end("save", 9)
    lines = [("save", "begin", 3), ("save", "end", 3), ("merge", "begin", 4), ("merge", "end", 4)]
    assert events(path) == [*lines, ("save", "end", 3)]
    assert all(line["time"] > 1e9 for line in read_timeline(path))
    with Timeline(path) as timeline:
        timeline.begin("restore")
    assert events(path)[-1] == ("restore", "begin", None) and len(events(path)) == 6


def test_second_counts_once_for_the_innermost_phase(clock):
    timeline = Timeline(None)
    with timeline.phase("evaluate"):
        clock[0] += 2
        with timeline.spend("data"):
            clock[0] += 3
        clock[0] += 4
        timeline.move("compile", 1.5)
        assert timeline.totals()["evaluate"] == 4.5
    clock[0] += 10
    timeline.move("compile", 0.5)  # Outside of every phase.
    assert timeline.seconds == {"evaluate": 4.5, "data": 3.0, "compile": 2.0}
    assert timeline.wall() == 19
    other = threading.Thread(target=timeline.move, args=("compile", 7.0))
    other.start()
    other.join()
    assert timeline.seconds["compile"] == 2.0
    out = io.StringIO()
    timeline.show(Console(file=out, width=80))
    rows = [line.split() for line in out.getvalue().splitlines()]
    assert rows[0] == ["Time", "by", "phase,", "19.0", "s", "in", "total"]
    assert ["evaluating", "4.5", "23.7", "%"] in rows
    assert rows[-1][-3:] == ["9.5", "50.0", "%"]


def test_incomplete_lines_of_a_kill_and_of_a_full_disk_affect_no_other(
    tmp_path, monkeypatch, capsys
):
    path = tmp_path / "timeline.jsonl"
    path.write_text('{"phase": "save", "event": "begin", "time": 1.0, "step": 1}\n{"phase": "sa')
    write = os.write
    with Timeline(path) as timeline:
        timeline.begin("merge", 2)
        with monkeypatch.context() as patch:  # The disk stores a part of a line, then nothing.
            free = [9]

            def full(file, line):
                if not free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(file, line[: free.pop()])

            patch.setattr(os, "write", full)
            timeline.end("merge", 2)
            timeline.begin("save", 2)
        timeline.end("save", 2)
    assert events(path) == [("save", "begin", 1), ("merge", "begin", 2), ("save", "end", 2)]
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 2
    warning = capsys.readouterr().err
    assert warning.count("warning: ") == 1 and "No space left" in warning


def test_error_if_the_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"timeline\.jsonl: .*--workdir"):
        Timeline(tmp_path / "file" / "timeline.jsonl")
    with pytest.raises(UserError, match=f"{tmp_path}: .*--workdir"):
        Timeline(tmp_path)
    with Timeline(tmp_path / "file" / "timeline.jsonl", enabled=False) as timeline:
        with timeline.phase("merge"):
            pass
    assert timeline.seconds["merge"] > 0
