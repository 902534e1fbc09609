"""Merges on file systems that lack locks, flushes or permissions, and to every kind of `--out`."""

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
def made(tmp_path):
    """A plan of several files, and the bytes of its merge on a file system that has everything."""
    found = plan(save(tmp_path, models()), max_shard_bytes=2000)
    assert len(found.files) > 2
    run(found, tmp_path / "expected")
    return found


def fails(monkeypatch, module, name: str, code: str, only=lambda *_: True) -> list:
    """Lets a system call fail with an errno; returns the calls that failed."""
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
def test_what_a_file_system_cannot_do_is_no_error(made, tmp_path, monkeypatch, call, code):
    monkeypatch.setattr(writer, "_SYNC", 100)  # So that small files are flushed on the way, too.
    if (call, code) == ("chmod", "EINVAL"):
        code = "EPERM"
    calls = fails(monkeypatch, os, call, code)
    run(made, tmp_path / "out")
    assert calls and contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("code", BROKEN)
@pytest.mark.parametrize("call", ["fsync", "fdatasync", "chmod"])
def test_a_broken_or_full_disk_is_an_error(made, tmp_path, monkeypatch, call, code):
    if (call, code) == ("chmod", "EDQUOT"):
        code = "EACCES"
    monkeypatch.setattr(writer, "_SYNC", 100)
    with monkeypatch.context() as patch:
        assert not fails(patch, os, call, code)
        with pytest.raises(UserError, match=str(tmp_path)) as caught:
            run(made, tmp_path / "out")
    line = str(caught.value)
    assert os.strerror(getattr(errno, code)) in line and "\n" not in line
    assert not (tmp_path / "out").exists()
    run(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


@pytest.mark.parametrize(("code", "only", "fatal"), [
    ("EBADF", is_directory, False),
    ("EBADF", lambda file: not is_directory(file), True),
    ("EIO", is_directory, True),
])  # fmt: skip
def test_flushes_of_directories(made, tmp_path, monkeypatch, code, only, fatal):
    calls = fails(monkeypatch, os, "fsync", code, only)
    if fatal:
        with pytest.raises(UserError, match=os.strerror(getattr(errno, code))):
            run(made, tmp_path / "out")
    else:
        run(made, tmp_path / "out")
        assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert calls


@pytest.mark.parametrize("code", ["EACCES", "EPERM"])
def test_a_directory_that_may_be_written_and_not_read(made, tmp_path, monkeypatch, code):
    def only(path, flags, *_):
        return os.path.isdir(path) and flags & os.O_ACCMODE == os.O_RDONLY

    real, calls = os.open, []

    def call(path, flags, *args, **kwargs):
        if only(path, flags) and "dir_fd" not in kwargs and "expected" not in str(path):
            calls.append(path)
            raise PermissionError(getattr(errno, code), "denied")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", call)
    run(made, tmp_path / "out")
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
def test_without_locks_a_merge_is_made_and_says_so(made, tmp_path, monkeypatch, capsys, code):
    # What may be another process's is left alone, for nobody can say whether it is at work.
    other = tmp_path / ".out.0123456789abcdef.merge"
    other.mkdir()
    (other / "merge.lock").touch()
    assert fails(monkeypatch, fcntl, "flock", code) == []
    run(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected") and other.exists()
    said = capsys.readouterr().err
    assert said.startswith("note: ") and said.count("\n") == 1
    assert str(tmp_path / "out") in said and "locks" in said and "--out" in said


@pytest.mark.parametrize("code", ["EWOULDBLOCK", "EAGAIN"])
def test_a_lock_of_another_process_is_an_error(made, tmp_path, monkeypatch, code):
    fails(monkeypatch, fcntl, "flock", code)
    with pytest.raises(UserError, match="out: another process"):
        run(made, tmp_path / "out")


@pytest.mark.parametrize("target", ["there", "empty", "gone", "deep/gone"])
def test_a_link_stays_and_leads_to_the_merge(made, tmp_path, target):
    for name in ("there", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "old").touch()
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "out"
    link.symlink_to(Path("..") / target)
    if target == "there":
        with pytest.raises(UserError, match="there: .*--overwrite"):
            run(made, link)
    run(made, link, overwrite=target == "there")
    assert os.readlink(link) == f"../{target}" and not (tmp_path / target).is_symlink()
    assert contents(tmp_path / target) == contents(tmp_path / "expected")
    assert [p.name for p in (tmp_path / "links").iterdir()] == ["out"] and nothing_left(tmp_path)


def never(*_: object) -> None:
    pytest.fail("the merge began")


def test_a_mount_point_is_refused_before_the_merge(made, tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    ismount = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda p: str(p).endswith("volume") or ismount(p))
    with pytest.raises(UserError) as caught:
        run(made, tmp_path / "volume", overwrite=True, progress=never)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/volume: ") and said.endswith(f" {tmp_path}/volume/merged")
    assert "mount" in said
    run(made, tmp_path / "volume" / "merged")
    assert contents(tmp_path / "volume/merged") == contents(tmp_path / "expected")


def test_a_mount_on_its_own_file_system_is_found(tmp_path, monkeypatch):
    place = tmp_path / "a b"
    line = f"36 35 98:0 /x {tmp_path}/a\\040b rw,noatime - ext4 /dev/root rw\n"
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *a, **k: line if str(path).startswith("/proc/self") else real(path, *a, **k),
    )
    assert output._is_mounted(place) and not output._is_mounted(tmp_path / "a")


@pytest.mark.parametrize(("out", "said"), [
    ("file/out", "{root}/file/out: {root}/file "),
    ("file/a/b", "{root}/file/a/b: {root}/file "),
    ("file", "{root}/file: "),
    ("to_file/out", "{root}/file "),
    ("loop", "{root}/loop: "),
    ("x" * 250, "File name too long"),
])  # fmt: skip
def test_a_place_where_nothing_can_be_made_is_named_first(made, tmp_path, out, said):
    (tmp_path / "file").touch()
    (tmp_path / "to_file").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError) as caught:
        run(made, tmp_path / out, progress=never)
    line = str(caught.value)
    assert said.format(root=tmp_path) in line and "\n" not in line
    assert nothing_left(tmp_path)


WAITS = """
import sys, time
from pathlib import Path
from modelstock_jax.checkpoint_merge import cli, commands, output
commit, out = output.Workplace.commit, Path(sys.argv[1])
commands.PlotProcess.finish = lambda drawing: None
def late(self):
    print("ready", flush=True)
    while not out.exists():
        time.sleep(0.01)
    commit(self)
output.Workplace.commit = late
sys.exit(cli.main(sys.argv[2:]))
"""
MERGES = """
import sys
from modelstock_jax.checkpoint_merge import cli, commands
commands.PlotProcess.finish = lambda drawing: None
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_later_of_two_merges_says_how_it_still_succeeds(tmp_path):
    """Real processes: the other one takes the place while the first merges."""
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
    _, said = first.communicate(timeout=120)
    error = said.splitlines()[-1]
    assert first.returncode == 1 and error.startswith(f"error: {out}: ")
    assert "process" in error and "--overwrite" in error
    assert contents(out) == before  # Of the one that was first.
    again = merge("--overwrite", "--json")
    assert again.returncode == 0, again.stderr
    report = json.loads((out / "merge_report.json").read_text())
    assert report["options"]["method"] == "model_stock" and report["units"]
    assert "0 bytes" not in again.stderr and nothing_left(tmp_path)


@pytest.mark.parametrize("kind", ["directory", "empty", "file"])
def test_a_directory_that_appears_while_files_are_flushed_is_not_replaced(
    made, tmp_path, monkeypatch, kind
):
    out = tmp_path / "out"
    settle = fileio._settle

    def late(directory):
        settle(directory)
        if kind == "file":
            out.write_text("mine")
        else:
            out.mkdir()
        if kind == "directory":
            (out / "mine").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(fileio, "_settle", late)
        if kind == "empty":
            run(made, out)
        else:
            with pytest.raises(OccupiedError, match="out: another process") as caught:
                run(made, out)
            assert ("--overwrite" in str(caught.value)) == (kind == "directory")
            assert "same command again." not in str(caught.value)
            mine = out if kind == "file" else out / "mine"
            assert mine.read_text() == "mine"
            if kind == "file":
                out.unlink()
    if kind != "empty":
        report = run(made, out, overwrite=True)
        assert report.bytes_read == 0 and set(report.resumed) == set(made.files)
    assert contents(out) == contents(tmp_path / "expected") and nothing_left(tmp_path)


def test_overwrite_replaces_what_another_merge_made_meanwhile(made, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def late(directory, report):
        out.mkdir()
        (out / "theirs").touch()

    run(made, out, overwrite=True, finish=late)
    assert contents(out) == contents(tmp_path / "expected")


def test_parts_in_subdirectories_are_removed_when_a_merge_resumes(made, tmp_path):
    place = tmp_path / f".out.{made.checksum[:16]}.merge"
    (place / "unet").mkdir(parents=True)
    (place / "unet" / "w.safetensors.part").touch()
    run(made, tmp_path / "out")
    assert not (tmp_path / "out" / "unet" / "w.safetensors.part").exists()
