"""The training state, and predicates that select which parameters are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from modelstock_jax.merging.trees import PyTree, named_leaves

IsTrained = Callable[[str], bool]  # leaf name -> whether it is trained


class TrainState(NamedTuple):
    """State of R replicas. The replica axis is axis 0 of every leaf that has one.

    Attributes:
      step: int32 [], number of optimizer steps done; the same for all replicas
      key: uint32 [R, 2], PRNG key of each replica; folded with `step`, never split
      params: parameters of the replicas, leaves [R, ...]
      opt_state: optimizer state, leaves [R, ...]; its counters are [R]
      noise: noise energy carried over merges, per merge unit; None if noise is not carried
    """

    step: jax.Array
    key: jax.Array
    params: PyTree
    opt_state: PyTree
    noise: PyTree


class StepConstants(NamedTuple):
    """Inputs that a train step reads and does not change. A field is None if no option needs it.

    Attributes:
      pretrained: the anchor, without a replica axis
      last_merged: the last merged model, without a replica axis; the anchor before the first merge
      hyper: per-replica hyperparameters, each [R] (a scalar inside one replica's step); empty if
        the replicas differ only in their data
    """

    pretrained: PyTree = None
    last_merged: PyTree = None
    hyper: Mapping[str, jax.Array | np.ndarray] = {}


def replicate(tree: PyTree, num_replicas: int) -> PyTree:
    """Broadcast every leaf [...] to [R, ...].

    Example:
      >>> replicate({"w": jnp.zeros(3)}, 2)["w"].shape
      (2, 3)
    """
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_replicas, *x.shape)), tree)


def init_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    num_replicas: int,
    seed: int | jax.Array,
    noise: PyTree = None,
) -> TrainState:
    """Return the initial state of R replicas of one model.

    Every replica gets the same parameters, its own PRNG key and a fresh optimizer state.

    Args:
      params: parameters of one replica
      tx: the optimizer, initialized separately for each replica
      num_replicas: R
      seed: seed of the run; the key of replica r is `fold_in(key(seed), r)`
      noise: initial carried noise (zeros), or None if noise is not carried
    """
    base = jax.random.key(seed)
    key = jax.vmap(lambda r: jax.random.key_data(jax.random.fold_in(base, r)))(
        jnp.arange(num_replicas)
    )
    replicas = replicate(params, num_replicas)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=replicas,
        opt_state=jax.vmap(tx.init)(replicas),
        noise=noise,
    )


def is_statistic(name: str) -> bool:
    """Return whether a leaf is a stored statistic of a batch norm; none is ever trained.

    Example:
      >>> is_statistic("image_tower.stem_norm.var"), is_statistic("image_tower.stem_norm.scale")
      (True, False)
    """
    return name.endswith((".mean", ".var"))


def without_statistics(params: PyTree, trained: IsTrained | None) -> IsTrained | None:
    """Return a predicate that also excludes the statistics of batch norms.

    They are inputs of the model, not weights: without a gradient, weight decay would move them.

    Args:
      params: parameters of one replica, or their shapes
      trained: predicate on the leaf name; None trains all leaves

    Returns:
      `trained` itself if there are no statistics
    """
    if not any(map(is_statistic, named_leaves(params))):
        return trained
    return lambda name: not is_statistic(name) and (trained is None or trained(name))


def drop_statistics(params: PyTree) -> PyTree:
    """Return a model without the statistics of batch norms, for distances between weights.

    Example:
      >>> drop_statistics({"norm": {"scale": 1, "mean": 2, "var": 3}, "kernel": 4})
      {'norm': {'scale': 1}, 'kernel': 4}
    """
    return {
        name: drop_statistics(part) if isinstance(part, Mapping) else part
        for name, part in params.items()
        if not is_statistic(f".{name}")
    }


def head_only(name: str) -> bool:
    """Return whether a linear probe trains this leaf: only the head.

    Example:
      >>> head_only("head.kernel"), head_only("image_tower.projection.kernel")
      (True, False)
    """
    return name.startswith("head.")


def biases_and_head(name: str) -> bool:
    """Return whether BitFit trains this leaf: biases and the head (Zaken et al. 2022, section 3).

    Example:
      >>> biases_and_head("image_tower.pre_layernorm.bias")
      True
      >>> biases_and_head("image_tower.pre_layernorm.scale")
      False
    """
    return head_only(name) or name.endswith(".bias")


def leaf_names(tree: PyTree) -> PyTree:
    """Return a tree of the same structure that contains the dotted name of each leaf.

    Example:
      >>> leaf_names({"head": {"bias": 0, "kernel": 0}})
      {'head': {'bias': 'head.bias', 'kernel': 'head.kernel'}}
    """
    return jax.tree.unflatten(jax.tree.structure(tree), list(named_leaves(tree)))


def freeze(params: PyTree, trained: IsTrained | None) -> PyTree:
    """Stop the gradients of all leaves that are not trained; XLA does not compute them.

    Args:
      params: parameters of one replica
      trained: predicate on the leaf name; None trains all leaves
    """
    if trained is None:
        return params
    return jax.tree.map(
        lambda leaf, name: leaf if trained(name) else jax.lax.stop_gradient(leaf),
        params,
        leaf_names(params),
    )
