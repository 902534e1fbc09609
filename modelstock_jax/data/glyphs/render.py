"""Images of the glyph world, composed in JAX.

A scene is drawn for each image, and `compose` turns it into pixels; both are written for one
image and mapped over a batch.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.data.glyphs.domain import Domain
from modelstock_jax.data.glyphs.masks import CHARACTERS, FONTS, MASK_SIZE, masks
from modelstock_jax.data.glyphs.scene import SCENE_WORDS, WAVES, Scene, bell, draw_scene

IMAGE_SIZE = 24
BATCH = 512  # one compiled shape for every set: an image does not depend on its neighbours

_PALETTE = np.array(
    [[1, 0, 0], [1, 0.85, 0], [0, 0.75, 0.1], [0, 0.85, 0.9], [0.1, 0.2, 1], [0.65, 0, 0.8],
     [0.5, 0.5, 0.5]], np.float32)  # fmt: skip
_LUMINANCE = np.array([0.3, 0.59, 0.11], np.float32)


def compose(scene: Scene, bits: jax.Array, glyphs: jax.Array) -> jax.Array:
    """One image: sample the mask, blur, paint, cover, add noise.

    Args:
      scene: what to draw.
      bits: uint32 [24, 24, 3], random, for the noise.
      glyphs: uint8 [4 * 22 * 62 * 40 * 40], `masks()` in one row.

    Returns:
      uint8 [24, 24, 3].
    """
    barrier = jax.lax.optimization_barrier  # else XLA computes coordinates anew at each use
    grid = (jnp.arange(IMAGE_SIZE, dtype=jnp.float32) + 0.5) / IMAGE_SIZE - 0.5
    y, x = jnp.meshgrid(grid, grid, indexing="ij")
    knots = _smooth_basis()
    bend = jnp.einsum("ia,cab,jb->cij", knots, scene.elastic, knots, precision="highest")
    page = (scene.style * len(FONTS) + scene.font) * len(CHARACTERS) + scene.label
    rows, columns = barrier(_mask_coordinates(scene, y + bend[0], x + bend[1]))
    glyph = _bilinear(glyphs, page, rows, columns)

    strength, other, direction, distance, bar, offset = scene.clutter
    other_page = scene.font * len(CHARACTERS) + other.astype(jnp.int32)
    rows, columns = barrier((
        (y - distance * jnp.sin(direction) + 0.5) * MASK_SIZE - 0.5,
        (x - distance * jnp.cos(direction) + 0.5) * MASK_SIZE - 0.5,
    ))  # fmt: skip
    clutter = _nearest(glyphs, other_page, rows, columns)
    line = jnp.abs(jnp.sin(bar) * y + jnp.cos(bar) * x - offset) * IMAGE_SIZE
    clutter = strength * jnp.maximum(clutter, jnp.clip(1.2 - line, 0.0, 1.0))

    glyph, clutter = barrier((glyph, clutter))
    kernel = _blur_matrix(scene.blur)
    ink = jnp.einsum(
        "ia,cab,jb->cij", kernel, jnp.stack([glyph, clutter]), kernel, precision="highest"
    )

    amplitude, along_y, along_x, phase = scene.wave
    wave = amplitude * jnp.sin(2 * np.pi * (along_y * y + along_x * x) + phase)
    ink_colour = _colour(scene.ink_hue, scene.ink_light)[None, None, :]
    paper_colour = _colour(scene.paper_hue, scene.paper_light)[None, None, :]
    image = paper_colour + ink[1][:, :, None] * 0.6 * (ink_colour - paper_colour)
    image = image + wave[:, :, None] * (1.0 - 0.5 * ink[0][:, :, None])
    image = image + ink[0][:, :, None] * (ink_colour - image)

    present, centre_y, centre_x, half_height, half_width, light = scene.patch
    inside = (jnp.abs(y - centre_y) < half_height) & (jnp.abs(x - centre_x) < half_width)
    image = jnp.where((inside & (present > 0))[:, :, None], light, image)
    image = image + scene.noise * barrier(bell(bits))
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _mask_coordinates(scene: Scene, y, x):
    """Rows and columns of the mask under each pixel: undo shift, perspective, rotation, scale."""
    y, x = y - scene.shift[0], x - scene.shift[1]
    depth = 1.0 + scene.perspective[0] * 2 * y + scene.perspective[1] * 2 * x
    y, x = y / depth, x / depth
    cosine, sine = jnp.cos(scene.rotation), jnp.sin(scene.rotation)
    y, x = cosine * y - sine * x, sine * y + cosine * x
    x = x + scene.shear * y
    return (
        (y / scene.scale + 0.5) * MASK_SIZE - 0.5,
        (x / scene.scale + 0.5) * MASK_SIZE - 0.5,
    )


def _pixel(glyphs, page, row, column):
    inside = (row >= 0) & (row < MASK_SIZE) & (column >= 0) & (column < MASK_SIZE)
    row, column = (jnp.clip(at, 0, MASK_SIZE - 1) for at in (row, column))
    index = (page * MASK_SIZE + row) * MASK_SIZE + column
    return jnp.where(inside, glyphs[index], 0).astype(jnp.float32) / 255.0


def _nearest(glyphs, page, rows, columns):
    row, column = (jnp.round(at).astype(jnp.int32) for at in (rows, columns))
    return _pixel(glyphs, page, row, column)


def _bilinear(glyphs, page, rows, columns):
    row, column = (jnp.floor(at).astype(jnp.int32) for at in (rows, columns))
    down, right = rows - row, columns - column
    top = _pixel(glyphs, page, row, column) * (1 - right)
    top = top + _pixel(glyphs, page, row, column + 1) * right
    bottom = _pixel(glyphs, page, row + 1, column) * (1 - right)
    bottom = bottom + _pixel(glyphs, page, row + 1, column + 1) * right
    return top * (1 - down) + bottom * down


def _smooth_basis() -> np.ndarray:
    """float32 [24, 4]: Gaussian bumps at four knots, each row of unit length."""
    knots = (np.arange(WAVES) + 0.5) / WAVES
    at = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    bumps = np.exp(-0.5 * ((at[:, None] - knots) * WAVES / 0.7) ** 2)
    return (bumps / np.linalg.norm(bumps, axis=1, keepdims=True)).astype(np.float32)


def _blur_matrix(sigma):
    """[24, 24], banded: each row a normalised Gaussian of at most 7 pixels."""
    at = np.arange(IMAGE_SIZE, dtype=np.float32)
    distance = np.abs(at[:, None] - at)
    weights = jnp.where(distance <= 3, jnp.exp(-0.5 * jnp.square(distance / sigma)), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _colour(hue, light):
    """The hue, [3], mixed with black or white until it has this luminance."""
    colour = jnp.asarray(_PALETTE)[hue]
    own = (colour * _LUMINANCE).sum()
    darker = colour * (light / own)
    lighter = colour + (1.0 - colour) * ((light - own) / (1.0 - own))
    return jnp.where(light < own, darker, lighter)


@jax.jit
def _render(key, indices, labels, domain, glyphs):
    def one(index, label):
        # One call of the generator: each costs over a second of compilation on a CPU.
        words = jax.random.bits(
            jax.random.fold_in(key, index), (SCENE_WORDS + IMAGE_SIZE**2 * 3,), jnp.uint32
        )
        noise = words[SCENE_WORDS:].reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
        return draw_scene(words[:SCENE_WORDS], label, domain), noise

    scenes, noise = jax.lax.optimization_barrier(jax.vmap(one)(indices, labels))
    return jax.vmap(compose, (0, 0, None))(scenes, noise, glyphs), scenes


@functools.cache
def _glyphs() -> jax.Array:
    return jnp.asarray(masks().reshape(-1))


def render(
    key: jax.Array, indices: np.ndarray, labels: np.ndarray, domain: Domain
) -> tuple[np.ndarray, Scene]:
    """Images number `indices` of the endless row of images that `key` and `domain` define.

    Args:
      key: jax key of the row.
      indices: int [M], which images of the row.
      labels: int [M], the character of each (`CHARACTERS`).
      domain: how they look.

    Returns:
      uint8 [M, 24, 24, 3], and the scenes with NumPy leaves of leading axis M.
    """
    indices, labels = (np.asarray(values, np.int32) for values in (indices, labels))
    count = len(indices)
    padding = (0, max(1, -(-count // BATCH)) * BATCH - count)
    indices, labels = np.pad(indices, padding), np.pad(labels, padding)
    arrays = domain.arrays()
    parts = [
        _render(key, indices[start : start + BATCH], labels[start : start + BATCH], arrays,
                _glyphs())
        for start in range(0, len(indices), BATCH)
    ]  # fmt: skip
    parts = jax.device_get(parts)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
