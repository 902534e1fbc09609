"""A damaged checkpoint raises an error or is skipped; a restore never returns other values."""

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

# A read that Orbax abandons may end after its event loop, depending on timing.
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
    """Two intact checkpoints, 3 and 6."""
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


def restores_newest(directory: Path, capsys, damage: str) -> bool:
    """Return whether checkpoint 6 was restored. If not, 3 was, and one line reports it."""
    with Checkpoints(directory, keep=0) as checkpoints:
        step, restored = checkpoints.restore_newest(tree(0))
    assert step in (3, 6), damage
    chex.assert_trees_all_equal(restored, tree(step))
    output = capsys.readouterr()
    assert output.err == "", damage
    if step == 3:
        (line,) = output.out.splitlines()
        assert "state/6 " in line and " 6.damaged" in line, damage
    assert (directory / "6.damaged").exists() == (step == 3), damage
    return step == 6


def damage_each_file(saved: Path, scratch: Path, capsys, flips: int) -> None:
    rng = random.Random(0)
    skipped = set()
    for file in [path.relative_to(saved) for path in files(saved)]:
        for kind in ["empty", "truncated", "missing", *["bit flip"] * flips]:
            directory = scratch / "state"
            shutil.copytree(saved, directory)
            path, data = directory / file, bytearray((saved / file).read_bytes())
            damage = f"{file} {kind}"
            if kind == "missing":
                path.unlink()
            elif kind == "bit flip":
                bit = rng.randrange(8 * len(data))
                data[bit // 8] ^= 1 << bit % 8
                path.write_bytes(data)
                damage += f" in bit {bit}"
            else:
                path.write_bytes(data[: 0 if kind == "empty" else len(data) // 2])
            if not restores_newest(directory, capsys, damage):
                skipped.add(file.parts[1])
            shutil.rmtree(directory)
    # The other files are Orbax's own metadata, which a restore does not need.
    assert skipped == {"tree", "digests"}


def test_every_file_truncated_missing_or_with_a_flipped_bit(saved, tmp_path, capsys):
    damage_each_file(saved, tmp_path, capsys, flips=1)


@pytest.mark.slow
def test_forty_flipped_bits_in_every_file(saved, tmp_path, capsys):
    damage_each_file(saved, tmp_path, capsys, flips=40)


def test_a_flipped_bit_in_uncompressed_data(copied, capsys):
    """Random bits do not compress: Orbax stores them unchanged, without a checksum."""
    stored = np.asarray(tree(6)["bits"]).tobytes()[100:140]
    (path,) = [p for p in files(copied) if stored in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(stored) + 8] ^= 4
    path.write_bytes(data)
    with Checkpoints(copied, keep=0) as checkpoints:
        with pytest.raises(CorruptCheckpoint, match="tensor bits"):
            checkpoints.restore(6, tree(0))
    assert not restores_newest(copied, capsys, "data")


@pytest.mark.parametrize("missing", ["tree", "digests", "tree and digests", "all"])
def test_a_missing_part_of_a_checkpoint(copied, capsys, missing):
    for part in ("tree", "digests"):
        if part in missing or missing == "all":
            shutil.rmtree(copied / "6" / part)
    if missing == "all":
        (copied / "6" / "_CHECKPOINT_METADATA").unlink()
    assert not restores_newest(copied, capsys, missing)


def test_a_quarantined_checkpoint_is_never_read_again(copied, capsys):
    for _ in range(2):
        # The second time, the new checkpoint 6 is damaged; the first one remains quarantined.
        (copied / "6/digests/data.json").write_text("{}")
        with Checkpoints(copied, keep=2) as checkpoints:
            step, _ = checkpoints.restore_newest(tree(0))
            assert step == 3 and checkpoints.steps == [3]
            checkpoints.save(6, tree(6))
        with Checkpoints(copied, keep=2) as checkpoints:
            assert checkpoints.restore_newest(tree(0))[0] == 6
    names = {path.name for path in copied.iterdir()}
    assert names == {"3", "6", "6.damaged", "6.damaged.2"}


def test_an_error_if_no_checkpoint_is_intact(copied, capsys):
    for step in (3, 6):
        (copied / str(step) / "tree/manifest.ocdbt").unlink()
    for _ in range(2):  # The second start must not silently train from the beginning either.
        with Checkpoints(copied, keep=0) as checkpoints:
            assert checkpoints.restore_newest(tree(0), max_step=2) is None
            with pytest.raises(UserError, match=f"checkpoint .*{copied}"):
                checkpoints.restore_newest(tree(0))
    shutil.rmtree(copied)
    with Checkpoints(copied, keep=0) as checkpoints:
        assert checkpoints.restore_newest(tree(0)) is None


def test_another_structure_is_a_user_error_and_not_damage(copied):
    with Checkpoints(copied, keep=0) as checkpoints:
        for other in (
            {**tree(0), "extra": jnp.zeros(2)},
            {"params": tree(0)["params"]},
            {**tree(0), "step": jnp.float32(0)},
            {**tree(0), "bits": jnp.zeros((3, 300), jnp.uint32)},
        ):
            with pytest.raises(UserError, match="structure") as error:
                checkpoints.restore_newest(other)
            assert not isinstance(error.value, CorruptCheckpoint)
    assert sorted(p.name for p in copied.iterdir()) == ["3", "6"]


def test_checkpoints_without_checksums_raise_an_error_and_are_not_renamed(copied):
    shutil.rmtree(copied / "6" / "digests")
    path = copied / "6/_CHECKPOINT_METADATA"
    document = json.loads(path.read_text())
    del document["item_handlers"]["digests"]
    path.write_text(json.dumps(document))
    with Checkpoints(copied, keep=0) as checkpoints:
        with pytest.raises(UserError, match="digests"):
            checkpoints.restore_newest(tree(0))
    assert sorted(p.name for p in copied.iterdir()) == ["3", "6"]


def test_a_reader_does_not_delete_a_save_in_progress(copied):
    """Orbax first writes to a temporary directory; a starting run removes abandoned ones."""
    temporary = copied / "9.orbax-checkpoint-tmp"
    temporary.mkdir()
    with Checkpoints(copied, keep=0, read_only=True) as checkpoints:
        assert checkpoints.steps == [3, 6]
        checkpoints.restore(6, tree(0))
    assert temporary.exists()
    with Checkpoints(copied, keep=0) as checkpoints:
        checkpoints.save(9, tree(9))
    assert sorted(p.name for p in copied.iterdir()) == ["3", "6", "9"]


def test_an_abandoned_read_prints_nothing(copied, monkeypatch, capsys):
    """One read fails; TensorStore continues another one for a while."""
    pending, traces, read = [], [], serialization._read_shard
    dead = weakref.proxy(set())  # An unrelated object whose __class__ cannot be read.

    async def one_slow_one_failing(**options):
        if not pending:
            pending.append(asyncio.current_task())
            threading.Timer(0.5, pending.clear).start()
            await asyncio.sleep(60)
        await asyncio.sleep(0.05)
        raise ValueError("truncated")

    monkeypatch.setattr(sys, "unraisablehook", lambda args: traces.append(str(args.object)))
    with Checkpoints(copied, keep=0) as checkpoints:
        monkeypatch.setattr(serialization, "_read_shard", one_slow_one_failing)
        with pytest.raises(CorruptCheckpoint):
            checkpoints.restore(6, tree(0))
        monkeypatch.setattr(serialization, "_read_shard", read)
        assert not pending, "the read had not ended"
        assert type(dead) is weakref.ProxyType
        gc.collect()
        assert not traces and capsys.readouterr().err == ""
        chex.assert_trees_all_equal(checkpoints.restore(6, tree(0)), tree(6))
