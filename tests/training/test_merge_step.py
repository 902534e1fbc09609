"""The merge during training: schedule, result and optimizer state."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.merging import model_stock, model_stock_carried, uniform_mean
from modelstock_jax.training.checkpoints import Checkpoints
from modelstock_jax.training.merge_step import merge_opt_state, steps_between_merges
from modelstock_jax.training.optimizer import make_optimizer
from modelstock_jax.training.sharding import put_batch
from modelstock_jax.training.state import StepConstants, replicate
from tests.training import tiny


def replicas_before_merge(workdir, steps, **changes):
    """Return the replicas before the merge at step `steps`."""
    changes = changes | {"merge__every": "never"}
    trainer = tiny.trainer(workdir, epochs=1, **changes)
    assert trainer.task.num_steps == steps
    return trainer.run().state.params


@pytest.mark.parametrize("shape", [(1, 1), pytest.param((2, 1), marks=pytest.mark.slow), (2, 4)])
def test_the_merge_equals_the_library_function(tmp_path, shape):
    mesh = {"mesh__replica": shape[0], "mesh__data": shape[1]}
    # The learning rate depends on the length of the run, so both runs have one epoch.
    replicas = replicas_before_merge(tmp_path / "apart", 4, **mesh)
    trainer = tiny.trainer(tmp_path / "merged", epochs=1, merge__every="end", **mesh)
    merged = trainer.run().merged
    same_mesh, _ = jax.jit(model_stock)(trainer.step_functions.anchor, replicas)
    chex.assert_trees_all_equal(merged, same_mesh)
    # On one device the order of the sums is different.
    single_device, stats = jax.jit(model_stock)(tiny.params(), jax.device_get(replicas))
    logged = [line for line in _lines(tmp_path / "merged") if "merge/epoch" in line]
    assert len(logged) == 1
    for path, ratio in jax.tree_util.tree_flatten_with_path(stats.ratio)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert abs(logged[0][f"merge/ratio/{name}"] - float(ratio)) <= 1e-6, name
    update = jax.tree.map(lambda a, b: np.abs(a - b).max(), single_device, tiny.params())
    chex.assert_trees_all_close(
        merged, single_device, atol=1e-6 * max(jax.tree.leaves(update)) + 1e-7
    )


def test_every_replica_restarts_from_the_merged_model(tmp_path):
    trainer = tiny.trainer(tmp_path, epochs=2)
    result = trainer.run()
    chex.assert_trees_all_equal(result.state.params, replicate(result.merged, 2))
    with Checkpoints(tmp_path / "runs/run/models", keep=0) as merges:
        assert merges.steps == [4, 8]
        chex.assert_trees_all_equal(merges.restore(8, trainer.step_functions.anchor), result.merged)
    with Checkpoints(tmp_path / "runs/run/anchor", keep=0) as anchors:
        chex.assert_trees_all_equal(
            anchors.restore(0, trainer.step_functions.anchor), tiny.params()
        )


@pytest.mark.parametrize("every", ["3", "end", "epoch"])
def test_merges_are_at_the_scheduled_steps_and_at_the_end(tmp_path, every):
    result = tiny.trainer(tmp_path, epochs=2, merge__every=every).run()
    steps = [round(4 * line["merge/epoch"]) for line in _lines(tmp_path) if "merge/epoch" in line]
    assert steps == {"3": [3, 6, 8], "end": [8], "epoch": [4, 8]}[every]
    assert result.merged is not None


def test_noise_is_carried_from_merge_to_merge(tmp_path):
    trainer = tiny.trainer(tmp_path, epochs=1, merge__every="2", merge__carry_noise="every")
    state = trainer.step_functions.init_state(0)
    chex.assert_trees_all_equal(state.noise, jax.tree.map(lambda _: jnp.zeros(()), state.noise))
    stream = trainer.batches(0)
    noise = None
    carried = jax.jit(model_stock_carried)  # Compiled twice: without and with noise.
    for last in (False, True):
        for _ in range(2):
            state, _ = trainer.step_functions.train_step(
                state, put_batch(trainer.step_functions.mesh, next(stream)), StepConstants()
            )
        replicas = jax.device_get(state.params)
        want, _, noise = carried(tiny.params(), replicas, noise)
        state, merged, _ = trainer.step_functions.merge_step[last](
            trainer.step_functions.anchor, state
        )
        chex.assert_trees_all_close(merged, want, atol=1e-7)
        chex.assert_trees_all_close(state.noise, noise, rtol=1e-5, atol=1e-12)
    assert max(float(x) for x in jax.tree.leaves(noise)) > 0


def test_uniform_mean_is_the_control(tmp_path):
    replicas = replicas_before_merge(tmp_path / "apart", 4)
    trainer = tiny.trainer(
        tmp_path / "m", epochs=1, merge__every="end", merge__method="uniform_mean"
    )
    expected, _ = jax.jit(uniform_mean)(trainer.step_functions.anchor, replicas)
    chex.assert_trees_all_equal(trainer.run().merged, expected)


def test_optimizer_state_at_a_merge():
    params = replicate({"w": jnp.array([1.0, 2.0])}, 2)
    tx, _ = make_optimizer(tiny.config().optimizer, 10)
    state = jax.vmap(tx.init)(params)
    gradients = {"w": jnp.array([[0.1, 0.2], [0.3, -0.6]])}
    _, state = jax.vmap(tx.update)(gradients, state, params)
    chex.assert_trees_all_equal(merge_opt_state("keep", state, tx, params), state)
    chex.assert_trees_all_equal(
        merge_opt_state("reset", state, tx, params), jax.vmap(tx.init)(params)
    )
    averaged = merge_opt_state("average", state, tx, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(averaged, state)
    adam, mean = state[1], averaged[1]
    np.testing.assert_allclose(mean.mu["w"], np.tile(adam.mu["w"].mean(0), (2, 1)), rtol=1e-6)
    np.testing.assert_allclose(mean.nu["w"], np.tile(adam.nu["w"].mean(0), (2, 1)), rtol=1e-6)
    np.testing.assert_array_equal(mean.count, [1, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_replicas": 1}, "num_replicas"),
        ({"merge__every": "sometimes"}, "merge.every"),
        ({"merge__opt_state": "forget"}, "merge.opt_state"),
        ({"merge__carry_noise": "yes"}, "merge.carry_noise"),
        ({"merge__method": "soup"}, "merge.method"),
        ({"merge__unit": "tensors"}, "tensors"),
        ({"merge__method": "uniform_mean", "merge__carry_noise": "every"}, "merge.carry_noise"),
        ({"compute__replica_mode": "loop"}, "compute.replica_mode"),
        ({"compute__replica_mode": "map", "mesh__replica": 2}, "map"),
        ({"mesh__replica": 16}, "mesh"),
        ({"mesh__data": 5}, "mesh.data"),
        (
            {"mesh__data": 8, "gradient_accumulation_steps": 4},
            "mesh.data=8 .*gradient_accumulation_steps=4",
        ),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps=3"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"optimizer__warmup_steps": 100}, "warm-up"),
        ({"optimizer__learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_an_invalid_option_is_named_before_training(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        tiny.trainer(tmp_path, **changes).run()
    assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_zero_steps_between_merges_is_an_error():
    with pytest.raises(UserError, match="merge.every"):
        steps_between_merges("0", 4, 8)


def test_a_diverged_replica_is_named_and_never_merged(tmp_path):
    trainer = tiny.trainer(tmp_path, epochs=1, merge__every="end")
    init_state = trainer.step_functions.init_state

    def with_nan(seed):
        state = init_state(seed)
        params = jax.tree.map(lambda x: x.at[1].multiply(jnp.nan), state.params)
        return state._replace(params=params)

    trainer.step_functions.init_state = with_nan
    with pytest.raises(UserError, match=r"replica 1, step 1: "):
        trainer.run()
    with Checkpoints(tmp_path / "runs/run/models", keep=0) as merges:
        assert merges.steps == []


def _lines(workdir):
    from modelstock_jax.reporting.metrics import read_metrics

    return read_metrics(workdir / "runs/run")
