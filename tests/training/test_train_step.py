"""The train step compared with single runs, finite differences and recorded values."""

from __future__ import annotations

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modelstock_jax.merging import model_stock
from modelstock_jax.training import sharding
from modelstock_jax.training.cost_analysis import collectives
from modelstock_jax.training.optimizer import make_optimizer
from modelstock_jax.training.state import StepConstants, init_state
from modelstock_jax.training.train_step import make_train_step, mean_gradient
from tests.training import tiny

STEPS = 20


def batches(config, count):
    stream = tiny.batches(config)
    return [next(stream) for _ in range(count)]


def run(
    config,
    params,
    dtype,
    data,
    replica_mode="vmap",
    replicas=slice(None),
    mesh=None,
    micro_batches=1,
):
    """Train the replicas `replicas` from the anchor; return the state and the first metrics."""
    tx, schedule = make_optimizer(config.optimizer, STEPS)
    state = init_state(params, tx, num_replicas=config.num_replicas, seed=config.seed)
    state = state._replace(
        **{
            name: jax.tree.map(lambda x: x[replicas], getattr(state, name))
            for name in ("key", "params", "opt_state")
        }
    )
    if mesh is not None:
        state = jax.device_put(state, sharding.state_sharding(mesh, state))
    augment = functools.partial(tiny.augment, dtype=dtype)
    step = jax.jit(
        make_train_step(
            tiny.loss_fn(dtype),
            tx,
            schedule,
            replica_mode,
            augment=augment,
            gradient_accumulation_steps=micro_batches,
        )
    )
    first = None
    for batch in data:
        batch = {name: value[replicas] for name, value in batch.items()}
        if mesh is not None:
            batch = sharding.put_batch(mesh, batch)
        state, metrics = step(state, batch, StepConstants())
        first = metrics if first is None else first
    return jax.device_get(state), jax.device_get(first)


@functools.cache
def alone_in_float64(replica):
    config = tiny.config()
    replicas = slice(replica, replica + 1)
    data = batches(config, STEPS)
    return run(config, tiny.params(np.float64), jnp.float64, data, replicas=replicas)[0]


@pytest.mark.parametrize(
    ("replica_mode", "shape", "micro_batches"),
    [
        ("vmap", None, 1),
        ("map", None, 4),
        ("vmap", (2, 1), 1),
        ("vmap", (2, 4), 1),
        ("vmap", (2, 4), 2),
        ("vmap", (1, 8), 1),
    ],
)
def test_replicas_equal_single_runs_in_float64(x64, replica_mode, shape, micro_batches):
    config = tiny.config()
    params = tiny.params(np.float64)
    data = batches(config, STEPS)
    mesh = None
    if shape is not None:
        mesh = sharding.make_mesh(*shape, num_replicas=2, batch_size=config.batch_size)
    together, _ = run(
        config,
        params,
        jnp.float64,
        data,
        replica_mode,
        mesh=mesh,
        micro_batches=micro_batches,
    )
    for replica in (0, 1):
        alone = alone_in_float64(replica)
        paths = jax.tree_util.tree_flatten_with_path(alone.params)[0]
        pairs = zip(paths, jax.tree.leaves(together.params), jax.tree.leaves(params), strict=True)
        for (path, expected), leaf, start in pairs:
            error = np.abs(leaf[replica] - expected[0]).max()
            update = np.linalg.norm(expected[0] - start)
            name = jax.tree_util.keystr(path)
            # Key biases receive no gradient (softmax is shift-invariant), only rounding errors,
            # which Adam scales up: their bound is absolute.
            bound = 1e-9 if "k_proj" in name and "bias" in name else 1e-8 * update
            assert error <= bound, name
            assert update > 0, name


def test_first_step_in_float32_equals_single_runs():
    config = tiny.config()
    data = batches(config, 1)
    params = tiny.params()
    _, together = run(config, params, jnp.float32, data)
    for replica in (0, 1):
        _, alone = run(config, params, jnp.float32, data, replicas=slice(replica, replica + 1))
        for name in ("loss", "grad_norm"):
            # float32 rounds to 6e-8; sums over a batch of 16 and a block are within 1e-5.
            np.testing.assert_allclose(together[name][replica], alone[name][0], rtol=1e-5)
    assert together["loss"][0] != together["loss"][1], "the replicas have the same data"


def test_gradient_equals_finite_differences(x64):
    loss, params = tiny.loss_fn(jnp.float64), tiny.params(np.float64)
    batch = {name: value[0] for name, value in batches(tiny.config(), 1)[0].items()}
    batch = tiny.augment(jax.random.key(0), batch, jnp.float64)

    @jax.jit
    def value(params):
        return loss(params, batch)[0]

    gradient = jax.jit(jax.grad(value))(params)
    rng = np.random.default_rng(4)
    for _ in range(5):
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), params)
        slope = sum(
            jnp.vdot(g, d)
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        h = 1e-6
        up = jax.tree.map(lambda x, d: x + 1e-6 * d, params, direction)
        down = jax.tree.map(lambda x, d: x - 1e-6 * d, params, direction)
        # Central differences err by h^2 |f'''| and 1e-16 / h: about 1e-9 of a slope of order 1.
        np.testing.assert_allclose(slope, (value(up) - value(down)) / (2 * h), rtol=1e-6)


def test_micro_batches_have_the_gradient_of_the_full_batch(x64):
    loss, params = tiny.loss_fn(jnp.float64), tiny.params(np.float64)
    batch = {name: value[0] for name, value in batches(tiny.config(), 1)[0].items()}
    batch = tiny.augment(jax.random.key(0), batch, jnp.float64)
    gradient = jax.jit(functools.partial(mean_gradient, loss), static_argnums=2)
    loss_1, gradient_1, metrics_1 = gradient(params, batch, 1)
    loss_4, gradient_4, metrics_4 = gradient(params, batch, 4)
    max_gradient = max(np.abs(g).max() for g in jax.tree.leaves(gradient_1))
    # float64 rounds to 1e-16; the gradient of a key bias is 0 up to rounding.
    chex.assert_trees_all_close(gradient_4, gradient_1, rtol=1e-12, atol=1e-14 * max_gradient)
    chex.assert_trees_all_close((loss_4, metrics_4), (loss_1, metrics_1), rtol=1e-12)


def test_one_step_gives_the_recorded_loss():
    config = tiny.config()
    state, metrics = run(config, tiny.params(), jnp.float32, batches(config, 1))
    # Recorded with jax 0.10.2 on a CPU; other versions and machines round differently in float32.
    np.testing.assert_allclose(metrics["loss"], GOLDEN_LOSS, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], GOLDEN_GRAD_NORM, rtol=1e-4)
    assert int(state.step) == 1
    _, stats = jax.jit(model_stock)(tiny.params(), state.params)
    ratio = {
        "head": stats.ratio["head"]["kernel"],
        "projection": stats.ratio["image_tower"]["projection"]["kernel"],
    }
    # Adam's first step is nearly the sign of the gradient, which rounding may flip near 0.
    chex.assert_trees_all_close(ratio, GOLDEN_RATIO, atol=1e-3)


GOLDEN_LOSS = [1.5929172, 1.6454787]
GOLDEN_GRAD_NORM = [0.2585323, 0.3661669]
GOLDEN_RATIO = {"head": 0.1001463, "projection": 0.3697995}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_no_collective_crosses_the_replica_axis(micro_batches):
    config = tiny.config()
    mesh = sharding.make_mesh(2, 4, num_replicas=2, batch_size=config.batch_size)
    tx, schedule = make_optimizer(config.optimizer, STEPS)
    state = init_state(tiny.params(), tx, num_replicas=2, seed=0)
    shardings = sharding.state_sharding(mesh, state)
    step = jax.jit(
        make_train_step(
            tiny.loss_fn(),
            tx,
            schedule,
            "vmap",
            augment=tiny.augment,
            gradient_accumulation_steps=micro_batches,
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    batch = sharding.put_batch(mesh, batches(config, 1)[0])
    compiled = step.lower(jax.device_put(state, shardings), batch, StepConstants()).compile()
    text = compiled.as_text()
    # Splitting a batch moves no rows: only sums of gradients and metrics are sent.
    assert not re.search("all-gather|all-to-all|collective-permute|reduce-scatter", text)
    # Replica 0 is on devices 0-3, replica 1 on devices 4-7.
    reduced = collectives(text)
    assert reduced, "no collective over the data axis"
    assert text.count("replica_groups=") == len(reduced)
    assert all(collective.within(4) for collective in reduced)
    donated = compiled.memory_analysis().alias_size_in_bytes
    size = sum(x.nbytes for x in jax.tree.leaves(jax.device_get(state)))
    assert donated >= 0.9 * size / 2, "the state is not donated"  # each device stores half


def test_learning_rate_warms_up_and_decays_to_its_final_value():
    config = tiny.config(optimizer__final_lr_fraction=0.1).optimizer
    _, schedule = make_optimizer(config, STEPS)
    rates = np.array([schedule(jnp.int32(s)) for s in range(STEPS)])
    np.testing.assert_allclose(rates[:3], [0.5e-2, 1e-2, 1e-2], rtol=1e-6)  # two warmup steps
    assert (np.diff(rates[2:]) < 0).all()
    np.testing.assert_allclose(schedule(jnp.int32(STEPS)), 1e-3, rtol=1e-5)


def test_weight_decay_and_clipping_follow_adamw():
    """The first step is -lr (sign of the gradient + decay w), for any size of the gradient."""
    config = tiny.config(optimizer__warmup_steps=0, optimizer__weight_decay=0.5).optimizer
    tx, schedule = make_optimizer(config, STEPS)
    w, g = {"w": jnp.array([2.0, -4.0])}, {"w": jnp.array([1e-3, -30.0])}
    updates, _ = tx.update(g, tx.init(w), w)
    # The smaller clipped gradient is 3e-5; Adam's eps of 1e-8 changes its step by 3e-4.
    np.testing.assert_allclose(updates["w"], np.sign(g["w"]) + 0.5 * w["w"], rtol=5e-4)
    chex.assert_trees_all_close(schedule(jnp.int32(0)), jnp.float32(1e-2))
