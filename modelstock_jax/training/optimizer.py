"""The optimizer (AdamW or SGDW) without its learning rate, and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.merging.trees import PyTree
from modelstock_jax.training.projections import fast_trainable_projection
from modelstock_jax.training.state import IsTrained, leaf_names

Schedule = Callable[..., jax.Array]
Hyper = Mapping[str, jax.Array]

OPTIMIZERS = ("adamw", "sgd")


def make_optimizer(
    config: ConfigDict, num_steps: int, trained: IsTrained | None = None
) -> tuple[optax.GradientTransformationExtraArgs, Schedule]:
    """Return the update direction u and the learning rate that the train step multiplies it by.

        w <- w - lr(step) u,   u = direction(g) + weight_decay w + decay_to_pretrained (w - w0)

    They are separate so that resetting or averaging the optimizer state at a merge cannot affect
    the schedule, which belongs to the run. `adamw` follows algorithm 2 of Loshchilov and Hutter
    (2019), `sgd` their algorithm 1 (SGDW): momentum, and weight decay outside it. As in PyTorch and
    optax, the learning rate also multiplies the decay. The decay toward w0 is the decoupled form of
    L2-SP's penalty: it does not enter the gradient or Adam's moments.

    Args:
      config: the `optimizer` group of `configs/default.py`
      num_steps: steps of the run, at which the cosine ends
      trained: predicate on the leaf name; None trains all leaves. A frozen leaf is bitwise
        unchanged and has no optimizer state.

    Returns:
      (tx, schedule). The only step count in `tx` is the one of Adam's bias correction. `tx.update`
      accepts the keywords that options need: `pretrained` (decay toward it, FTP), `learning_rate`
      (FTP) and `hyper` (per-replica hyperparameters, see `per_replica`). `schedule` is
      (step, hyper={}) -> learning rate.

    Raises:
      UserError: if the warmup is longer than the run, or an option is unknown or out of range
    """
    check_optimizer(config)
    warmup = warmup_steps(config, num_steps)
    if not 0 <= warmup <= num_steps:
        raise UserError(
            f"optimizer: {warmup} warm-up steps do not fit in a run of {num_steps} steps; lower "
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
        projection = config.projection
        tx = fast_trainable_projection(
            tx, learning_rate=projection.learning_rate, k=projection.k, norm=projection.norm
        )
    tx = tx if trained is None else _trained_only(tx, trained)
    return tx, make_schedule(config, num_steps)


def make_schedule(config: ConfigDict, num_steps: int) -> Schedule:
    """Return a schedule: linear warmup, then cosine decay to `final_lr_fraction` of the peak.

    `learning_rate` and `num_steps` in `hyper` replace those of the config for one replica. After
    its own last step, the learning rate of such a replica is 0.
    """

    def schedule(step: jax.Array, hyper: Hyper | None = None) -> jax.Array:
        hyper = hyper or {}
        peak, total = hyper.get("learning_rate", config.learning_rate), num_steps
        warmup = warmup_steps(config, num_steps)
        maximum = max
        if "num_steps" in hyper:
            total, maximum = hyper["num_steps"], jnp.maximum
            warmup = jnp.round(config.warmup_fraction * total) + config.warmup_steps
        linear = (step + 1) / maximum(warmup, 1)
        progress = (step - warmup) / maximum(total - warmup, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        final = config.final_lr_fraction
        rate = peak * jnp.where(step < warmup, linear, final + (1 - final) * cosine)
        return jnp.where(step < total, rate, 0.0) if "num_steps" in hyper else rate

    return schedule


def decoupled_decay(
    weight_decay: float, to_pretrained: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """Add weight decay toward zero and toward the pretrained parameters to the updates.

        u <- u + weight_decay w + to_pretrained (w - w0)

    Without a gradient and at a constant learning rate, w_t - w0 = (1 - lr to_pretrained)^t
    (w_0 - w0).

    Args:
      weight_decay: decay toward zero; `hyper["weight_decay"]` replaces it for one replica
      to_pretrained: decay toward the pretrained parameters; if it is not 0, every update needs the
        keyword `pretrained`

    Example:
      >>> tx = decoupled_decay(0.0, 0.5)
      >>> zero, w, w0 = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, {"w": jnp.full(1, 3.0)}
      >>> tx.update(zero, tx.init(w), w, pretrained=w0)[0]["w"].tolist()
      [-1.0]
    """

    def update(updates, state, params=None, *, pretrained=None, hyper=None, **_):
        decay = (hyper or {}).get("weight_decay", weight_decay)
        updates = jax.tree.map(lambda u, w: u + decay * w, updates, params)
        if to_pretrained:
            updates = jax.tree.map(
                lambda u, w, w0: u + to_pretrained * (w - w0), updates, params, pretrained
            )
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def reads_pretrained(config: ConfigDict) -> bool:
    """Return whether `tx.update` needs the keyword `pretrained`."""
    return bool(config.decay_to_pretrained) or config.projection.name == "ftp"


def _trained_only(
    tx: optax.GradientTransformationExtraArgs, trained: IsTrained
) -> optax.GradientTransformationExtraArgs:
    def labels(params: PyTree) -> PyTree:
        names = leaf_names(params)
        return jax.tree.map(lambda name: "trained" if trained(name) else "frozen", names)

    return optax.partition(
        {"trained": tx, "frozen": optax.set_to_zero()}, labels, mask_compatible_extra_args=True
    )


def warmup_steps(config: ConfigDict, num_steps: int) -> int:
    """Return the number of warmup steps: `warmup_steps` plus `warmup_fraction` of the run.

    Example:
      >>> warmup_steps(ConfigDict({"warmup_fraction": 0.1, "warmup_steps": 5}), 200)
      25
    """
    return round(config.warmup_fraction * num_steps) + config.warmup_steps


def check_optimizer(config: ConfigDict) -> None:
    """Raise a UserError if an option of the `optimizer` group is unknown or out of range."""
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
