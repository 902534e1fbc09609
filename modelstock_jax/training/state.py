"""What a training run carries from step to step, and which leaves of its weights are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from modelstock_jax.merging.gram import PyTree, named_leaves


class TrainState(NamedTuple):
    """N replicas in training; the replica axis R is axis 0 of every leaf that has one.

    Attributes:
      step: int32 [], optimizer steps taken; the same for all replicas.
      key: uint32 [R, 2], each replica's random key; folded with `step`, never consumed.
      params: the replicas' weights, [R, ...] a leaf.
      opt_state: the optimizer's state, [R, ...] a leaf (its counters are [R]).
      noise: the noise energy carried over merges, per merge unit; None unless carried.
    """

    step: jax.Array
    key: jax.Array
    params: PyTree
    opt_state: PyTree
    noise: PyTree


class StepConstants(NamedTuple):
    """Weights that a step reads and does not change; a field is None where nothing reads it.

    Attributes:
      pretrained: the anchor, without a replica axis.
      last_merged: the last merged model (the anchor before the first merge), without one.
      hyper: numbers that are each replica's own, [R] a leaf (inside a replica's step a scalar);
        empty where replicas differ in nothing but their data.
    """

    pretrained: PyTree = None
    last_merged: PyTree = None
    hyper: Mapping[str, jax.Array | np.ndarray] = {}


def replicate(tree: PyTree, num_replicas: int) -> PyTree:
    """Copies every leaf [...] to [R, ...].

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
    """R replicas of one set of weights, each with its own key and fresh optimizer state.

    Args:
      params: one replica's weights; every replica starts from them.
      tx: the optimizer, initialized for each replica apart.
      num_replicas: R.
      seed: the run's seed; replica r's key is `fold_in(key(seed), r)`.
      noise: the carried noise at the start (zeros), or None when noise is not carried.
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


# Which leaves of a model are trained; the others keep their bits.


IsTrained = Callable[[str], bool]


def head_only(name: str) -> bool:
    """A linear probe's: the head.

    >>> head_only("head.kernel"), head_only("image_tower.projection.kernel")
    (True, False)
    """
    return name.startswith("head.")


def biases_and_head(name: str) -> bool:
    """BitFit's (Zaken et al. 2022, section 3): every bias term, and the task's classifier.

    >>> biases_and_head("image_tower.pre_layernorm.bias")
    True
    >>> biases_and_head("image_tower.pre_layernorm.scale")
    False
    """
    return head_only(name) or name.endswith(".bias")


def leaf_names(tree: PyTree) -> PyTree:
    """The tree with each leaf's name, joined with dots, in its place.

    >>> leaf_names({"head": {"bias": 0, "kernel": 0}})
    {'head': {'bias': 'head.bias', 'kernel': 'head.kernel'}}
    """
    return jax.tree.unflatten(jax.tree.structure(tree), list(named_leaves(tree)))


def freeze(params: PyTree, trained: IsTrained | None) -> PyTree:
    """The same weights; none but the trained leaves have a gradient, nor cost what it takes.

    Args:
      params: of one replica.
      trained: by name; None trains all.
    """
    if trained is None:
        return params
    return jax.tree.map(
        lambda leaf, name: leaf if trained(name) else jax.lax.stop_gradient(leaf),
        params,
        leaf_names(params),
    )
