"""AdamW with clipping, and the learning rate's schedule."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]


def make_optimizer(
    config: ConfigDict, num_steps: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """AdamW's direction and the learning rate that the step multiplies it by.

    The two are apart so that resetting or averaging the moments at a merge can never touch
    the schedule, which belongs to the run: w <- w - lr(step) * direction.

    Args:
      config: the `optimizer` group of `configs/default.py`.
      num_steps: steps of the whole run; the cosine ends there.

    Returns:
      (tx, schedule); tx holds no step counter but Adam's own bias correction.

    Raises:
      UserError: if the warm-up is longer than the run or a rate is negative.
    """
    warmup = round(config.warmup_fraction * num_steps) + config.warmup_steps
    if not 0 <= warmup <= num_steps:
        raise UserError(
            f"optimizer: {warmup} warm-up steps do not fit a run of {num_steps} steps; lower "
            "optimizer.warmup_steps or optimizer.warmup_fraction"
        )
    if config.learning_rate < 0:
        raise UserError(f"optimizer.learning_rate is {config.learning_rate}; it must be >= 0")
    transforms = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay),
    ]
    if config.clip_norm > 0:
        transforms.insert(0, optax.clip_by_global_norm(config.clip_norm))

    def schedule(step: jax.Array) -> jax.Array:
        rising = (step + 1) / max(warmup, 1)
        progress = (step - warmup) / max(num_steps - warmup, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        floor = config.final_fraction
        return config.learning_rate * jnp.where(
            step < warmup, rising, floor + (1 - floor) * falling
        )

    return optax.chain(*transforms), schedule
