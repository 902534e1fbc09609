"""Files outlive kills, full disks and file systems without locks. Kills are real ones."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from modelstock_jax import fileio
from modelstock_jax.errors import UserError
from modelstock_jax.fileio import FileLock, append_line, open_appending, read_lines

ROOT = Path(__file__).parents[1]


def start(code: str, *arguments: object) -> subprocess.Popen:
    """A process of its own that runs `code`; what it prints is read line by line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> int:
    """Waits for a process; its exit status."""
    process.communicate(timeout=60)
    return process.returncode


# Files.


def test_numpy_and_nan_become_plain(tmp_path):
    value = {"b": np.float32(0.5), "a": [np.nan, np.arange(2)]}
    path = fileio.write_json(tmp_path / "a.json", value)
    assert json.loads(path.read_text()) == {"a": [None, [0, 1]], "b": 0.5}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = fileio.write_text(tmp_path / "a.txt", "old")

    def fail(file):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a\.txt: No space left on device"):
        fileio.write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_has_the_mode_of_any_other_and_the_umask_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the process's umask was set"))
    made = fileio.write_text(tmp_path / "made.txt", "")
    (tmp_path / "plain").touch()
    assert oct(made.stat().st_mode) == oct((tmp_path / "plain").stat().st_mode)


# Dies as what it wrote is to take its name.
DIES = """
import os, signal, sys
from pathlib import Path
from modelstock_jax import fileio
def watch(event, arguments):
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
path = Path(sys.argv[1])
if path.suffix:
    fileio.write_json(path, {"new": 1})
with fileio.new_directory(path) as beside:
    (beside / "file").write_text("whole")
"""


def test_killed_before_the_rename_a_file_is_the_old_one(tmp_path):
    path = fileio.write_text(tmp_path / "a.json", "old")
    assert end(start(DIES, path)) == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = (file for file in tmp_path.iterdir() if file != path)
    assert left.name.startswith(".a.") and json.loads(left.read_text()) == {"new": 1}
    assert fileio.write_text(path, "newer").read_text() == "newer"


def test_what_a_kill_left_under_a_name_of_its_own_is_written_over(tmp_path):
    (tmp_path / "a.tmp").write_text("much more, of a killed process")
    with fileio.replacing(tmp_path / "a", tmp_path / "a.tmp") as beside:
        assert beside.read_text() == ""
        beside.write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


def test_only_directories_may_be_no_file_to_flush(tmp_path, monkeypatch):
    def bad(_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "fsync", bad)
    fileio.flush_path(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        fileio.flush_path(tmp_path / "file")


# Directories.


def test_a_directory_appears_whole_or_not(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError), fileio.new_directory(target) as beside:
        (beside / "half").write_text("x")
        raise RuntimeError
    assert not target.exists() and list(target.parent.iterdir()) == []
    with fileio.new_directory(target) as beside:
        (beside / "file").touch(mode=0o600)  # as safetensors makes its files
        (beside / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    assert oct(target.stat().st_mode & 0o777) == oct(target.parent.stat().st_mode & 0o777)
    (tmp_path / "plain").touch()
    assert (target / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(UserError, match="model: "), fileio.new_directory(target):
        pass
    with pytest.raises(RuntimeError), fileio.new_directory(target, overwrite=True):
        raise RuntimeError
    assert (target / "file").read_text() == "new"
    with fileio.new_directory(target, overwrite=True) as beside:
        (beside / "other").write_text("newer")
    assert [p.name for p in target.iterdir()] == ["other"]
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_a_kill_leaves_nothing_strange_in_what_a_merge_goes_on_with(tmp_path, monkeypatch):
    def kept(*args, **kwargs):  # As after a SIGKILL: nobody tidies up.
        return contextlib.nullcontext(tempfile.mkdtemp(*args, **kwargs))

    monkeypatch.setattr(fileio.tempfile, "TemporaryDirectory", kept)
    beside = tmp_path / ".model.merge"
    beside.mkdir()
    (beside / "file").write_text("")
    fileio.move_into_place(beside, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["file"]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.model: "):
        with fileio.new_directory(tmp_path / "file" / "model"):
            pass


def test_killed_before_the_rename_a_directory_is_absent(tmp_path):
    path = tmp_path / "model"
    assert end(start(DIES, path)) == -signal.SIGKILL
    assert not path.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.") and (left / "file").read_text() == "whole"
    with fileio.new_directory(path) as beside:
        (beside / "file").write_text("again")
    assert (path / "file").read_text() == "again"


# Locks.


HOLDS = """
import sys, time
from pathlib import Path
from modelstock_jax.fileio import FileLock
lock = FileLock(Path(sys.argv[1]), note="a process with a longer name")
print(lock.held, flush=True)
time.sleep(600)
"""


def test_a_lock_is_one_process_s_until_it_dies(tmp_path):
    path = tmp_path / "deep" / ".lock"
    holder = start(HOLDS, path)
    try:
        assert holder.stdout.readline() == "True\n"
        other = FileLock(path, note="mine")
        assert not other.held and other.holder == "a process with a longer name"
        assert path.read_text() == "a process with a longer name"
        waiting = []
        waiter = threading.Thread(target=lambda: waiting.append(FileLock(path, wait=True)))
        waiter.start()
        waiter.join(0.3)
        assert not waiting
    finally:
        holder.kill()
        holder.communicate()
    waiter.join(60)
    assert waiting[0].held and not FileLock(path).held
    waiting[0].release()
    waiting[0].release()
    with FileLock(path, note="mine") as lock:
        assert lock.held and path.read_text() == "mine"
    assert FileLock(path).held


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_without_locks_every_process_is_as_if_alone(tmp_path, monkeypatch, code, wait):
    def unsupported(*_):
        raise OSError(getattr(errno, code), "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with FileLock(tmp_path / "a", wait=wait, note="me") as lock:
        assert lock.held and lock.unsupported == "no locks here"
    assert (tmp_path / "a").read_text() == "me"


def test_a_lock_of_another_is_no_missing_support(tmp_path, monkeypatch):
    def taken(*_):
        raise OSError(errno.EWOULDBLOCK, "taken")

    monkeypatch.setattr(fcntl, "flock", taken)
    lock = FileLock(tmp_path / "a", note="me")
    assert not lock.held and not lock.unsupported and (tmp_path / "a").read_text() == ""


def test_a_lock_of_another_whose_note_cannot_be_read(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with FileLock(tmp_path / "a", note="another"):
        monkeypatch.setattr(os, "read", forbidden)
        lock = FileLock(tmp_path / "a")
        assert not lock.held and lock.holder == ""


def test_a_note_that_cannot_be_written_frees_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            FileLock(tmp_path / "a", note="me")
    assert FileLock(tmp_path / "a").held


# Lines.


TEARS = """
import os, signal, sys
from modelstock_jax.fileio import append_line, open_appending
file = open_appending(sys.argv[1])
append_line(file, '{"a": 1}')
write = os.write
def half(file, line):
    write(file, line[:5])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = half
append_line(file, '{"a": 2}')
"""


def test_a_line_torn_by_a_kill_spoils_no_other(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    assert end(start(TEARS, path)) == -signal.SIGKILL
    assert path.read_text() == '{"a": 1}\n{"a":'
    file = open_appending(path)
    append_line(file, '{"a": 3}')
    append_line(file, '{"a": 4}')
    os.close(file)
    assert path.read_text() == '{"a": 1}\n{"a":\n{"a": 3}\n{"a": 4}\n'
    assert read_lines(path) == [{"a": 1}, {"a": 3}, {"a": 4}]


APPENDS = """
import os, sys
from pathlib import Path
from modelstock_jax.fileio import FileLock, append_line
write = os.write
os.write = lambda file, line: write(file, line[:1])  # So that lines could mix.
for number in range(50):
    with FileLock(Path(sys.argv[1]), wait=True) as lock:
        append_line(lock.file, '{"who": "%s", "number": %d}' % (sys.argv[2], number))
"""


def test_lines_of_processes_that_lock_the_file_do_not_mix(tmp_path):
    path = tmp_path / "a.jsonl"
    processes = [start(APPENDS, path, who) for who in ("one", "two")]
    assert [end(process) for process in processes] == [0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for who in ("one", "two"):
        assert [line["number"] for line in lines if line["who"] == who] == list(range(50))


def test_lines_that_are_no_objects_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n[1]\n' + b"[" * 200_000 + b'\n\xff\n{"a": 2}\n{"a": ')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]
    with fileio.JsonLines(path, lambda entry: True) as lines:
        lines.append({"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'
