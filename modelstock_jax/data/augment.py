"""Augmentation on the device, for batches of small images."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MAX_SHIFT = 2  # pixels
_BRIGHTNESS = 0.1
_CONTRAST = 0.2


def shift_and_jitter(key: jax.Array, images: jax.Array) -> jax.Array:
    """Moves each image by up to 2 pixels and changes its brightness and contrast.

        x <- mean + c (x - mean) + 255 b,   c ~ U(0.8, 1.2),   b ~ U(-0.1, 0.1)

    with the mean over one image. Pixels that come in from outside repeat the edge.

    Args:
      key: jax key; the same key gives the same result.
      images: uint8 [B, H, W, 3].

    Returns:
      uint8 [B, H, W, 3].

    >>> images = jnp.full((2, 24, 24, 3), 100, jnp.uint8)
    >>> shift_and_jitter(jax.random.key(0), images).shape
    (2, 24, 24, 3)
    """
    count, height, width, _ = images.shape
    shift_key, contrast_key, brightness_key = jax.random.split(key, 3)
    offsets = jax.random.randint(shift_key, (count, 2), 0, 2 * MAX_SHIFT + 1)
    edge = (MAX_SHIFT, MAX_SHIFT)
    padded = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode="edge")
    rows = offsets[:, :1] + jnp.arange(height)[None, :]
    columns = offsets[:, 1:] + jnp.arange(width)[None, :]
    moved = jnp.take_along_axis(padded, rows[:, :, None, None], axis=1)
    moved = jnp.take_along_axis(moved, columns[:, None, :, None], axis=2).astype(jnp.float32)

    shape = (count, 1, 1, 1)
    contrast = jax.random.uniform(
        contrast_key, shape, jnp.float32, 1.0 - _CONTRAST, 1.0 + _CONTRAST
    )
    brightness = jax.random.uniform(
        brightness_key, shape, jnp.float32, -255.0 * _BRIGHTNESS, 255.0 * _BRIGHTNESS
    )
    mean = moved.mean(axis=(1, 2, 3), keepdims=True)
    changed = mean + contrast * (moved - mean) + brightness
    return jnp.round(jnp.clip(changed, 0.0, 255.0)).astype(jnp.uint8)
