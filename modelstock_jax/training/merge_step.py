"""The merge during training: merge the replicas, then restart every replica from the result."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from modelstock_jax import merging
from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.merging import Stats, model_stock_carried
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.merging.units import UNITS
from modelstock_jax.registry import METHODS
from modelstock_jax.training.state import TrainState, replicate

MergeStep = Callable[[PyTree, TrainState], tuple[TrainState, PyTree, Stats]]

OPT_STATE_POLICIES = ("keep", "average", "reset")
CARRY_NOISE = ("off", "every", "last")
MERGES = [name for name, method in METHODS.items() if method.periodic]


def steps_between_merges(every: str, steps_per_epoch: int, num_steps: int) -> int:
    """Convert `merge.every` to a number of steps; 0 if the replicas are never merged.

    Args:
      every: "epoch", "end", "never" or a number of steps
      steps_per_epoch: steps per epoch
      num_steps: steps of the run

    Raises:
      UserError: if `every` is none of these

    Example:
      >>> steps_between_merges("epoch", 32, 256), steps_between_merges("end", 32, 256)
      (32, 256)
      >>> steps_between_merges("100", 32, 256), steps_between_merges("never", 32, 256)
      (100, 0)
    """
    named = {"epoch": steps_per_epoch, "end": num_steps, "never": 0}
    if every in named:
        return named[every]
    if every.isdigit() and int(every) > 0:
        return int(every)
    raise UserError(
        f"merge.every={every!r} is invalid: set 'epoch', 'end', 'never' or a number of steps >= 1"
    )


def merge_opt_state(
    policy: str, opt_state: PyTree, tx: optax.GradientTransformation, params: PyTree
) -> PyTree:
    """Return the optimizer state after a merge.

    Args:
      policy: 'keep' preserves the state of each replica, 'average' gives all replicas the mean,
        'reset' initializes it again (including the step count of Adam's bias correction)
      opt_state: optimizer state of the replicas, leaves [R, ...]
      tx: the optimizer
      params: merged parameters of the replicas, leaves [R, ...]

    Raises:
      UserError: if the policy is unknown
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
    """Raise a UserError if an option of the `merge` group is invalid."""
    steps_between_merges(str(config.every), 1, 1)
    for name, choices in (
        ("method", MERGES),
        ("unit", UNITS),
        ("opt_state", OPT_STATE_POLICIES),
        ("carry_noise", CARRY_NOISE),
    ):
        check_choice(f"merge.{name}", config[name], choices)
    if config.method != "model_stock" and config.carry_noise != "off":
        raise UserError(
            f"merge.carry_noise={config.carry_noise!r} requires merge.method='model_stock': "
            f"{config.method!r} has no noise to carry; set merge.carry_noise='off'"
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
    """Build (anchor, state) -> (state, merged, stats), to be jitted with the state donated.

    Args:
      config: the `merge` group of `configs/default.py`
      tx: the optimizer, for `merge.opt_state`
      num_heads: attention heads of the image tower, for `merge.unit='head'`
      last: whether this is the last merge of the run, which shrinks the noise carried to it
      merge_sharding: shardings of the replicas during the merge, see `sharding.merge_sharding`
      params_sharding: shardings of the anchor and the merged model

    Raises:
      UserError: if an option is invalid
    """
    check_merge(config)
    options = {"unit": config.unit, "num_heads": num_heads}
    merge_replicas = getattr(merging, config.method)

    def merge_step(anchor, state):
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

    return merge_step
