"""One optimizer step of every replica, in one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from modelstock_jax.training.objectives import Loss
from modelstock_jax.training.optimizer import Schedule
from modelstock_jax.training.state import TrainState

Execution = Literal["vmap", "map"]
Metrics = dict[str, jax.Array]


def make_train_step(
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    execution: Execution,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Builds (state, batch [R, B, ...]) -> (state, metrics [R]); to be jitted, state donated.

    Replicas never meet in it: under `vmap` over a mesh ("replica", "data") no collective
    crosses the replica axis. `map` runs them one after the other, which keeps one replica's
    activations alive and is for meshes whose replica axis is 1.
    """

    def replica_step(step, key, params, opt_state, batch):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        rate = schedule(step)
        params = jax.tree.map(lambda w, u: w - (rate * u).astype(w.dtype), params, updates)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads), "learning_rate": rate}
        return params, opt_state, metrics

    def train_step(state, batch):
        one = partial(replica_step, state.step)
        replicas = (state.key, state.params, state.opt_state, batch)
        if execution == "vmap":
            out = jax.vmap(one, spmd_axis_name="replica")(*replicas)
        else:
            out = jax.lax.map(lambda args: one(*args), replicas)
        params, opt_state, metrics = out
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, jax.tree.map(lambda x: x.astype(jnp.float32), metrics)

    return train_step
