"""Files are safe under kills, full disks and file systems without locks. The kills are real."""

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
    """Start a process that runs `code`; its output is read line by line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> int:
    """Wait for a process, and return its exit status."""
    process.communicate(timeout=60)
    return process.returncode


def test_numpy_values_and_nan_are_converted(tmp_path):
    value = {"b": np.float32(0.5), "a": [np.nan, np.arange(2)]}
    path = fileio.write_json(tmp_path / "a.json", value)
    assert json.loads(path.read_text()) == {"a": [None, [0, 1]], "b": 0.5}


def test_a_failed_write_preserves_the_old_file(tmp_path):
    path = fileio.write_text(tmp_path / "a.txt", "old")

    def fail(file):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a\.txt: No space left on device"):
        fileio.write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_has_the_default_mode_and_the_umask_is_not_set(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the process's umask was set"))
    path = fileio.write_text(tmp_path / "a.txt", "")
    (tmp_path / "plain").touch()
    assert oct(path.stat().st_mode) == oct((tmp_path / "plain").stat().st_mode)


# Killed before the rename.
KILLED = """
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
with fileio.new_directory(path) as staged:
    (staged / "file").write_text("complete")
"""


def test_a_kill_before_the_rename_preserves_the_old_file(tmp_path):
    path = fileio.write_text(tmp_path / "a.json", "old")
    assert end(start(KILLED, path)) == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = (file for file in tmp_path.iterdir() if file != path)
    assert left.name.startswith(".a.") and json.loads(left.read_text()) == {"new": 1}
    assert fileio.write_text(path, "newer").read_text() == "newer"


def test_a_temporary_file_left_by_a_kill_is_overwritten(tmp_path):
    (tmp_path / "a.tmp").write_text("longer text of a killed process")
    with fileio.replace_atomically(tmp_path / "a", tmp_path / "a.tmp") as staged:
        assert staged.read_text() == ""
        staged.write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "new")]


def test_ebadf_is_ignored_only_for_directories(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(os, "fsync", fail)
    fileio.flush_path(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        fileio.flush_path(tmp_path / "file")


def test_a_directory_is_complete_or_absent(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError), fileio.new_directory(target) as staged:
        (staged / "half").write_text("x")
        raise RuntimeError
    assert not target.exists() and list(target.parent.iterdir()) == []
    with fileio.new_directory(target) as staged:
        (staged / "file").touch(mode=0o600)  # as safetensors creates its files
        (staged / "file").write_text("new")
    assert (target / "file").read_text() == "new"
    assert oct(target.stat().st_mode & 0o777) == oct(target.parent.stat().st_mode & 0o777)
    (tmp_path / "plain").touch()
    assert (target / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(UserError, match="model: "), fileio.new_directory(target):
        pass
    with pytest.raises(RuntimeError), fileio.new_directory(target, overwrite=True):
        raise RuntimeError
    assert (target / "file").read_text() == "new"
    with fileio.new_directory(target, overwrite=True) as staged:
        (staged / "other").write_text("newer")
    assert [p.name for p in target.iterdir()] == ["other"]
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_a_kill_leaves_no_extra_file_in_a_directory_that_a_merge_resumes(tmp_path, monkeypatch):
    def not_removed(*args, **kwargs):  # as after a SIGKILL
        return contextlib.nullcontext(tempfile.mkdtemp(*args, **kwargs))

    monkeypatch.setattr(fileio.tempfile, "TemporaryDirectory", not_removed)
    staged = tmp_path / ".model.merge"
    staged.mkdir()
    (staged / "file").write_text("")
    fileio.move_into_place(staged, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["file"]


def test_an_unwritable_path_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file.model: "):
        with fileio.new_directory(tmp_path / "file" / "model"):
            pass


def test_a_kill_before_the_rename_leaves_no_directory(tmp_path):
    path = tmp_path / "model"
    assert end(start(KILLED, path)) == -signal.SIGKILL
    assert not path.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model.") and (left / "file").read_text() == "complete"
    with fileio.new_directory(path) as staged:
        (staged / "file").write_text("again")
    assert (path / "file").read_text() == "again"


LOCKS = """
import sys, time
from pathlib import Path
from modelstock_jax.fileio import FileLock
lock = FileLock(Path(sys.argv[1]), note="a process with a longer name")
print(lock.held, flush=True)
time.sleep(600)
"""


def test_a_lock_belongs_to_one_process_until_it_ends(tmp_path):
    path = tmp_path / "deep" / ".lock"
    holder = start(LOCKS, path)
    try:
        assert holder.stdout.readline() == "True\n"
        other = FileLock(path, note="this process")
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
    with FileLock(path, note="this process") as lock:
        assert lock.held and path.read_text() == "this process"
    assert FileLock(path).held


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_without_support_for_locks_every_process_has_the_lock(tmp_path, monkeypatch, code, wait):
    def unsupported(*_):
        raise OSError(getattr(errno, code), "no locks here")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with FileLock(tmp_path / "a", wait=wait, note="me") as lock:
        assert lock.held and lock.unsupported == "no locks here"
    assert (tmp_path / "a").read_text() == "me"


def test_a_lock_of_another_process_is_not_missing_support(tmp_path, monkeypatch):
    def taken(*_):
        raise OSError(errno.EWOULDBLOCK, "taken")

    monkeypatch.setattr(fcntl, "flock", taken)
    lock = FileLock(tmp_path / "a", note="me")
    assert not lock.held and not lock.unsupported and (tmp_path / "a").read_text() == ""


def test_the_note_of_another_process_may_be_unreadable(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with FileLock(tmp_path / "a", note="another"):
        monkeypatch.setattr(os, "read", forbidden)
        lock = FileLock(tmp_path / "a")
        assert not lock.held and lock.holder == ""


def test_the_lock_is_freed_if_the_note_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            FileLock(tmp_path / "a", note="me")
    assert FileLock(tmp_path / "a").held


KILLED_IN_A_LINE = """
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


def test_a_line_cut_by_a_kill_damages_no_other_line(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    assert end(start(KILLED_IN_A_LINE, path)) == -signal.SIGKILL
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
os.write = lambda file, line: write(file, line[:1])  # one byte at a time, so that lines could mix
for number in range(50):
    with FileLock(Path(sys.argv[1]), wait=True) as lock:
        append_line(lock.file, '{"who": "%s", "number": %d}' % (sys.argv[2], number))
"""


def test_lines_of_two_processes_that_lock_the_file_do_not_mix(tmp_path):
    path = tmp_path / "a.jsonl"
    processes = [start(APPENDS, path, who) for who in ("one", "two")]
    assert [end(process) for process in processes] == [0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for who in ("one", "two"):
        assert [line["number"] for line in lines if line["who"] == who] == list(range(50))


def test_lines_that_are_not_objects_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n[1]\n' + b"[" * 200_000 + b'\n\xff\n{"a": 2}\n{"a": ')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]
    with fileio.JsonLines(path, lambda entry: True) as lines:
        lines.append({"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'
