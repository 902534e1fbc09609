"""Augmentation on the device, in the training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MAX_SHIFT = 2  # pixels
_BRIGHTNESS = 0.1
_CONTRAST = 0.2


def shift_and_jitter(
    key: jax.Array, images: jax.Array, strength: float | jax.Array = 1.0
) -> jax.Array:
    """Shift each image by up to 2 pixels and change its brightness and contrast.

        x <- mean + c (x - mean) + 255 b,   c ~ U(1 - 0.2 s, 1 + 0.2 s),   b ~ U(-0.1 s, 0.1 s)

    The mean is over one image. The strength s also scales the shift, which is then rounded. Pixels
    from outside the image repeat the edge.

    Args:
      key: jax key; the same key gives the same result
      images: uint8 [B, H, W, 3]
      strength: s, in [0, 1]; 0 returns the images unchanged

    Returns:
      uint8 [B, H, W, 3].

    >>> images = jnp.full((2, 24, 24, 3), 100, jnp.uint8)
    >>> shift_and_jitter(jax.random.key(0), images).shape
    (2, 24, 24, 3)
    """
    count, height, width, _ = images.shape
    shift_key, contrast_key, brightness_key = jax.random.split(key, 3)
    offsets = jax.random.randint(shift_key, (count, 2), 0, 2 * MAX_SHIFT + 1)
    if isinstance(strength, jax.Array) or strength != 1.0:
        offsets = MAX_SHIFT + jnp.round(strength * (offsets - MAX_SHIFT)).astype(offsets.dtype)
    edge = (MAX_SHIFT, MAX_SHIFT)
    padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode="edge")
    rows = offsets[:, :1] + jnp.arange(height)[None, :]
    columns = offsets[:, 1:] + jnp.arange(width)[None, :]
    shifted = jnp.take_along_axis(padded, rows[:, :, None, None], axis=1)
    shifted = jnp.take_along_axis(shifted, columns[:, None, :, None], axis=2).astype(jnp.float32)

    shape = (count, 1, 1, 1)
    spread, light = _CONTRAST * strength, 255.0 * _BRIGHTNESS * strength
    contrast = jax.random.uniform(contrast_key, shape, jnp.float32, 1.0 - spread, 1.0 + spread)
    brightness = jax.random.uniform(brightness_key, shape, jnp.float32, -light, light)
    mean = shifted.mean(axis=(1, 2, 3), keepdims=True)
    result = mean + contrast * (shifted - mean) + brightness
    return jnp.round(jnp.clip(result, 0.0, 255.0)).astype(jnp.uint8)


def mixup(key: jax.Array, batch: dict[str, jax.Array], alpha: float) -> dict[str, jax.Array]:
    """Blend each example of a batch with its neighbor (mixup, Zhang et al. 2018).

        x_b <- s x_b + (1 - s) x_{b-1},   s = max(u, 1 - u),   u ~ Beta(alpha, alpha)

    One s is used for the batch, and b - 1 wraps around: the batch is already shuffled, and a
    neighbor requires less communication between devices than a permutation. The target is
    s y_b + (1 - s) y_{b-1}, which `losses.cross_entropy` computes from the two labels and s.
    Because s and 1 - s are equally likely, the example itself can always have the larger weight.

    Args:
      key: jax key
      batch: {"image": [B, H, W, 3], "label": int32 [B], ...}
      alpha: parameter of the Beta distribution; 0 blends nothing

    Returns:
      The batch with "image" in float32 on the same scale, and in addition "other_label" int32 [B]
      and "share" float32 [B], which is s.

    >>> batch = {"image": jnp.zeros((4, 2, 2, 3), jnp.uint8), "label": jnp.arange(4)}
    >>> mixup(jax.random.key(0), batch, 0.4)["other_label"].tolist()
    [3, 0, 1, 2]
    """
    shape = jnp.where(alpha > 0, alpha, 1.0)
    u = jax.random.beta(key, shape, shape, dtype=jnp.float32)
    share = jnp.where(alpha > 0, jnp.maximum(u, 1.0 - u), 1.0)
    images = batch["image"].astype(jnp.float32)
    return batch | {
        "image": share * images + (1.0 - share) * jnp.roll(images, 1, axis=0),
        "other_label": jnp.roll(batch["label"], 1),
        "share": jnp.full(batch["label"].shape, share),
    }
