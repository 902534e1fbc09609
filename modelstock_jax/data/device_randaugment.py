"""RandAugment's operations on the device: the same bits as Pillow's, in integer arithmetic.

The host encodes an operation and its strength as integers (`randaugment.encode_operation`).
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.data.randaugment import DEVICE_OPERATIONS


def apply_operation(image: jax.Array, encoded: jax.Array) -> jax.Array:
    """Apply one operation to an image; under `vmap`, all are computed and one is selected.

    Args:
      image: uint8 [S, S, 3]
      encoded: int32 [8] of `randaugment.encode_operation`

    Returns:
      uint8 [S, S, 3].

    >>> image = jnp.full((2, 2, 3), 100, jnp.uint8)
    >>> from modelstock_jax.data.randaugment import encode_operation
    >>> apply_operation(image, jnp.asarray(encode_operation("solarize", 200.0, 2)))[0, 0].tolist()
    [155, 155, 155]
    """
    return jax.lax.switch(encoded[0], _BRANCHES, image, encoded[1:])


def _identity(image: jax.Array, values: jax.Array) -> jax.Array:
    return image


def _affine(image: jax.Array, values: jax.Array) -> jax.Array:
    """Take the nearest pixel, black outside of the image."""
    size = image.shape[0]
    row, column = jnp.indices((size, size), jnp.int32)
    source_column = (values[2] + column * values[0] + row * values[1]) >> 16
    source_row = (values[5] + column * values[3] + row * values[4]) >> 16
    inside = (source_row >= 0) & (source_row < size) & (source_column >= 0) & (source_column < size)
    # Positions outside are clamped by the indexing and then replaced.
    return jnp.where(inside[..., None], image[source_row, source_column], 0).astype(image.dtype)


def _gray(image: jax.Array) -> jax.Array:
    """Return Pillow's conversion to "L", int32 [S, S]."""
    red, green, blue = (image[..., k].astype(jnp.int32) for k in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _brightness(image: jax.Array, values: jax.Array) -> jax.Array:
    return _blend(jnp.zeros(image.shape, jnp.int32), image, values)


def _color(image: jax.Array, values: jax.Array) -> jax.Array:
    return _blend(jnp.broadcast_to(_gray(image)[..., None], image.shape), image, values)


def _contrast(image: jax.Array, values: jax.Array) -> jax.Array:
    gray = _gray(image)
    mean = (2 * gray.sum(dtype=jnp.int32) + gray.size) // (2 * gray.size)
    return _blend(jnp.broadcast_to(mean, image.shape), image, values)


def _sharpness(image: jax.Array, values: jax.Array) -> jax.Array:
    """Blend with the mean over 3 x 3 pixels, in which the center counts five times."""
    pixels = image.astype(jnp.int32)
    rows = pixels[:-2] + pixels[1:-1] + pixels[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * pixels[1:-1, 1:-1]
    smooth = pixels.at[1:-1, 1:-1].set((2 * total + 13) // 26)  # The border stays.
    return _blend(smooth, image, values)


def _blend(degenerate: jax.Array, image: jax.Array, values: jax.Array) -> jax.Array:
    """Return degenerate + factor (image - degenerate), rounded to float32 as in Pillow's C code.

    A product in float32 and a sum could be fused, without the first rounding. Here the product is
    exact in 32 bits, its conversion to float32 rounds it, and the unit is a power of two.
    """
    mantissa, unit = values[0], jax.lax.bitcast_convert_type(values[1], jnp.float32)
    difference = image.astype(jnp.int32) - degenerate
    exact = mantissa.astype(jnp.uint32) * jnp.abs(difference).astype(jnp.uint32)
    product = exact.astype(jnp.float32) * unit
    product = jnp.where(difference < 0, -product, product)
    return jnp.clip(degenerate.astype(jnp.float32) + product, 0.0, 255.0).astype(jnp.uint8)


def _posterize(image: jax.Array, values: jax.Array) -> jax.Array:
    return image & values[0].astype(jnp.uint8)


def _solarize(image: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(image.astype(jnp.int32) < values[0], image, 255 - image)


@lru_cache
def _rounded_down() -> np.ndarray:
    """Return where autocontrast's float64 arithmetic rounds an integer down.

    int(x scale + offset) with scale = 255 / (high - low) and offset = -low scale is sometimes 1
    less than floor(255 (x - low) / (high - low)).

    Returns:
      bits of x, uint8 [256 low, 256 high, 32].
    """
    bits = np.zeros((256, 256, 32), np.uint8)
    high, x = np.arange(256)[:, None], np.arange(256)[None, :]
    for low in range(255):
        span = np.maximum(high - low, 1)
        scale = 255.0 / span
        rounded = np.trunc(x * scale + -low * scale)
        valid = (high > low) & (x >= low) & (x <= high)
        bits[low] = np.packbits(valid & (rounded < (x - low) * 255 // span), axis=-1)
    return bits


def _autocontrast(image: jax.Array, values: jax.Array) -> jax.Array:
    """Stretch each channel to 0..255."""
    low, high = image.min((0, 1)).astype(jnp.int32), image.max((0, 1)).astype(jnp.int32)
    x = jnp.arange(256, dtype=jnp.int32)[:, None]
    stretched = (x - low[None]) * 255 // jnp.maximum(high - low, 1)[None]
    down = jnp.unpackbits(jnp.asarray(_rounded_down())[low, high], axis=-1).T
    table = jnp.where((high > low)[None], stretched - down.astype(jnp.int32), x)
    return _look_up(table, image)


def _equalize(image: jax.Array, values: jax.Array) -> jax.Array:
    """Map each channel so that its values are spread evenly."""
    channels = image.reshape(-1, 3).astype(jnp.int32)
    counts = jnp.stack([jnp.bincount(channels[:, k], length=256) for k in range(3)], axis=1)
    last = jnp.take_along_axis(counts, channels.max(0)[None], axis=0)
    step = (counts.sum(0, keepdims=True) - last) // 255
    below = jnp.cumsum(counts, axis=0) - counts
    spread = (step // 2 + below) // jnp.maximum(step, 1)
    x = jnp.arange(256, dtype=jnp.int32)[:, None]
    return _look_up(jnp.where(step == 0, x, spread), image)


def _look_up(table: jax.Array, image: jax.Array) -> jax.Array:
    """Return table[image] per channel, clipped to 0..255; the table is int32 [256, 3]."""
    table = jnp.clip(table, 0, 255).astype(jnp.uint8)
    index = image.astype(jnp.int32)
    return jnp.stack([table[index[..., k], k] for k in range(3)], axis=-1)


_FUNCTIONS = {
    "identity": _identity,
    "affine": _affine,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
_BRANCHES = [_FUNCTIONS[name] for name in DEVICE_OPERATIONS]
