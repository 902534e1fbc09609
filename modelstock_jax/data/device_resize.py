"""Crop, resize and flip on the device, with Pillow's filters and rounding.

Pillow resizes a box of an image in two passes, along the rows and along the columns. The result of
each pass is rounded to 0..255. Result i of a pass with scale s = box / size is

    y_i = sum_p f((p + 1/2 - c_i) / w) x_p / sum_p f((p + 1/2 - c_i) / w),
    c_i = start + (i + 1/2) s,   w = max(s, 1),

a sum over the pixels p of the image for which |p + 1/2 - c_i| is less than w times the support of
the filter f. The width w makes the filter antialiased. Each pass is a product with the matrix of
these weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from modelstock_jax.data.device_randaugment import apply_operation
from modelstock_jax.data.resize import BICUBIC, BILINEAR, DEVICE_FILTERS, HAMMING, LANCZOS
from modelstock_jax.data.views import VIEW_ARRAYS

_IMAGES_AT_ONCE = 64  # per device: the float32 pixels of a larger batch would need gigabytes.


def _bilinear(x: jax.Array) -> jax.Array:
    return 1.0 - x


def _bicubic(x: jax.Array) -> jax.Array:
    """Keys' cubic with a = -1/2."""
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1.0, inner, outer)


def _hamming(x: jax.Array) -> jax.Array:
    return jnp.sinc(x) * (0.54 + 0.46 * jnp.cos(jnp.pi * x))


def _lanczos(x: jax.Array) -> jax.Array:
    return jnp.sinc(x) * jnp.sinc(x / 3.0)


# By Pillow's code, of |x| below the filter's support.
_FILTERS: dict[int, Callable[[jax.Array], jax.Array]] = {
    LANCZOS: _lanczos,
    BILINEAR: _bilinear,
    BICUBIC: _bicubic,
    HAMMING: _hamming,
}


def resize_matrix(axis: jax.Array, *, padded: int, size: int, resample: int) -> jax.Array:
    """Return the weights of one pass: the results are `weights @ pixels`.

    Args:
      axis: float32 [5] of `views.View.store`; a length of 0 gives zeros
      padded: number of pixels of the array; the weights of those after the image are 0
      size: number of results
      resample: Pillow's code of the filter, one of `DEVICE_FILTERS`

    Returns:
      float32 [size, padded].

    >>> axis = jnp.array([4.0, 0.0, 0.0, 2.0, 0.0])  # four pixels to two
    >>> (7 * resize_matrix(axis, padded=4, size=2, resample=BILINEAR)).round().tolist()
    [[3.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 3.0]]
    """
    length, pixel_start, fraction, coarse_scale, fine_scale = axis
    pixel = jnp.arange(padded, dtype=jnp.float32)[None, :]
    result = jnp.arange(size, dtype=jnp.float32)[:, None] + 0.5
    # The first difference is exact in float32, and the second term is small: the distance has an
    # error of 1e-7 pixels, where the difference of two positions has 3e-5.
    distance = (pixel + 0.5 - pixel_start) - result * coarse_scale
    distance = jnp.abs(distance - (fraction + result * fine_scale))
    distance = distance / jnp.maximum(coarse_scale + fine_scale, 1.0)
    inside = (pixel < length) & (distance < DEVICE_FILTERS[resample])
    weight = jnp.where(inside, _FILTERS[resample](distance), 0.0)
    total = weight.sum(axis=1, keepdims=True)
    return weight / jnp.where(total == 0.0, 1.0, total)


def resize_view(canvas: jax.Array, geometry: jax.Array, *, size: int, resample: int) -> jax.Array:
    """Resize the view in one canvas (`views.View.store`).

    Pillow's weights are integers / 2^22, and these are float32: a sum near a half may be rounded to
    the other side. The result then differs by 1 gray level, or by 2 if both passes do so.

    Args:
      canvas: uint8 [C, C, 3]
      geometry: float32 [12]
      size: S, side of the result in pixels
      resample: Pillow's code of the filter, one of `DEVICE_FILTERS`

    Returns:
      uint8 [S, S, 3].
    """
    matrix = partial(resize_matrix, padded=canvas.shape[0], size=size, resample=resample)
    rows, columns = matrix(geometry[:5]), matrix(geometry[5:10])
    vertical_first, flip = geometry[10] != 0.0, geometry[11] != 0.0
    columns = jnp.where(flip, columns[::-1], columns)
    # The second pass is along the columns, or the same for the transposed image.
    pixels = jnp.where(vertical_first, canvas.swapaxes(0, 1), canvas).astype(jnp.float32)
    first = jnp.where(vertical_first, rows, columns)
    second = jnp.where(vertical_first, columns, rows)
    # With weights in TF32, a GPU's default, 3 % of noise would be rounded to the other side.
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    pixels = _round(product("ow,hwc->hoc", first, pixels))
    pixels = _round(product("oh,hwc->owc", second, pixels)).astype(jnp.uint8)
    return jnp.where(vertical_first, pixels.swapaxes(0, 1), pixels)


def _round(pixels: jax.Array) -> jax.Array:
    return jnp.clip(jnp.floor(pixels + 0.5), 0.0, 255.0)


@lru_cache
def make_resize(
    sharding: NamedSharding, size: int, resample: int
) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """Return a jitted function: the arrays of `resize_batch` -> images [..., S, S, 3].

    Each device resizes its part of the batch, without communication.

    Args:
      sharding: of the leading dimensions of all arrays and of the result
      size: S, side of the results in pixels
      resample: Pillow's code of the filter, one of `DEVICE_FILTERS`
    """

    def resize_one(view: dict[str, jax.Array]) -> jax.Array:
        image = resize_view(view["image"], view["geometry"], size=size, resample=resample)
        for encoded in view.get("operations", ()):
            image = apply_operation(image, encoded)
        return image

    def resize_part(views: dict[str, jax.Array]) -> jax.Array:
        lead = views["geometry"].shape[:-1]
        flat = {name: x.reshape(-1, *x.shape[len(lead) :]) for name, x in views.items()}
        images = jax.lax.map(resize_one, flat, batch_size=_IMAGES_AT_ONCE)
        return images.reshape(*lead, size, size, 3)

    spec: PartitionSpec = sharding.spec
    return jax.jit(
        # The check of varying axes fails for a switch in a loop.
        jax.shard_map(
            resize_part, mesh=sharding.mesh, in_specs=(spec,), out_specs=spec, check_vma=False
        ),
        out_shardings=sharding,
    )


def resize_batch(
    batch: dict[str, jax.Array], sharding: NamedSharding, size: int, resample: int
) -> dict[str, jax.Array]:
    """Resize and augment the images of a batch; a batch without views is returned unchanged.

    Args:
      batch: the arrays of `views.View.store` with leading dimensions, and others, on the devices
      sharding: of the batch
      size: S, side of the results in pixels
      resample: Pillow's code of the filter

    Returns:
      {"image": uint8 [..., S, S, 3]} and the other arrays.
    """
    if "geometry" not in batch:
        return batch
    views = {name: value for name, value in batch.items() if name in VIEW_ARRAYS}
    rest = {name: value for name, value in batch.items() if name not in VIEW_ARRAYS}
    return rest | {"image": make_resize(sharding, size, resample)(views)}
