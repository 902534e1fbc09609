"""The train step: one optimizer step of all replicas in one jitted function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from modelstock_jax.errors import check_choice
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training.losses import Loss
from modelstock_jax.training.optimizer import Schedule
from modelstock_jax.training.state import StepConstants, TrainState

OnNonFinite = Literal["stop", "skip_step", "restore_last_merge"]
ON_NON_FINITE = ("stop", "skip_step", "restore_last_merge")
ReplicaMode = Literal["vmap", "map"]
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Augment = Callable[[jax.Array, Batch], Batch]


def make_train_step(
    loss_fn: Loss,
    tx: optax.GradientTransformationExtraArgs,
    schedule: Schedule,
    replica_mode: ReplicaMode,
    *,
    augment: Augment = lambda key, batch: batch,
    gradient_accumulation_steps: int = 1,
    on_non_finite: OnNonFinite = "stop",
) -> Callable[[TrainState, Batch, StepConstants], tuple[TrainState, Metrics]]:
    """Build (state, batch [R, B, ...], constants) -> (state, metrics [R]), to be jitted.

    The state may be donated; the constants may not.

    Replicas do not communicate: under `vmap` over a mesh ("replica", "data"), no collective crosses
    the replica axis. `map` runs the replicas one after the other, so that only one replica's
    activations are alive. It requires a replica axis of size 1.

    Augmentation is applied to the full batch before the batch is split into micro-batches. An
    augmented example depends on (seed, replica, step, row), not on `gradient_accumulation_steps`.

    If a replica's loss, gradient or new parameters are not finite, the metrics `ok`, `first_bad`
    and `first_bad_weight` report it (see `finite_checks`), and its update follows `on_non_finite`.
    This is part of the step, so that steps repeated after a kill are bitwise identical.

    Args:
      loss_fn: see `losses`
      tx: the optimizer without the learning rate, see `optimizer.make_optimizer`
      schedule: (step, hyper) -> learning rate
      replica_mode: 'vmap' or 'map'
      augment: (key, batch [B, ...]) -> batch, applied once per step; the batch also contains the
        replica's hyperparameters (`constants.hyper`)
      gradient_accumulation_steps: number of micro-batches per step
      on_non_finite: update of a replica that is not finite: 'stop' leaves the error to the caller,
        'skip_step' keeps parameters and optimizer state, 'restore_last_merge' restarts the replica
        from `constants.last_merged` with a fresh optimizer state

    Raises:
      UserError: if `on_non_finite` is unknown
    """
    check_choice("monitor.on_non_finite", on_non_finite, ON_NON_FINITE)

    def replica_step(step, constants, key, params, opt_state, batch, hyper):
        constants = constants._replace(hyper=hyper)
        key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        augmented = augment(key, batch | hyper)
        batch = {name: value for name, value in augmented.items() if name not in hyper}
        loss, grads, metrics = mean_gradient(
            lambda params, micro_batch: loss_fn(params, micro_batch, constants),
            params,
            batch,
            gradient_accumulation_steps,
        )
        learning_rate = schedule(step, hyper)
        updates, new_opt_state = tx.update(
            grads,
            opt_state,
            params,
            pretrained=constants.pretrained,
            learning_rate=learning_rate,
            hyper=hyper,
        )
        new_params = jax.tree.map(
            lambda w, u: w - (learning_rate * u).astype(w.dtype), params, updates
        )
        checks = finite_checks(loss, grads, new_params)
        metrics = metrics | {"learning_rate": learning_rate} | checks
        new = (new_params, new_opt_state)
        if on_non_finite == "skip_step":
            new = tree_where(checks["ok"], new, (params, opt_state))
        elif on_non_finite == "restore_last_merge":
            restarted = (constants.last_merged, tx.init(constants.last_merged))
            new = tree_where(checks["ok"], new, restarted)
        return *new, metrics

    def train_step(state, batch, constants):
        step_fn = partial(replica_step, state.step, constants)
        replicas = (state.key, state.params, state.opt_state, batch, constants.hyper)
        if replica_mode == "vmap":
            out = jax.vmap(step_fn, spmd_axis_name="replica")(*replicas)
        else:
            out = jax.lax.map(lambda args: step_fn(*args), replicas)
        params, opt_state, metrics = out
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, jax.tree.map(_floats_to_float32, metrics)

    return train_step


def _floats_to_float32(metric: jax.Array) -> jax.Array:
    return metric.astype(jnp.float32) if jnp.issubdtype(metric.dtype, jnp.floating) else metric


def mean_gradient(
    loss_fn: Loss, params: PyTree, batch: Batch, num_micro_batches: int
) -> tuple[jax.Array, PyTree, Metrics]:
    """Compute the gradient of a mean loss over a batch, one micro-batch at a time.

        g = 1/A sum_a grad loss(params, rows a, a + A, a + 2A, ... of the batch)

    A micro-batch is every A-th row, not a block of rows: if the batch is sharded over devices in
    blocks, each device then holds an equal part of every micro-batch, and no rows move.

    Args:
      loss_fn: a mean over examples
      params: parameters of one replica
      batch: leaves [B, ...], B a multiple of A
      num_micro_batches: A

    Returns:
      (loss, gradient, metrics), each the mean over the micro-batches

    Example:
      >>> loss = lambda w, batch: ((w * batch["x"]).mean(), {})
      >>> _, gradient, _ = mean_gradient(loss, jnp.float32(3), {"x": jnp.arange(6.0)}, 3)
      >>> float(gradient)
      2.5
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def gradient(micro_batch) -> Any:
        (loss, metrics), grads = value_and_grad(params, micro_batch)
        return loss, grads, metrics

    if num_micro_batches == 1:
        return gradient(batch)
    micro_batches = jax.tree.map(
        lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1), batch
    )
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], micro_batches)),
    )
    total, _ = jax.lax.scan(
        lambda total, micro_batch: (jax.tree.map(jnp.add, total, gradient(micro_batch)), None),
        zeros,
        micro_batches,
    )
    return jax.tree.map(lambda x: x / num_micro_batches, total)


def finite_checks(loss: jax.Array, grads: PyTree, params: PyTree) -> dict[str, jax.Array]:
    """Check whether the loss, gradients and new parameters of one replica's step are finite.

        grad_norm = sqrt(sum_k |g_k|^2)
        ok = isfinite(loss) and, for all leaves k, isfinite(|g_k|^2) and isfinite(w_k)

    Clipping and the metrics need the squared norms anyway (XLA computes them once), so the checks
    do not read the gradients a second time. A square overflows float32 if |g_k| > 1.8e19; such a
    gradient counts as not finite. Adam squares it too: its second moment would stay infinite and
    freeze the tensor forever. The parameters are checked because a finite gradient can make them
    infinite. The next step's loss would show that too late: the parameters could be saved or merged
    before it.

    Args:
      loss: []
      grads: the gradient, floating leaves
      params: the new parameters

    Returns:
      grad_norm: []
      ok: bool []
      first_bad: int32 [], index of the first leaf (in tree order) whose gradient is not finite;
        -1 if none
      first_bad_weight: int32 [], index of the first leaf whose new parameters are not finite;
        -1 if none

    Example:
      >>> grads, params = {"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan])}, {"a": 1.0, "b": 1.0}
      >>> checks = finite_checks(jnp.float32(1), grads, params)
      >>> bool(checks["ok"]), int(checks["first_bad"]), int(checks["first_bad_weight"])
      (False, 1, -1)
    """
    # The same expression as in optax.clip_by_global_norm, so that XLA computes it once.
    squares = [optax.tree.norm(g, squared=True) for g in jax.tree.leaves(grads)]
    bad_grads = ~jnp.isfinite(jnp.stack(squares))
    bad_params = jnp.stack([~jnp.isfinite(w).all() for w in jax.tree.leaves(params)])
    return {
        "grad_norm": jnp.sqrt(sum(squares)),
        "ok": jnp.isfinite(loss) & ~bad_grads.any() & ~bad_params.any(),
        "first_bad": _first_true(bad_grads),
        "first_bad_weight": _first_true(bad_params),
    }


def _first_true(mask: jax.Array) -> jax.Array:
    """Return the index of the first True, or -1."""
    return jnp.where(mask.any(), jnp.argmax(mask), -1).astype(jnp.int32)


def tree_where(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Return `new` if `ok`, else `old`. It selects, so that no NaN of `new` remains.

    Args:
      ok: bool []
      new: the result of the step
      old: the replacement, with the same structure and shapes
    """
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o.astype(n.dtype)), new, old)
