"""One optimizer step of every replica, in one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from modelstock_jax.errors import check_choice
from modelstock_jax.merging.gram import PyTree
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
    """Builds (state, batch [R, B, ...], reference) -> (state, metrics [R]); to be jitted.

    The state may be donated; the reference stays.

    Replicas never meet in it: under `vmap` over a mesh ("replica", "data") no collective
    crosses the replica axis. `map` runs them one after the other, which keeps one replica's
    activations alive and is for meshes whose replica axis is 1.

    A step's randomness is drawn for the whole batch, before it is cut: what an example looks
    like depends on (seed, replica, step, its row) and not on `gradient_accumulation_steps`.

    A replica whose loss, gradient or new weights are not finite is marked in the metrics (`ok`,
    `first_bad`, `first_bad_weight`: see `finite_checks`), and its update is as `policy` says: a part of
    the step, so that steps that are run again after a kill give the same bits.

    Args:
      loss_fn: see `losses`.
      tx: the optimizer's direction.
      schedule: (step, hyper) -> learning rate.
      replica_mode: how the replicas run.
      augment: (key, batch [B, ...]) -> batch, once a step; numbers of the replica's own
        (`reference.hyper`) lie in its batch.
      gradient_accumulation_steps: parts of the batch that are computed one after the other.
      on_non_finite: of a replica that is not finite: 'stop' leaves it to the caller; 'skip_step' keeps
        its weights and moments; 'restore_last_merge' starts it anew from
        `reference.last_merged`, with fresh moments.

    Raises:
      UserError: if there is no such policy.
    """
    check_choice("monitor.on_non_finite", on_non_finite, ON_NON_FINITE)

    def replica_step(step, reference, key, params, opt_state, batch, hyper):
        own = reference._replace(hyper=hyper)
        key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        drawn = augment(key, batch | hyper)
        batch = {name: value for name, value in drawn.items() if name not in hyper}
        loss, grads, metrics = mean_gradient(
            lambda params, part: loss_fn(params, part, own),
            params,
            batch,
            gradient_accumulation_steps,
        )
        rate = schedule(step, hyper)
        updates, moments = tx.update(
            grads,
            opt_state,
            params,
            pretrained=reference.pretrained,
            learning_rate=rate,
            hyper=hyper,
        )
        new = jax.tree.map(lambda w, u: w - (rate * u).astype(w.dtype), params, updates)
        metrics = metrics | {"learning_rate": rate} | finite_checks(loss, grads, new)
        if on_non_finite == "skip_step":
            new, moments = tree_where(metrics["ok"], (new, moments), (params, opt_state))
        elif on_non_finite == "restore_last_merge":
            anew = (reference.last_merged, tx.init(reference.last_merged))
            new, moments = tree_where(metrics["ok"], (new, moments), anew)
        return new, moments, metrics

    def train_step(state, batch, reference):
        one = partial(replica_step, state.step, reference)
        replicas = (state.key, state.params, state.opt_state, batch, reference.hyper)
        if replica_mode == "vmap":
            out = jax.vmap(one, spmd_axis_name="replica")(*replicas)
        else:
            out = jax.lax.map(lambda args: one(*args), replicas)
        params, opt_state, metrics = out
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, jax.tree.map(_readable, metrics)

    return train_step


def _readable(metric: jax.Array) -> jax.Array:
    return metric.astype(jnp.float32) if jnp.issubdtype(metric.dtype, jnp.floating) else metric


def mean_gradient(loss_fn: Loss, params, batch: Batch, num_micro_batches: int) -> tuple[Any, Any, Metrics]:
    """The gradient of a mean loss over a batch, computed a part at a time.

        g = 1/A sum_a grad loss(params, rows a, a + A, a + 2A, ... of the batch)

    Every A-th row, not A blocks of rows: where the batch is split over devices in blocks, each
    device then holds its share of every part, and nothing moves.

    Args:
      loss_fn: a mean over examples.
      params: of one replica.
      batch: [B, ...] a leaf, B a multiple of A.
      parts: A.

    Returns:
      (loss, gradient, metrics), all of them means over the parts.

    >>> loss = lambda w, batch: ((w * batch["x"]).mean(), {})
    >>> _, gradient, _ = mean_gradient(loss, jnp.float32(3), {"x": jnp.arange(6.0)}, 3)
    >>> float(gradient)
    2.5
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def gradient(part):
        (loss, metrics), gradient = value_and_grad(params, part)
        return loss, gradient, metrics

    if num_micro_batches == 1:
        return gradient(batch)
    cut = jax.tree.map(lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], cut)),
    )
    total, _ = jax.lax.scan(
        lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None), zero, cut
    )
    return jax.tree.map(lambda x: x / num_micro_batches, total)


# Whether a replica's step is finite, and what its update becomes where it is not.


def finite_checks(loss: jax.Array, grads: PyTree, params: PyTree) -> dict[str, jax.Array]:
    """Of one replica's step: are its loss, gradients and new weights finite, and how large.

        grad_norm = sqrt(sum_k |g_k|^2)
        ok = isfinite(loss) and, for all leaves k, isfinite(|g_k|^2) and isfinite(w_k)

    The squares are those of the norm that clipping and the metrics need anyway (XLA computes them
    once), so the flags cost no second pass over the gradients. A square overflows float32 where
    |g_k| > 1.8e19: such a gradient counts as not finite. Adam squares it as well, and its second
    moment would stay infinite and hold the tensor still for ever. The weights are looked at because
    a finite gradient may make them infinite, and the next step's loss would say so too late: they
    may be saved or merged before it.

    Args:
      loss: [].
      grads: the gradient; floats.
      params: the weights that the step made.

    Returns:
      grad_norm: []; ok: bool []; first_bad and first_bad_weight: int32 [], the first leaf (in the
      tree's order) whose gradient or new weights are not finite, -1 where there is none.

    >>> grads, params = {"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan])}, {"a": 1.0, "b": 1.0}
    >>> found = finite_checks(jnp.float32(1), grads, params)
    >>> bool(found["ok"]), int(found["first_bad"]), int(found["first_bad_weight"])
    (False, 1, -1)
    """
    # As optax.clip_by_global_norm writes them, that XLA may see that they are the same.
    squares = [optax.tree.norm(g, squared=True) for g in jax.tree.leaves(grads)]
    bad = ~jnp.isfinite(jnp.stack(squares))
    lost = jnp.stack([~jnp.isfinite(w).all() for w in jax.tree.leaves(params)])
    return {
        "grad_norm": jnp.sqrt(sum(squares)),
        "ok": jnp.isfinite(loss) & ~bad.any() & ~lost.any(),
        "first_bad": _first(bad),
        "first_bad_weight": _first(lost),
    }


def _first(bad: jax.Array) -> jax.Array:
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def tree_where(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the step was finite, else `old`: a select, so that nothing of `new` remains.

    Args:
      ok: bool [].
      new: what the step made.
      old: what takes its place; same structure and shapes.
    """
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o.astype(n.dtype)), new, old)
