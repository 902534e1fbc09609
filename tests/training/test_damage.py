"""A damaged checkpoint is refused or passed over; no value that was not saved ever comes back."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import shutil
import sys
import threading
import weakref
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import serialization

from modelstock_jax.errors import UserError
from modelstock_jax.training.checkpoints import Checkpoints, CorruptCheckpoint

# A read that Orbax gives up may end after its event loop: whether it does is a matter of timing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)


def tree(step: int):
    rng = np.random.default_rng(step)
    return {
        "params": {"w": jnp.asarray(rng.standard_normal((2, 40, 9)), jnp.float32)},
        "bits": jnp.asarray(rng.integers(0, 2**32, (2, 300)), jnp.uint32),
        "step": jnp.int32(step),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two whole checkpoints, 3 and 6."""
    directory = tmp_path_factory.mktemp("saved") / "state"
    with Checkpoints(directory, keep=0) as checkpoints:
        checkpoints.save(3, tree(3))
        checkpoints.save(6, tree(6))
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "state"))


def files(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "6").rglob("*") if path.is_file())


def newest_is_right_or_passed_over(directory: Path, capsys, what: str) -> bool:
    """Whether checkpoint 6 came back; 3 did where it did not, and one line says so."""
    with Checkpoints(directory, keep=0) as checkpoints:
        step, got = checkpoints.restore_newest(tree(0))
    assert step in (3, 6), what
    chex.assert_trees_all_equal(got, tree(step))
    output = capsys.readouterr()
    assert output.err == "", what
    if step == 3:
        (line,) = output.out.splitlines()
        assert "state/6 " in line and " 6.damaged" in line, what
    assert (directory / "6.damaged").exists() == (step == 3), what
    return step == 6


def damage_each_file(saved: Path, scratch: Path, capsys, flips: int) -> None:
    rng = random.Random(0)
    passed_over = set()
    for file in [path.relative_to(saved) for path in files(saved)]:
        for kind in ["emptied", "halved", "missing", *["flipped"] * flips]:
            directory = scratch / "state"
            shutil.copytree(saved, directory)
            path, data = directory / file, bytearray((saved / file).read_bytes())
            what = f"{file} {kind}"
            if kind == "missing":
                path.unlink()
            elif kind == "flipped":
                bit = rng.randrange(8 * len(data))
                data[bit // 8] ^= 1 << bit % 8
                path.write_bytes(data)
                what += f" in bit {bit}"
            else:
                path.write_bytes(data[: 0 if kind == "emptied" else len(data) // 2])
            if not newest_is_right_or_passed_over(directory, capsys, what):
                passed_over.add(file.parts[1])
            shutil.rmtree(directory)
    # What is left out are Orbax's own notes, which no restore depends on.
    assert passed_over == {"tree", "digests"}


def test_every_file_that_is_cut_missing_or_flipped(saved, tmp_path, capsys):
    damage_each_file(saved, tmp_path, capsys, flips=1)


@pytest.mark.slow
def test_forty_flipped_bits_in_every_file(saved, tmp_path, capsys):
    damage_each_file(saved, tmp_path, capsys, flips=40)


def test_flipped_bits_of_the_data_itself(copied, capsys):
    """Random bits do not compress: Orbax stores them as they are, with no checksum."""
    sought = np.asarray(tree(6)["bits"]).tobytes()[100:140]
    (path,) = [p for p in files(copied) if sought in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(sought) + 8] ^= 4
    path.write_bytes(data)
    with Checkpoints(copied, keep=0) as checkpoints:
        with pytest.raises(CorruptCheckpoint, match="bits "):
            checkpoints.restore(6, tree(0))
    assert not newest_is_right_or_passed_over(copied, capsys, "data")


@pytest.mark.parametrize("missing", ["tree", "digests", "tree and digests", "all"])
def test_half_a_directory(copied, capsys, missing):
    for part in ("tree", "digests"):
        if part in missing or missing == "all":
            shutil.rmtree(copied / "6" / part)
    if missing == "all":
        (copied / "6" / "_CHECKPOINT_METADATA").unlink()
    assert not newest_is_right_or_passed_over(copied, capsys, missing)


def test_what_was_set_aside_is_never_read_again(copied, capsys):
    for _ in range(2):
        # The second time a new checkpoint 6 is damaged too: the first stays where it is.
        (copied / "6/digests/data.json").write_text("{}")
        with Checkpoints(copied, keep=2) as checkpoints:
            step, _ = checkpoints.restore_newest(tree(0))
            assert step == 3 and checkpoints.steps == [3]
            checkpoints.save(6, tree(6))
        with Checkpoints(copied, keep=2) as checkpoints:
            assert checkpoints.restore_newest(tree(0))[0] == 6
    names = {path.name for path in copied.iterdir()}
    assert names == {"3", "6", "6.damaged", "6.damaged.2"}


def test_where_nothing_whole_remains(copied, capsys):
    for step in (3, 6):
        (copied / str(step) / "tree/manifest.ocdbt").unlink()
    for _ in range(2):  # The second start must not begin anew without a word either.
        with Checkpoints(copied, keep=0) as checkpoints:
            assert checkpoints.restore_newest(tree(0), at_most=2) is None
            with pytest.raises(UserError, match=f"checkpoint .*{copied}"):
                checkpoints.restore_newest(tree(0))
    shutil.rmtree(copied)
    with Checkpoints(copied, keep=0) as checkpoints:
        assert checkpoints.restore_newest(tree(0)) is None


def test_another_structure_is_a_mistake_and_not_damage(copied):
    with Checkpoints(copied, keep=0) as checkpoints:
        for other in (
            {**tree(0), "more": jnp.zeros(2)},
            {"params": tree(0)["params"]},
            {**tree(0), "step": jnp.float32(0)},
            {**tree(0), "bits": jnp.zeros((3, 300), jnp.uint32)},
        ):
            with pytest.raises(UserError, match="structure") as refusal:
                checkpoints.restore_newest(other)
            assert not isinstance(refusal.value, CorruptCheckpoint)
    assert sorted(p.name for p in copied.iterdir()) == ["3", "6"]


def test_checkpoints_from_before_digests_are_refused_and_kept(copied):
    shutil.rmtree(copied / "6" / "digests")
    path = copied / "6/_CHECKPOINT_METADATA"
    document = json.loads(path.read_text())
    del document["item_handlers"]["digests"]
    path.write_text(json.dumps(document))
    with Checkpoints(copied, keep=0) as checkpoints:
        with pytest.raises(UserError, match="digests"):
            checkpoints.restore_newest(tree(0))
    assert sorted(p.name for p in copied.iterdir()) == ["3", "6"]


def test_a_reader_leaves_a_running_save_alone(copied):
    """Orbax fills a folder of another name first; a run that starts removes those of the dead."""
    half = copied / "9.orbax-checkpoint-tmp"
    half.mkdir()
    with Checkpoints(copied, keep=0, read_only=True) as checkpoints:
        assert checkpoints.steps == [3, 6]
        checkpoints.restore(6, tree(0))
    assert half.exists()
    with Checkpoints(copied, keep=0) as checkpoints:
        checkpoints.save(9, tree(9))
    assert sorted(p.name for p in copied.iterdir()) == ["3", "6", "9"]


def test_a_read_that_is_given_up_ends_in_silence(copied, monkeypatch, capsys):
    """One read fails; TensorStore holds another for a while, and then lets go of it."""
    held, traces, read = [], [], serialization._read_shard
    gone = weakref.proxy(set())  # Another's object in memory, which cannot be asked what it is.

    async def one_slow_one_torn(**options):
        if not held:
            held.append(asyncio.current_task())
            threading.Timer(0.5, held.clear).start()
            await asyncio.sleep(60)
        await asyncio.sleep(0.05)
        raise ValueError("torn")

    monkeypatch.setattr(sys, "unraisablehook", lambda found: traces.append(str(found.object)))
    with Checkpoints(copied, keep=0) as checkpoints:
        monkeypatch.setattr(serialization, "_read_shard", one_slow_one_torn)
        with pytest.raises(CorruptCheckpoint):
            checkpoints.restore(6, tree(0))
        monkeypatch.setattr(serialization, "_read_shard", read)
        assert not held, "the read had not ended"
        assert type(gone) is weakref.ProxyType
        gc.collect()
        assert not traces and capsys.readouterr().err == ""
        chex.assert_trees_all_equal(checkpoints.restore(6, tree(0)), tree(6))
