"""A merge that is killed at any time resumes; the result is bitwise identical."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge import output
from modelstock_jax.checkpoint_merge.executor import run
from modelstock_jax.errors import UserError
from tests.checkpoint_merge.engine import merge, models, plan, save
from tests.checkpoint_merge.test_executor import contents

ROOT = Path(__file__).parents[2]
# Enough tensors and files for kills at every stage; some units span files.
SHAPES = {
    f"model.layers.{i}.self_attn.{r}_proj.weight": (128, 128) for i in range(16) for r in "qkv"
}
OPTIONS = {"unit": "layer", "max_shard_bytes": 5 * 128 * 128 * 4, "threads": 2}
COMMAND = """
import sys, json
from tests.checkpoint_merge.engine import plan
from modelstock_jax.checkpoint_merge.executor import run
from pathlib import Path
root = Path(sys.argv[1])
planned = plan([root / n for n in ("base", "ft1", "ft2")], **json.loads(sys.argv[2]))
print("ready", flush=True)
run(planned, root / "out")
"""


def _killed(root: Path, after: float, options: dict) -> bool:
    """Start the merge and kill it `after` seconds later; return whether it was still running."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(root), json.dumps(options)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ},
    )
    process.stdout.readline()
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return process.returncode == -signal.SIGKILL


def _survives(tmp_path: Path, kills: int, **more) -> None:
    paths, options = save(tmp_path, models(SHAPES)), OPTIONS | more
    planned = plan(paths, **options)
    begin = time.monotonic()
    reference = run(planned, tmp_path / "reference")
    length = time.monotonic() - begin
    before = [contents(staging) for staging in paths]
    rng, done, finished = random.Random(0), 0, 0
    while done < kills:
        done += _killed(tmp_path, rng.uniform(0, 1.2 * length), options)
        if (tmp_path / "out").exists():  # It was complete before the kill.
            assert contents(tmp_path / "out") == contents(tmp_path / "reference")
            subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
            finished += 1
            done += finished > 50
    report = run(planned, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")
    assert report.rows == reference.rows and report.checksums == reference.checksums
    assert [contents(staging) for staging in paths] == before
    assert {p.name for p in tmp_path.iterdir()} == {"base", "ft1", "ft2", "out", "reference"}


_RANDOM = {"density": 0.5, "seed": 3}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("model_stock", {}),
        ("dare_ties", _RANDOM),
        ("della", _RANDOM),
        pytest.param("monosoup", {"unit": "tensor"}, marks=pytest.mark.slow),
    ],
)
def test_a_few_kills(tmp_path, method, options):
    _survives(tmp_path, 3, method=method, **options)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    _survives(tmp_path, 100)


class _Killed(BaseException):
    """Simulates a killed process."""


def _stop_after(planned, out: Path, fraction: float, monkeypatch) -> Path:
    """Stop after a fraction of the bytes like a killed process; return the staging directory."""
    from modelstock_jax.checkpoint_merge import output

    with monkeypatch.context() as patched:
        patched.setattr(output.StagingDir, "leave", lambda self, keep=True: self._lock.release())
        patched.setattr(
            "modelstock_jax.checkpoint_merge.output.Output.abandon",
            lambda self: self._finisher.shutdown(),
        )

        def progress(done, total):
            if done > fraction * total:
                raise _Killed

        with pytest.raises(_Killed):
            run(planned, out, progress=progress)
    (staging,) = out.parent.glob(".out.*.merge")
    return staging


def test_complete_files_are_reused_and_the_others_written_again(tmp_path, monkeypatch):
    planned = plan(save(tmp_path, models(SHAPES)), **{**OPTIONS, "threads": 1})
    fresh = run(planned, tmp_path / "reference")
    staging = _stop_after(planned, tmp_path / "out", 0.6, monkeypatch)
    state = json.loads((staging / "merge_state.json").read_text())
    inodes = {name: (staging / name).stat().st_ino for name in state["checksums"]}
    assert 1 < len(inodes) < len(planned.files)
    calls = []
    report = run(planned, tmp_path / "out", progress=lambda *done: calls.append(done))
    assert report.resumed == tuple(sorted(inodes)) and report.rows == fresh.rows
    # Reused files count as done; only the last call reports the total.
    assert calls[-1] == (planned.bytes_read + planned.bytes_written,) * 2
    assert calls == sorted(calls) and calls[0][0] < calls[-1][0] and calls[-2] < calls[-1]
    assert report.bytes_read < fresh.bytes_read
    for name, inode in inodes.items():
        assert (tmp_path / "out" / name).stat().st_ino == inode
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_an_interrupted_start_releases_the_lock(tmp_path, monkeypatch):
    planned = plan(save(tmp_path, models(SHAPES)), **{**OPTIONS, "threads": 1})
    staging = _stop_after(planned, tmp_path / "out", 0.6, monkeypatch)
    checksums = json.loads((staging / "merge_state.json").read_text())["checksums"]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(output, "checksum_file", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:  # Keeps the frames alive, like a notebook.
            run(planned, tmp_path / "out")
    assert run(planned, tmp_path / "out").resumed == tuple(sorted(checksums)), caught


def test_a_directory_that_could_not_be_renamed_is_not_written_again(tmp_path, monkeypatch):
    planned = plan(save(tmp_path, models(SHAPES)), **OPTIONS)

    def fail(*_):
        raise UserError("out: cannot be written (Input/output error)")

    with monkeypatch.context() as patch:
        patch.setattr(output, "move_into_place", fail)
        with pytest.raises(UserError, match="Input/output error.*same command"):
            run(planned, tmp_path / "out")
    report = run(planned, tmp_path / "out")
    assert report.resumed == tuple(sorted(planned.files)) and report.bytes_read == 0
    assert not (tmp_path / "out" / "merge_state.json").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "state"])
def test_a_changed_file_is_written_again(tmp_path, monkeypatch, damage):
    planned = plan(save(tmp_path, models(SHAPES)), **{**OPTIONS, "threads": 1})
    run(planned, tmp_path / "reference")
    staging = _stop_after(planned, tmp_path / "out", 0.6, monkeypatch)
    first = staging / planned.files[0]
    raw = bytearray(first.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        first.write_bytes(raw)
    elif damage == "cut":
        first.write_bytes(raw[:-1])
    elif damage == "remove":
        first.unlink()
    else:
        (staging / "merge_state.json").write_text("{")
    report = run(planned, tmp_path / "out")
    assert planned.files[0] not in report.resumed
    assert contents(tmp_path / "out") == contents(tmp_path / "reference")


def test_another_merge_does_not_reuse_the_files(tmp_path, monkeypatch):
    paths = save(tmp_path, models(SHAPES))
    staging = _stop_after(
        plan(paths, **{**OPTIONS, "threads": 1}), tmp_path / "out", 0.6, monkeypatch
    )
    report = run(plan(paths, **{**OPTIONS, "method": "uniform_mean"}), tmp_path / "out")
    assert report.resumed == ()
    assert not staging.exists()  # It is useless now, since the output exists.
    changed = models(SHAPES, seed=1)
    os.rename(tmp_path / "out", tmp_path / "uniform_mean")
    staging = _stop_after(plan(paths, **OPTIONS), tmp_path / "out", 0.6, monkeypatch)
    save(tmp_path, changed)  # The inputs change before the merge resumes.
    report = run(plan(paths, **OPTIONS), tmp_path / "out")
    assert report.resumed == ()
    merge(tmp_path / "alone", changed, **OPTIONS)
    # The files do not depend on the directory or the time.
    assert contents(tmp_path / "out") == contents(tmp_path / "alone" / "out")


def test_a_merge_that_already_runs_is_an_error(tmp_path):
    planned = plan(save(tmp_path, models()))
    errors = []

    def again(*_):
        if not errors:
            with pytest.raises(UserError, match="out: another process") as caught:
                run(planned, tmp_path / "out")
            errors.append(caught)

    run(planned, tmp_path / "out", finish=again)
    assert errors and (tmp_path / "out").exists()


def test_threads_and_window_do_not_change_the_files(tmp_path):
    paths = save(tmp_path, models(SHAPES, dtype=np.float16))
    for i, options in enumerate([{"threads": 1}, {"threads": 3}, {"window_bytes": 1}]):
        run(plan(paths, **{**OPTIONS, **options}), tmp_path / f"out{i}")
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1") == contents(tmp_path / "out2")
