"""A run resumes from the newest intact checkpoints, with its first anchor, on any mesh."""

from __future__ import annotations

import itertools
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from modelstock_jax.errors import UserError
from modelstock_jax.training.checkpoints import Checkpoints, resume, save_or_check_anchor
from modelstock_jax.training.trainer import merged_directory
from tests.training import linear, tiny

# A read that Orbax abandons may end after its event loop, depending on timing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)

EVERY = 4  # Steps between merges.
LAST = 10  # The run also merges at its end.


def tree(value):
    return {"w": jnp.full((2, 3), value, jnp.float32)}


def last_merge(step: int) -> int:
    return step if step == LAST else step - step % EVERY


@pytest.fixture
def stores(tmp_path):
    """Training states 3, 4, 8, 9 and merged models 4 and 8, as a run saves them."""
    with (
        Checkpoints(tmp_path / "state", keep=0) as states,
        Checkpoints(tmp_path / "merged", keep=0) as merges,
    ):
        for step in (3, 4, 8, 9):
            states.save(step, tree(step))
        for step in (4, 8):
            merges.save(step, tree(-step))
        states.wait()
        merges.wait()
        yield states, merges


def damage(store: Checkpoints, step: int) -> None:
    (store.directory / str(step) / "digests/data.json").write_text("{}")


def resume_steps(stores, *, needs: bool = True):
    """Return the steps of the restored state and (negative) of the restored merged model."""
    states, merges = stores
    restored = resume(
        states, merges, tree(0), tree(0), last_merge, lambda step: needs or step == LAST
    )
    return [None if x is None else int(x["w"][0, 0]) for x in restored]


def test_the_newest_state_and_the_merge_before_it(stores):
    assert resume_steps(stores) == [9, -8]


def test_no_merged_model_before_the_first_merge(stores):
    states, _ = stores
    for step in (4, 8, 9):
        damage(states, step)
    assert resume_steps(stores) == [3, None]


def test_a_damaged_state_is_skipped_with_its_merge(stores, capsys):
    states, _ = stores
    damage(states, 9)
    damage(states, 8)
    assert resume_steps(stores) == [4, -4]
    lines = [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in lines] == ["9", "8"]
    assert all("damaged" in line for line in lines)


def test_a_damaged_merge_is_repeated_from_an_earlier_state(stores, capsys):
    damage(stores[1], 8)
    assert resume_steps(stores) == [4, -4]
    assert "step 8 " in capsys.readouterr().out
    # Newer states are not deleted.
    assert stores[0].steps == [3, 4, 8, 9]


def test_a_missing_merge_is_repeated_only_if_it_is_needed(stores):
    shutil.rmtree(stores[1].directory / "8")
    stores[1]._checkpointer.reload()
    assert resume_steps(stores, needs=False) == [9, None]
    assert resume_steps(stores) == [4, -4]


def test_the_last_step_needs_its_merge(stores):
    states, merges = stores
    states.save(LAST, tree(LAST))
    states.wait()
    assert resume_steps(stores, needs=False) == [9, -8]
    merges.save(LAST, tree(-LAST))
    merges.wait()
    assert resume_steps(stores, needs=False) == [LAST, -LAST]


def test_an_error_if_no_state_precedes_a_damaged_merge(stores):
    states, merges = stores
    damage(merges, 4)
    for step in (3, 8, 9):
        shutil.rmtree(states.directory / str(step))
    states._checkpointer.reload()
    for _ in range(2):
        with pytest.raises(UserError, match="merged model 4 "):
            resume_steps(stores)


def test_nothing_is_restored_from_an_empty_directory(tmp_path):
    with Checkpoints(tmp_path / "state") as states, Checkpoints(tmp_path / "merged") as merges:
        assert resume_steps((states, merges)) == [None, None]


def on_mesh(tree, replica: int, data: int, split):
    mesh = jax.make_mesh(
        (replica, data),
        ("replica", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[: replica * data],
    )

    def sharding(x):
        replica_axis = ("replica",) if x.ndim else ()
        data_axis = ("data",) if split and x.ndim > 1 else ()
        return NamedSharding(mesh, PartitionSpec(*replica_axis, *data_axis))

    return jax.device_put(tree, jax.tree.map(sharding, tree))


def test_a_state_is_restored_on_another_mesh(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "params": rng.standard_normal((2, 16, 8)).astype(np.float32),
        "count": np.int32([7, 7]),
        "step": np.int32(7),
    }
    meshes = [(1, 1, False), (2, 4, True), (1, 8, True), (2, 1, False)]
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        for number, mesh in enumerate(meshes):
            checkpoints.save(number, on_mesh(state, *mesh))
        for number in range(len(meshes)):
            abstract = on_mesh(jax.tree.map(np.zeros_like, state), *meshes[number - 1])
            restored = checkpoints.restore(number, abstract)
            chex.assert_trees_all_equal(restored, state)
            assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
                lambda x: x.sharding, abstract
            )


ANCHOR = {"tower": {"w": jnp.linspace(-1, 1, 12)}, "head": {"kernel": jnp.linspace(0, 2, 6)}}


def changed(name: str, relative: float):
    new = jax.tree.map(lambda x: x, ANCHOR)
    (leaf,) = new[name].values()
    new[name] = {next(iter(new[name])): leaf.at[1].add(relative * jnp.abs(leaf).max())}
    return new


def test_the_anchor_is_saved_and_checked(tmp_path):
    path = tmp_path / "anchor"
    assert save_or_check_anchor(path, ANCHOR, "print") is ANCHOR
    assert save_or_check_anchor(path, ANCHOR, "print") is ANCHOR
    # Same checkpoint, different rounding: the run continues with its saved anchor.
    chex.assert_trees_all_equal(save_or_check_anchor(path, changed("head", 1e-3), "print"), ANCHOR)
    for other, checksum, named in [
        (changed("head", 0.1), "print", "head/kernel"),
        (changed("tower", 1e-6), "other", "tower/w"),
        (ANCHOR, "other", "text tower"),
        (ANCHOR | {"extra": jnp.zeros(2)}, "print", "extra"),
    ]:
        with pytest.raises(UserError, match=f"{named}.*{path}"):
            save_or_check_anchor(path, other, checksum)
    assert save_or_check_anchor(path, ANCHOR, "print") is ANCHOR


def test_without_a_checksum_the_anchor_must_be_bitwise_identical(tmp_path):
    save_or_check_anchor(tmp_path, ANCHOR)
    with pytest.raises(UserError, match="tower/w"):
        save_or_check_anchor(tmp_path, changed("tower", 1e-6))


def test_a_damaged_anchor_is_saved_again(tmp_path, capsys):
    save_or_check_anchor(tmp_path, ANCHOR, "print")
    (tmp_path / "0/digests/data.json").unlink()
    save_or_check_anchor(tmp_path, ANCHOR, "print")
    assert " 0.damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="head/kernel"):
        save_or_check_anchor(tmp_path, changed("head", 0.1), "print")


def test_a_signal_in_the_last_step_ends_the_command(tmp_path):
    """Otherwise the next training of the same command would start."""
    trainer = tiny.trainer(tmp_path, epochs=1, merge__every="never")
    last, batches = trainer.task.num_steps, trainer.batches

    def signaled(start):
        for step, batch in enumerate(batches(start), start + 1):
            if step == last:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    trainer.batches = signaled
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    assert stopped.value.code == 143
    assert trainer.run().state.step == last


def test_a_run_of_an_older_version_resumes_from_its_merged_models(tmp_path):
    """Merged models were in `merged`, now in `models`."""
    options = {"monitor__on_non_finite": "restore_last_merge"}  # Steps read the last merged model.
    complete = linear.trainer(tmp_path / "complete", **options)
    expected = complete.run()
    old = linear.trainer(tmp_path / "old", fns=complete.step_functions, **options)
    batches = old.batches

    def until_step_6(start):
        yield from itertools.islice(batches(start), 6 - start)
        raise InterruptedError

    old.batches = until_step_6
    with pytest.raises(InterruptedError):
        old.run()
    (old.workdir / "models").rename(old.workdir / "merged")
    old.batches = batches
    result = old.run()
    chex.assert_trees_all_equal((result.state, result.merged), (expected.state, expected.merged))
    assert not (old.workdir / "models").exists()
    assert merged_directory(old.workdir).name == "merged"
    with Checkpoints(old.workdir / "merged", keep=0) as merges:
        assert merges.steps == [4, 8]
    lines = [(r.workdir / "metrics.jsonl").read_bytes() for r in (old, complete)]
    assert lines[0] == lines[1]
    # A finished run reads its last merged model from there.
    chex.assert_trees_all_equal(old.run().merged, expected.merged)
