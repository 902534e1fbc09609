"""The direction of a step, AdamW's or SGD's, and the learning rate's schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.training.projections import fast_trainable_projection
from modelstock_jax.training.state import IsTrained, leaf_names

Schedule = Callable[..., jax.Array]
Hyper = Mapping[str, jax.Array]

OPTIMIZERS = ("adamw", "sgd")


def make_optimizer(
    config: ConfigDict, num_steps: int, trained: IsTrained | None = None
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """The direction u of a step, and the learning rate that the step multiplies it by.

        w <- w - lr(step) u,   u = direction(g) + weight_decay w + decay_to_pretrained (w - w0)

    The two are apart so that resetting or averaging the moments at a merge can never touch
    the schedule, which belongs to the run. `adamw` is after Loshchilov and Hutter's (2019)
    algorithm 2, `sgd` after their algorithm 1 (SGDW): momentum, and a decay that does not go
    through it; as in PyTorch and optax the rate multiplies the decay as well. The decay toward w0
    is the decoupled form of L2-SP's penalty: no gradient, no moments.

    Args:
      config: the `optimizer` group of `configs/default.py`.
      num_steps: steps of the whole run; the cosine ends there.
      trained: which leaves are trained, by name; None trains all. A frozen leaf keeps its bits,
        and has no moments.

    Returns:
      (tx, schedule). tx holds no step counter but Adam's own bias correction; its `update` takes
      as keywords what an option needs: `pretrained` (decay toward it, FTP), `learning_rate` (FTP)
      and `hyper` (numbers of this replica's own, see `per_replica`). schedule: (step, hyper={}) ->
      rate.

    Raises:
      UserError: if the warm-up is longer than the run, a number is out of its range or a name
        unknown.
    """
    check_optimizer(config)
    warmup = warmup_steps(config, num_steps)
    if not 0 <= warmup <= num_steps:
        raise UserError(
            f"optimizer: {warmup} warm-up steps do not fit a run of {num_steps} steps; lower "
            "optimizer.warmup_steps or optimizer.warmup_fraction"
        )
    if config.name == "sgd":
        direction = optax.trace(decay=config.momentum)
    else:
        direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    transforms = [direction, decoupled_decay(config.weight_decay, config.decay_to_pretrained)]
    if config.clip_norm > 0:
        transforms.insert(0, optax.clip_by_global_norm(config.clip_norm))
    tx = optax.chain(*transforms)
    if config.projection.name == "ftp":
        rules = config.projection
        tx = fast_trainable_projection(
            tx, learning_rate=rules.learning_rate, k=rules.k, norm=rules.norm
        )
    tx = tx if trained is None else _only(trained, tx)
    return tx, make_schedule(config, num_steps)


def make_schedule(config: ConfigDict, num_steps: int) -> Schedule:
    """A linear warm-up, then a cosine to `final_fraction` of the rate.

    Where `hyper` has a `learning_rate` or `num_steps` of a replica's own, they stand for the
    config's; from its own last step on, such a replica's rate is 0.
    """

    def schedule(step: jax.Array, hyper: Hyper | None = None) -> jax.Array:
        hyper = hyper or {}
        peak, total = hyper.get("learning_rate", config.learning_rate), num_steps
        warmup = warmup_steps(config, num_steps)
        least = max
        if "num_steps" in hyper:
            total, least = hyper["num_steps"], jnp.maximum
            warmup = jnp.round(config.warmup_fraction * total) + config.warmup_steps
        rising = (step + 1) / least(warmup, 1)
        progress = (step - warmup) / least(total - warmup, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        floor = config.final_lr_fraction
        rate = peak * jnp.where(step < warmup, rising, floor + (1 - floor) * falling)
        return jnp.where(step < total, rate, 0.0) if "num_steps" in hyper else rate

    return schedule


def decoupled_decay(
    weight_decay: float, to_pretrained: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Decay toward zero and toward the pretrained weights, beside the gradient's moments.

        u <- u + weight_decay w + to_pretrained (w - w0)

    With no gradient and a constant rate, w_t - w0 = (1 - lr to_pretrained)^t (w_0 - w0).

    Args:
      weight_decay: of all replicas, where `hyper` has none of a replica's own.
      to_pretrained: of all replicas; not 0 needs the keyword `pretrained` at each update.

    >>> tx = decoupled_decay(0.0, 0.5)
    >>> zero, w, w0 = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, {"w": jnp.full(1, 3.0)}
    >>> tx.update(zero, tx.init(w), w, pretrained=w0)[0]["w"].tolist()
    [-1.0]
    """

    def update(updates, state, params=None, *, pretrained=None, hyper=None, **_):
        rate = (hyper or {}).get("weight_decay", weight_decay)
        updates = jax.tree.map(lambda u, w: u + rate * w, updates, params)
        if to_pretrained:
            updates = jax.tree.map(
                lambda u, w, w0: u + to_pretrained * (w - w0), updates, params, pretrained
            )
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def reads_pretrained(config: ConfigDict) -> bool:
    """Whether the direction needs the keyword `pretrained`."""
    return bool(config.decay_to_pretrained) or config.projection.name == "ftp"


def _only(
    trained: IsTrained, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    def labels(params: Any) -> Any:
        names = leaf_names(params)
        return jax.tree.map(lambda name: "trained" if trained(name) else "frozen", names)

    return optax.partition(
        {"trained": tx, "frozen": optax.set_to_zero()}, labels, mask_compatible_extra_args=True
    )


def warmup_steps(config: ConfigDict, num_steps: int) -> int:
    """Steps in which the rate rises: the config's number, and its share of the run.

    >>> warmup_steps(ConfigDict({"warmup_fraction": 0.1, "warmup_steps": 5}), 200)
    25
    """
    return round(config.warmup_fraction * num_steps) + config.warmup_steps


def check_optimizer(config: ConfigDict) -> None:
    """Raises a UserError for an unknown name or a number out of its range, whatever the run."""
    check_choice("optimizer.name", config.name, OPTIMIZERS)
    for name in ("learning_rate", "weight_decay", "decay_to_pretrained", "clip_norm"):
        if config[name] < 0:
            raise UserError(f"optimizer.{name} is {config[name]}; it must be >= 0")
    for name in ("b1", "b2", "momentum"):
        if not 0 <= config[name] < 1:
            raise UserError(f"optimizer.{name} is {config[name]}; it must be in [0, 1)")
    if not 0 <= config.final_lr_fraction <= 1:
        raise UserError(
            f"optimizer.final_lr_fraction is {config.final_lr_fraction}; it must be in [0, 1]"
        )
