"""Checkpoints: values are restored bitwise; a read or write error is one line."""

from __future__ import annotations

import gc
import os
import shutil
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint.experimental import v1 as ocp

from modelstock_jax.errors import UserError
from modelstock_jax.training.checkpoints import Checkpoints


def tree(value):
    return {"w": jnp.full((1 << 22,), value, jnp.float32), "step": jnp.int32(value)}


def test_later_steps_do_not_change_a_save_in_progress(tmp_path):
    """The state is donated to the next step while it is being written."""
    increment = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    state = tree(0)
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        for step in range(4):
            checkpoints.save(step, state)
            for _ in range(3):
                state = increment(state)
        checkpoints.wait()
        assert checkpoints.steps == [0, 1, 2, 3]
        for step in checkpoints.steps:
            restored = checkpoints.restore(step, state)
            chex.assert_trees_all_equal(restored, jax.tree.map(np.asarray, tree(3 * step)))


def test_only_the_newest_are_kept_and_a_step_can_be_saved_again(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 3, 3, 3):
            # Large enough that the previous save is still in progress.
            checkpoints.save(step, tree(step))
        checkpoints.wait()
        assert checkpoints.steps == [2, 3]
        chex.assert_trees_all_equal(checkpoints.restore(3, tree(0)), tree(3))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == [2, 3]


def test_a_save_leaks_no_thread_and_no_open_file(tmp_path):
    """A run saves thousands of times; a process may open a thousand files."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        resources = []
        for step in range(12):
            checkpoints.save(step, {"w": jnp.zeros(3)}, on_saved=lambda: None)
            checkpoints.wait()
            gc.collect()  # Orbax's executors end when their owners are collected.
            resources.append((threading.active_count(), len(os.listdir("/dev/fd"))))
    # Thread pools grow during the first saves.
    assert resources[-1] == resources[3], resources


def test_restore_errors_name_the_checkpoint(tmp_path):
    like = {"w": jnp.zeros(3)}
    with Checkpoints(tmp_path / "a", keep=0) as checkpoints:
        checkpoints.save(1, like)
        checkpoints.wait()
        with pytest.raises(UserError, match="7"):
            checkpoints.restore(7, like)
        with pytest.raises(UserError, match="1"):
            checkpoints.restore(1, {"w": jnp.zeros(3), "other": jnp.zeros(2)})
        shutil.rmtree(tmp_path / "a" / "1" / "tree")
        with pytest.raises(UserError, match="1 .*damaged"):
            checkpoints.restore(1, like)


def test_a_directory_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match="file"):
        Checkpoints(tmp_path / "file" / "state")


def test_barriers_of_two_directories_have_different_names(tmp_path, monkeypatch):
    """On several hosts, one save may end while another starts: equal names would mix them up."""
    prefixes = []
    make = ocp.training.Checkpointer

    def record_prefix(directory, *, context, **options):
        prefixes.append(context.multiprocessing.barrier_sync_key_prefix)
        return make(directory, context=context, **options)

    monkeypatch.setattr(ocp.training, "Checkpointer", record_prefix)
    for name in ("merged/state", "merged/models", "unmerged/state"):
        Checkpoints(tmp_path / "seed_0" / name).close()
    assert len(set(prefixes)) == 3 and None not in prefixes
