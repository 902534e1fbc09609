"""Whether a replica's step is finite, and what its update becomes where it is not."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from modelstock_jax.errors import UserError

PyTree = Any
Policy = Literal["stop", "skip_step", "restore_last_merge"]
POLICIES = ("stop", "skip_step", "restore_last_merge")


def check_policy(policy: str) -> None:
    """Refuses an unknown `watch.policy`.

    Raises:
      UserError: if it is none of `POLICIES`.
    """
    if policy not in POLICIES:
        raise UserError(f"watch.policy={policy!r}: choose one of {', '.join(POLICIES)}")


def health(loss: jax.Array, grads: PyTree, params: PyTree) -> dict[str, jax.Array]:
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
    >>> found = health(jnp.float32(1), grads, params)
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


def choose(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the step was finite, else `old`: a select, so that nothing of `new` remains.

    Args:
      ok: bool [].
      new: what the step made.
      old: what takes its place; same structure and shapes.
    """
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o.astype(n.dtype)), new, old)
