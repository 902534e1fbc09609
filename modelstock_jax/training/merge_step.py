"""The merge inside training: replicas in, one model out, every replica restarted from it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from modelstock_jax import merging
from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.merging import Stats, model_stock_carried
from modelstock_jax.merging.gram import PyTree
from modelstock_jax.merging.units import UNITS
from modelstock_jax.registry import METHODS
from modelstock_jax.training.state import TrainState, replicate

MergeStep = Callable[[PyTree, TrainState], tuple[TrainState, PyTree, Stats]]

OPT_STATE_POLICIES = ("keep", "average", "reset")
CARRY_NOISE = ("off", "every", "last")
MERGES = [name for name, method in METHODS.items() if method.periodic]


def steps_between_merges(every: str, steps_per_epoch: int, num_steps: int) -> int:
    """`merge.every` in steps: "epoch", "end", or a number; 0 where replicas never merge.

    >>> steps_between_merges("epoch", 32, 256), steps_between_merges("end", 32, 256)
    (32, 256)
    >>> steps_between_merges("100", 32, 256), steps_between_merges("never", 32, 256)
    (100, 0)

    Raises:
      UserError: if it is none of these.
    """
    named = {"epoch": steps_per_epoch, "end": num_steps, "never": 0}
    if every in named:
        return named[every]
    if every.isdigit() and int(every) > 0:
        return int(every)
    raise UserError(f"merge.every={every!r}: write 'epoch', 'end', 'never' or a number of steps")


def merge_opt_state(policy: str, opt_state: PyTree, tx: optax.GradientTransformation, params):
    """What a merge does to the replicas' Adam moments [R, ...].

    `keep` leaves each replica its own, `average` gives all of them the mean, `reset` starts
    them anew (Adam's bias correction included).

    Raises:
      UserError: if the policy is none of these.
    """
    check_choice("merge.opt_state", policy, OPT_STATE_POLICIES)
    if policy == "keep":
        return opt_state
    if policy == "average":
        return jax.tree.map(
            lambda x: jnp.broadcast_to(x.mean(0, keepdims=True), x.shape).astype(x.dtype),
            opt_state,
        )
    return jax.vmap(tx.init)(params)


def check_merge(config: ConfigDict) -> None:
    """Raises a UserError for an option of the group `merge` that is not one of its choices."""
    steps_between_merges(str(config.every), 1, 1)
    for name, known in (
        ("method", MERGES),
        ("unit", UNITS),
        ("opt_state", OPT_STATE_POLICIES),
        ("carry_noise", CARRY_NOISE),
    ):
        check_choice(f"merge.{name}", config[name], known)
    if config.method != "model_stock" and config.carry_noise != "off":
        raise UserError(
            "merge.carry_noise needs merge.method='model_stock': a mean shrinks nothing"
        )


def make_merge_step(
    config: ConfigDict,
    tx: optax.GradientTransformation,
    num_heads: int,
    *,
    last: bool,
    merge_sharding: PyTree,
    params_sharding: PyTree,
) -> MergeStep:
    """Builds (anchor, state) -> (state, merged, stats); to be jitted, state donated.

    Args:
      config: the `merge` group of `configs/default.py`.
      tx: the optimizer, for the moments' policy.
      num_heads: attention heads of the image tower, for `unit="head"`.
      last: whether this is the run's last merge (noise carried to it is shrunk there).
      together: shardings of the replicas while they are merged, `sharding.merge_sharding`.
      weights: shardings of the anchor and of the merged model.

    Raises:
      UserError: if a policy's name is unknown.
    """
    check_merge(config)
    options = {"unit": config.unit, "num_heads": num_heads}
    merge_replicas = getattr(merging, config.method)

    def merge(anchor, state):
        noise = state.noise
        replicas = jax.lax.with_sharding_constraint(state.params, merge_sharding)
        if config.carry_noise != "off":
            merged, stats, noise = model_stock_carried(
                anchor,
                replicas,
                noise,
                shrink=last or config.carry_noise == "every",
                **options,
            )
        else:
            merged, stats = merge_replicas(anchor, replicas, **options)
        merged = jax.lax.with_sharding_constraint(merged, params_sharding)
        params = replicate(merged, state.key.shape[0])
        state = state._replace(
            params=params,
            opt_state=merge_opt_state(config.opt_state, state.opt_state, tx, params),
            noise=noise,
        )
        return state, merged, stats

    return merge
