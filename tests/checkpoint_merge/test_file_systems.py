"""Merges on file systems without locks, flushes or permissions, and to every kind of `--out`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelstock_jax import fileio
from modelstock_jax.checkpoint_merge import output
from modelstock_jax.checkpoint_merge.executor import run
from modelstock_jax.checkpoint_merge.output import OccupiedError
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files import writer
from tests.checkpoint_merge.engine import models, plan, save
from tests.checkpoint_merge.small import llama
from tests.checkpoint_merge.test_executor import contents

ROOT = Path(__file__).parents[2]
UNSUPPORTED = ["EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP"]
BROKEN = ["EIO", "ENOSPC", "EDQUOT", "EROFS"]


@pytest.fixture
def planned(tmp_path):
    """Return a plan with several files; its merge on a normal file system is in `expected`."""
    result = plan(save(tmp_path, models()), max_shard_bytes=2000)
    assert len(result.files) > 2
    run(result, tmp_path / "expected")
    return result


def fails(monkeypatch, module, name: str, code: str, only=lambda *_: True) -> list:
    """Make a system call fail with an errno; return the calls that failed."""
    real, calls = getattr(module, name), []

    def call(*args):
        if only(*args):
            calls.append(args)
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return real(*args)

    monkeypatch.setattr(module, name, call)
    return calls


def is_directory(descriptor: int, *_: object) -> bool:
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


def nothing_left(root: Path) -> bool:
    return not [path for path in root.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("code", UNSUPPORTED)
@pytest.mark.parametrize("call", ["fsync", "fdatasync", "chmod"])
def test_unsupported_calls_of_a_file_system_are_not_an_error(
    planned, tmp_path, monkeypatch, call, code
):
    monkeypatch.setattr(
        writer, "_SYNC", 100
    )  # Small files are flushed while they are written, too.
    if (call, code) == ("chmod", "EINVAL"):
        code = "EPERM"
    calls = fails(monkeypatch, os, call, code)
    run(planned, tmp_path / "out")
    assert calls and contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("code", BROKEN)
@pytest.mark.parametrize("call", ["fsync", "fdatasync", "chmod"])
def test_a_broken_or_full_disk_is_an_error(planned, tmp_path, monkeypatch, call, code):
    if (call, code) == ("chmod", "EDQUOT"):
        code = "EACCES"
    monkeypatch.setattr(writer, "_SYNC", 100)
    with monkeypatch.context() as patch:
        assert not fails(patch, os, call, code)
        with pytest.raises(UserError, match=str(tmp_path)) as caught:
            run(planned, tmp_path / "out")
    line = str(caught.value)
    assert os.strerror(getattr(errno, code)) in line and "\n" not in line
    assert not (tmp_path / "out").exists()
    run(planned, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize(("code", "only", "fatal"), [
    ("EBADF", is_directory, False),
    ("EBADF", lambda file: not is_directory(file), True),
    ("EIO", is_directory, True),
])  # fmt: skip
def test_flushes_of_directories(planned, tmp_path, monkeypatch, code, only, fatal):
    calls = fails(monkeypatch, os, "fsync", code, only)
    if fatal:
        with pytest.raises(UserError, match=os.strerror(getattr(errno, code))):
            run(planned, tmp_path / "out")
    else:
        run(planned, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert calls


@pytest.mark.parametrize("code", ["EACCES", "EPERM"])
def test_a_directory_that_is_writable_but_not_readable(planned, tmp_path, monkeypatch, code):
    def only(path, flags, *_):
        return os.path.isdir(path) and flags & os.O_ACCMODE == os.O_RDONLY

    real, calls = os.open, []

    def call(path, flags, *args, **kwargs):
        if only(path, flags) and "dir_fd" not in kwargs and "expected" not in str(path):
            calls.append(path)
            raise PermissionError(getattr(errno, code), "denied")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", call)
    run(planned, tmp_path / "out")
    monkeypatch.undo()
    assert calls and contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_single_files_and_reports_are_written_without_flushes(tmp_path, monkeypatch):
    for call in ("fsync", "chmod"):
        fails(monkeypatch, os, call, "ENOSYS")
    writer.write_tensors(tmp_path / "w.safetensors", models()[0])
    writer.write_indented_json(tmp_path / "a.json", [1])
    fileio.write_json(tmp_path / "b.json", [1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json", "w.safetensors"]


@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL"])
def test_without_locks_a_merge_runs_and_prints_a_note(planned, tmp_path, monkeypatch, capsys, code):
    # The directory of another process is kept, because that process may still be running.
    other = tmp_path / ".out.0123456789abcdef.merge"
    other.mkdir()
    (other / "merge.lock").touch()
    assert fails(monkeypatch, fcntl, "flock", code) == []
    run(planned, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected") and other.exists()
    note = capsys.readouterr().err
    assert note.startswith("note: ") and note.count("\n") == 1
    assert str(tmp_path / "out") in note and "locks" in note and "--out" in note


@pytest.mark.parametrize("code", ["EWOULDBLOCK", "EAGAIN"])
def test_a_lock_of_another_process_is_an_error(planned, tmp_path, monkeypatch, code):
    fails(monkeypatch, fcntl, "flock", code)
    with pytest.raises(UserError, match="out: another process"):
        run(planned, tmp_path / "out")


@pytest.mark.parametrize("target", ["full", "empty", "missing", "deep/missing"])
def test_a_link_is_kept_and_points_to_the_merge(planned, tmp_path, target):
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "old").touch()
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "out"
    link.symlink_to(Path("..") / target)
    if target == "full":
        with pytest.raises(UserError, match="full: .*--overwrite"):
            run(planned, link)
    run(planned, link, overwrite=target == "full")
    assert os.readlink(link) == f"../{target}" and not (tmp_path / target).is_symlink()
    assert contents(tmp_path / target) == contents(tmp_path / "expected")
    assert [p.name for p in (tmp_path / "links").iterdir()] == ["out"] and nothing_left(tmp_path)


def never(*_: object) -> None:
    pytest.fail("the merge has started")


def test_a_mount_point_is_an_error_before_the_merge(planned, tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda p: str(p).endswith("volume") or ismount(p))
    with pytest.raises(UserError) as caught:
        run(planned, tmp_path / "volume", overwrite=True, progress=never)
    error = str(caught.value)
    assert error.startswith(f"{tmp_path}/volume: ")
    assert error.endswith(f" {tmp_path}/volume/merged") and "mount" in error
    run(planned, tmp_path / "volume" / "merged")
    assert contents(tmp_path / "volume/merged") == contents(tmp_path / "expected")


def test_a_bind_mount_is_detected(tmp_path, monkeypatch):
    path = tmp_path / "a b"
    line = f"36 35 98:0 /x {tmp_path}/a\\040b rw,noatime - ext4 /dev/root rw\n"
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda file, *a, **k: line if str(file).startswith("/proc/self") else real(file, *a, **k),
    )
    assert output._is_mounted(path) and not output._is_mounted(tmp_path / "a")


@pytest.mark.parametrize(("out", "text"), [
    ("file/out", "{root}/file/out: {root}/file "),
    ("file/a/b", "{root}/file/a/b: {root}/file "),
    ("file", "{root}/file: "),
    ("to_file/out", "{root}/file "),
    ("loop", "{root}/loop: "),
    ("x" * 250, "File name too long"),
])  # fmt: skip
def test_an_output_that_cannot_be_created_is_an_error_before_the_merge(
    planned, tmp_path, out, text
):
    (tmp_path / "file").touch()
    (tmp_path / "to_file").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError) as caught:
        run(planned, tmp_path / out, progress=never)
    line = str(caught.value)
    assert text.format(root=tmp_path) in line and "\n" not in line
    assert nothing_left(tmp_path)


WAITS = """
import sys, time
from pathlib import Path
from modelstock_jax.checkpoint_merge import cli, commands, output
commit, out = output.StagingDir.commit, Path(sys.argv[1])
commands.PlotProcess.finish = lambda plot: None
def late(self):
    print("ready", flush=True)
    while not out.exists():
        time.sleep(0.01)
    commit(self)
output.StagingDir.commit = late
sys.exit(cli.main(sys.argv[2:]))
"""
MERGES = """
import sys
from modelstock_jax.checkpoint_merge import cli, commands
commands.PlotProcess.finish = lambda plot: None
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_later_of_two_merges_can_still_succeed_with_overwrite(tmp_path):
    """Real processes: the second creates the output while the first still merges."""
    out = tmp_path / "out"
    command = ["merge", *map(str, llama(tmp_path)), "--out", str(out)]
    first = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(out), *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline() == "ready\n"

    def merge(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", MERGES, *command, *options],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    assert merge("--method", "uniform_mean").returncode == 0
    before = contents(out)
    error = first.communicate(timeout=120)[1].splitlines()[-1]
    assert first.returncode == 1 and error.startswith(f"error: {out}: ")
    assert "process" in error and "--overwrite" in error
    assert contents(out) == before  # The output of the merge that ended first.
    again = merge("--overwrite", "--json")
    assert again.returncode == 0, again.stderr
    report = json.loads((out / "merge_report.json").read_text())
    assert report["options"]["method"] == "model_stock" and report["units"]
    assert "0 bytes" not in again.stderr and nothing_left(tmp_path)


@pytest.mark.parametrize("kind", ["directory", "empty", "file"])
def test_a_directory_that_appears_while_files_are_flushed_is_not_replaced(
    planned, tmp_path, monkeypatch, kind
):
    out = tmp_path / "out"
    set_modes = fileio._set_modes_and_flush

    def late(directory):
        set_modes(directory)
        if kind == "file":
            out.write_text("other")
        else:
            out.mkdir()
        if kind == "directory":
            (out / "other").write_text("other")

    with monkeypatch.context() as patch:
        patch.setattr(fileio, "_set_modes_and_flush", late)
        if kind == "empty":
            run(planned, out)
        else:
            with pytest.raises(OccupiedError, match="out: another process") as caught:
                run(planned, out)
            assert ("--overwrite" in str(caught.value)) == (kind == "directory")
            assert "complete files are kept" not in str(caught.value)
            other = out if kind == "file" else out / "other"
            assert other.read_text() == "other"
            if kind == "file":
                out.unlink()
    if kind != "empty":
        report = run(planned, out, overwrite=True)
        assert report.bytes_read == 0 and set(report.resumed) == set(planned.files)
    assert contents(out) == contents(tmp_path / "expected") and nothing_left(tmp_path)


def test_overwrite_replaces_the_output_of_a_merge_that_ended_meanwhile(
    planned, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def late(directory, report):
        out.mkdir()
        (out / "other").touch()

    run(planned, out, overwrite=True, finish=late)
    assert contents(out) == contents(tmp_path / "expected")


def test_partial_files_in_subdirectories_are_removed_when_a_merge_resumes(planned, tmp_path):
    staging = tmp_path / f".out.{planned.checksum[:16]}.merge"
    (staging / "unet").mkdir(parents=True)
    (staging / "unet" / "w.safetensors.part").touch()
    run(planned, tmp_path / "out")
    assert not (tmp_path / "out" / "unet" / "w.safetensors.part").exists()
