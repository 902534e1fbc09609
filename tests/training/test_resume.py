"""A run goes on from what is whole, with the anchor that it began with, on whatever mesh."""

from __future__ import annotations

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
from tests.training import tiny

# A read that Orbax gives up may end after its event loop: whether it does is a matter of timing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)

EVERY = 4  # Steps between merges.
LAST = 10  # The run merges at its end too.


def tree(value):
    return {"w": jnp.full((2, 3), value, jnp.float32)}


def last_merge(step: int) -> int:
    return step if step == LAST else step - step % EVERY


@pytest.fixture
def stores(tmp_path):
    """States 3, 4, 8, 9 and merged models 4 and 8, as a run leaves them."""
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


def go_on(stores, *, needs: bool = True):
    states, merges = stores
    found = resume(states, merges, tree(0), tree(0), last_merge, lambda step: needs or step == LAST)
    return [None if x is None else int(x["w"][0, 0]) for x in found]


def test_the_newest_state_and_the_merge_before_it(stores):
    assert go_on(stores) == [9, -8]


def test_before_the_first_merge_there_is_none(stores):
    states, _ = stores
    for step in (4, 8, 9):
        damage(states, step)
    assert go_on(stores) == [3, None]


def test_a_damaged_state_is_passed_over_with_its_merge(stores, capsys):
    states, _ = stores
    damage(states, 9)
    damage(states, 8)
    assert go_on(stores) == [4, -4]
    lines = [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in lines] == ["9", "8"]
    assert all("damaged" in line for line in lines)


def test_a_damaged_merge_is_made_again_from_a_state_before_it(stores, capsys):
    damage(stores[1], 8)
    assert go_on(stores) == [4, -4]
    assert "step 8 " in capsys.readouterr().out
    # States that are newer are not lost by it.
    assert stores[0].steps == [3, 4, 8, 9]


def test_a_missing_merge_is_made_again_where_it_is_needed_alone(stores):
    shutil.rmtree(stores[1].directory / "8")
    stores[1]._checkpointer.reload()
    assert go_on(stores, needs=False) == [9, None]
    assert go_on(stores) == [4, -4]


def test_the_end_needs_its_merge(stores):
    states, merges = stores
    states.save(LAST, tree(LAST))
    states.wait()
    assert go_on(stores, needs=False) == [9, -8]
    merges.save(LAST, tree(-LAST))
    merges.wait()
    assert go_on(stores, needs=False) == [LAST, -LAST]


def test_where_no_state_comes_before_a_damaged_merge(stores):
    states, merges = stores
    damage(merges, 4)
    for step in (3, 8, 9):
        shutil.rmtree(states.directory / str(step))
    states._checkpointer.reload()
    for _ in range(2):
        with pytest.raises(UserError, match="merged model 4 "):
            go_on(stores)


def test_nothing_saved_is_a_start(tmp_path):
    with Checkpoints(tmp_path / "state") as states, Checkpoints(tmp_path / "merged") as merges:
        assert go_on((states, merges)) == [None, None]


def placed(tree, replica: int, data: int, split):
    mesh = jax.make_mesh(
        (replica, data),
        ("replica", "data"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[: replica * data],
    )

    def place(x):
        lead = ("replica",) if x.ndim else ()
        over_data = ("data",) if split and x.ndim > 1 else ()
        return NamedSharding(mesh, PartitionSpec(*lead, *over_data))

    return jax.device_put(tree, jax.tree.map(place, tree))


def test_a_state_goes_on_on_another_mesh(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "params": rng.standard_normal((2, 16, 8)).astype(np.float32),
        "count": np.int32([7, 7]),
        "step": np.int32(7),
    }
    meshes = [(1, 1, False), (2, 4, True), (1, 8, True), (2, 1, False)]
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        for number, place in enumerate(meshes):
            checkpoints.save(number, placed(state, *place))
        for number in range(len(meshes)):
            like = placed(jax.tree.map(np.zeros_like, state), *meshes[number - 1])
            got = checkpoints.restore(number, like)
            chex.assert_trees_all_equal(got, state)
            assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(
                lambda x: x.sharding, like
            )


ANCHOR = {"tower": {"w": jnp.linspace(-1, 1, 12)}, "head": {"kernel": jnp.linspace(0, 2, 6)}}


def changed(name: str, relative: float):
    new = jax.tree.map(lambda x: x, ANCHOR)
    (leaf,) = new[name].values()
    new[name] = {next(iter(new[name])): leaf.at[1].add(relative * jnp.abs(leaf).max())}
    return new


def test_the_anchor_is_kept_and_compared(tmp_path):
    place = tmp_path / "anchor"
    assert save_or_check_anchor(place, ANCHOR, "print") is ANCHOR
    assert save_or_check_anchor(place, ANCHOR, "print") is ANCHOR
    # Rounded otherwise, from the same files: the run goes on with its own.
    chex.assert_trees_all_equal(save_or_check_anchor(place, changed("head", 1e-3), "print"), ANCHOR)
    for other, fingerprint, named in [
        (changed("head", 0.1), "print", "head/kernel"),
        (changed("tower", 1e-6), "other", "tower/w"),
        (ANCHOR, "other", "text tower"),
        (ANCHOR | {"more": jnp.zeros(2)}, "print", "more"),
    ]:
        with pytest.raises(UserError, match=f"{named}.*{place}"):
            save_or_check_anchor(place, other, fingerprint)
    assert save_or_check_anchor(place, ANCHOR, "print") is ANCHOR


def test_without_a_fingerprint_the_anchor_is_the_same_bit_for_bit(tmp_path):
    save_or_check_anchor(tmp_path, ANCHOR)
    with pytest.raises(UserError, match="tower/w"):
        save_or_check_anchor(tmp_path, changed("tower", 1e-6))


def test_a_damaged_anchor_is_saved_anew(tmp_path, capsys):
    save_or_check_anchor(tmp_path, ANCHOR, "print")
    (tmp_path / "0/digests/data.json").unlink()
    save_or_check_anchor(tmp_path, ANCHOR, "print")
    assert " 0.damaged" in capsys.readouterr().out
    with pytest.raises(UserError, match="head/kernel"):
        save_or_check_anchor(tmp_path, changed("head", 0.1), "print")


def test_a_signal_in_the_last_step_ends_the_command(tmp_path):
    """Else the next training of the same command would begin, as if nobody had asked."""
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
