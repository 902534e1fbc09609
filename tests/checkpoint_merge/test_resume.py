"""A merge that is killed at any moment goes on, and writes the same bytes."""

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
# Enough tensors and files for kills to fall everywhere; units over files too.
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
made = plan([root / n for n in ("base", "ft1", "ft2")], **json.loads(sys.argv[2]))
print("ready", flush=True)
run(made, root / "out")
"""


def _killed(root: Path, after: float) -> bool:
    """Starts the merge and kills it `after` seconds from its first step; whether it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(root), json.dumps(OPTIONS)],
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


def _survives(tmp_path: Path, kills: int) -> None:
    places = save(tmp_path, models(SHAPES))
    made = plan(places, **OPTIONS)
    begin = time.monotonic()
    whole = run(made, tmp_path / "whole")
    length = time.monotonic() - begin
    before = [contents(place) for place in places]
    chance, done, finished = random.Random(0), 0, 0
    while done < kills:
        done += _killed(tmp_path, chance.uniform(0, 1.2 * length))
        if (tmp_path / "out").exists():  # Complete, though the kill came: the next starts afresh.
            assert contents(tmp_path / "out") == contents(tmp_path / "whole")
            subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)
            finished += 1
            done += finished > 50
    report = run(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert report.rows == whole.rows and report.checksums == whole.checksums
    assert [contents(place) for place in places] == before
    assert {p.name for p in tmp_path.iterdir()} == {"base", "ft1", "ft2", "out", "whole"}


def test_a_few_kills(tmp_path):
    _survives(tmp_path, 3)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    _survives(tmp_path, 100)


class _Killed(BaseException):
    """As if the process had ended there."""


def _stop_after(made, out: Path, share: float, monkeypatch) -> Path:
    """Runs until a share of the bytes is done, and leaves what a killed process would leave."""
    from modelstock_jax.checkpoint_merge import output

    with monkeypatch.context() as patched:
        patched.setattr(output.StagingDir, "leave", lambda self, keep=True: self._lock.release())
        patched.setattr(
            "modelstock_jax.checkpoint_merge.output.Output.abandon",
            lambda self: self._finisher.shutdown(),
        )

        def progress(done, total):
            if done > share * total:
                raise _Killed

        with pytest.raises(_Killed):
            run(made, out, progress=progress)
    (place,) = out.parent.glob(".out.*.merge")
    return place


def test_what_is_complete_is_kept_and_the_rest_made_again(tmp_path, monkeypatch):
    made = plan(save(tmp_path, models(SHAPES)), **{**OPTIONS, "threads": 1})
    fresh = run(made, tmp_path / "whole")
    place = _stop_after(made, tmp_path / "out", 0.6, monkeypatch)
    state = json.loads((place / "merge_state.json").read_text())
    kept = {name: (place / name).stat().st_ino for name in state["checksums"]}
    assert 1 < len(kept) < len(made.files)
    seen = []
    report = run(made, tmp_path / "out", progress=lambda *done: seen.append(done))
    assert report.resumed == tuple(sorted(kept)) and report.rows == fresh.rows
    # What was there counts as done; it ends at the whole, and not before.
    assert seen[-1] == (made.bytes_read + made.bytes_written,) * 2
    assert seen == sorted(seen) and seen[0][0] < seen[-1][0] and seen[-2] < seen[-1]
    assert report.bytes_read < fresh.bytes_read
    for name, inode in kept.items():
        assert (tmp_path / "out" / name).stat().st_ino == inode
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_start_that_is_interrupted_locks_nothing(tmp_path, monkeypatch):
    made = plan(save(tmp_path, models(SHAPES)), **{**OPTIONS, "threads": 1})
    place = _stop_after(made, tmp_path / "out", 0.6, monkeypatch)
    kept = json.loads((place / "merge_state.json").read_text())["checksums"]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(output, "digest_file", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:  # Holds the frames, as a notebook does.
            run(made, tmp_path / "out")
    assert run(made, tmp_path / "out").resumed == tuple(sorted(kept)), caught


def test_what_could_not_take_its_name_is_not_made_again(tmp_path, monkeypatch):
    made = plan(save(tmp_path, models(SHAPES)), **OPTIONS)

    def refused(*_):
        raise UserError("out: cannot be written (Input/output error).")

    with monkeypatch.context() as patch:
        patch.setattr(output, "move_into_place", refused)
        with pytest.raises(UserError, match="Input/output error.*same command"):
            run(made, tmp_path / "out")
    report = run(made, tmp_path / "out")
    assert report.resumed == tuple(sorted(made.files)) and report.bytes_read == 0
    assert not (tmp_path / "out" / "merge_state.json").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "state"])
def test_a_file_that_is_no_longer_what_it_was_is_made_again(tmp_path, monkeypatch, damage):
    made = plan(save(tmp_path, models(SHAPES)), **{**OPTIONS, "threads": 1})
    run(made, tmp_path / "whole")
    place = _stop_after(made, tmp_path / "out", 0.6, monkeypatch)
    first = place / made.files[0]
    raw = bytearray(first.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        first.write_bytes(raw)
    elif damage == "cut":
        first.write_bytes(raw[:-1])
    elif damage == "remove":
        first.unlink()
    else:
        (place / "merge_state.json").write_text("{")
    report = run(made, tmp_path / "out")
    assert made.files[0] not in report.resumed
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_merge_does_not_go_on_with_these_files(tmp_path, monkeypatch):
    places = save(tmp_path, models(SHAPES))
    place = _stop_after(
        plan(places, **{**OPTIONS, "threads": 1}), tmp_path / "out", 0.6, monkeypatch
    )
    report = run(plan(places, **{**OPTIONS, "method": "uniform_mean"}), tmp_path / "out")
    assert report.resumed == ()
    assert not place.exists()  # It can be of no more use: its place is taken.
    given = models(SHAPES, seed=1)
    os.rename(tmp_path / "out", tmp_path / "uniform_mean")
    place = _stop_after(plan(places, **OPTIONS), tmp_path / "out", 0.6, monkeypatch)
    save(tmp_path, given)  # The inputs change under a killed merge.
    report = run(plan(places, **OPTIONS), tmp_path / "out")
    assert report.resumed == ()
    merge(tmp_path / "alone", given, **OPTIONS)
    # Nor do the bytes depend on where and when they were made.
    assert contents(tmp_path / "out") == contents(tmp_path / "alone" / "out")


def test_two_processes_do_not_make_one_merge(tmp_path):
    made = plan(save(tmp_path, models()))
    said = []

    def again(*_):
        if not said:
            with pytest.raises(UserError, match="out: another process") as caught:
                run(made, tmp_path / "out")
            said.append(caught)

    run(made, tmp_path / "out", finish=again)
    assert said and (tmp_path / "out").exists()


def test_threads_and_window_do_not_change_the_bytes(tmp_path):
    places = save(tmp_path, models(SHAPES, dtype=np.float16))
    for i, how in enumerate([{"threads": 1}, {"threads": 3}, {"window_bytes": 1}]):
        run(plan(places, **{**OPTIONS, **how}), tmp_path / f"out{i}")
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1") == contents(tmp_path / "out2")
