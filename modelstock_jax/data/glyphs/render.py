"""Images of the glyph world, drawn and composed in JAX.

A `Scene` holds all that was drawn at random for one image; `compose` turns it into pixels. Both
are written for one image and mapped over a batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.data.glyphs.domain import Domain, at_difficulty
from modelstock_jax.data.glyphs.masks import CHARACTERS, MASK_SIZE, STYLES, masks

IMAGE_SIZE = 24
HUES = ("red", "yellow", "green", "cyan", "blue", "purple")
GREY = len(HUES)
BATCH = 512  # one compiled shape for every set: an image does not depend on its neighbours

_PALETTE = np.array(
    [[1, 0, 0], [1, 0.85, 0], [0, 0.75, 0.1], [0, 0.85, 0.9], [0.1, 0.2, 1], [0.65, 0, 0.8],
     [0.5, 0.5, 0.5]], np.float32)  # fmt: skip
_LUMINANCE = np.array([0.3, 0.59, 0.11], np.float32)
_WAVES = 4  # the elastic displacement has 4 x 4 knots
_KNOTS = 2 * _WAVES * _WAVES
SCENE_WORDS = _KNOTS + 40  # 40 scalars, and a few to spare


class Scene(NamedTuple):
    """All that was drawn for one image; scalars unless said otherwise."""

    label: jax.Array
    font: jax.Array
    style: jax.Array
    rotation: jax.Array
    scale: jax.Array
    shear: jax.Array
    perspective: jax.Array  # [2]
    shift: jax.Array  # [2]
    elastic: jax.Array  # [2, 4, 4]
    ink_hue: jax.Array
    ink_light: jax.Array
    paper_hue: jax.Array
    paper_light: jax.Array
    wave: jax.Array  # [4]: amplitude, frequency along y and x, phase
    clutter: jax.Array  # [6]: strength, character, direction, distance, bar direction, offset
    patch: jax.Array  # [6]: present, centre y and x, half height and width, luminance
    blur: jax.Array
    noise: jax.Array


def draw_scene(bits: jax.Array, label: jax.Array, domain: dict[str, jax.Array]) -> Scene:
    """One image's scene, from `SCENE_WORDS` random words, its label and the domain's arrays."""
    uniforms = (bits >> 8).astype(jnp.float32) * 2**-24
    draws = iter(uniforms[_KNOTS:])

    def uniform(low=0.0, high=1.0):
        return low + (high - low) * next(draws)

    def chance(name):
        return next(draws) < domain[name]

    def within(name):
        return uniform(-domain[name], domain[name])

    difficulty = jnp.where(domain["mixed"] > 0, uniform(), 1.0)
    domain = at_difficulty(domain, difficulty)
    font = domain["fonts"][jnp.floor(uniform(0.0, domain["num_fonts"])).astype(jnp.int32)]
    stroke = uniform()
    style = jnp.select(
        [
            stroke < domain["outline_share"],
            stroke < domain["outline_share"] + domain["heavy_share"],
            stroke < domain["outline_share"] + domain["heavy_share"] + domain["light_share"],
        ],
        [STYLES.index("outline"), STYLES.index("thick"), STYLES.index("thin")],
        STYLES.index("fill"),
    )
    rotation = within("rotation") * (np.pi / 180)
    scale, shear = uniform(*domain["scale"]), within("shear")
    perspective = jnp.stack([within("perspective"), within("perspective")])
    shift = jnp.stack([within("shift"), within("shift")])

    paper_light = uniform(*domain["paper"])
    ink_light = jnp.maximum(paper_light - uniform(*domain["contrast"]), 0.0)
    inverted = chance("inversion_share")
    coloured = chance("colour_share")
    hues = [jnp.where(coloured, jnp.floor(uniform(0.0, GREY)), GREY) for _ in range(2)]

    wave_present = chance("texture_share")
    wave = [wave_present * uniform(0.05, 0.2)]
    wave += [uniform(-5.0, 5.0), uniform(-5.0, 5.0), uniform(0.0, 2 * np.pi)]
    clutter_present = chance("clutter_share")
    clutter = [clutter_present * uniform(0.4, 0.9), jnp.floor(uniform(0.0, len(CHARACTERS)))]
    clutter += [uniform(0.0, 2 * np.pi), uniform(0.45, 0.6)]
    clutter += [uniform(0.0, 2 * np.pi), uniform(-0.45, 0.45)]
    patch = [1.0 * chance("occlusion_share"), uniform(-0.35, 0.35), uniform(-0.35, 0.35)]
    patch += [uniform(0.07, 0.2), uniform(0.07, 0.2), uniform()]
    blur, noise = 0.35 + uniform(0.0, domain["blur"]), uniform(0.0, domain["noise"])
    elastic = _bell(bits[:_KNOTS].reshape(2, _WAVES, _WAVES))
    return Scene(
        label=label,
        font=font,
        style=style,
        rotation=rotation,
        scale=scale,
        shear=shear,
        perspective=perspective,
        shift=shift,
        elastic=elastic * domain["elastic"],
        ink_hue=hues[0].astype(jnp.int32),
        ink_light=jnp.where(inverted, 1.0 - ink_light, ink_light),
        paper_hue=hues[1].astype(jnp.int32),
        paper_light=jnp.where(inverted, 1.0 - paper_light, paper_light),
        wave=jnp.stack(wave),
        clutter=jnp.stack(clutter),
        patch=jnp.stack(patch),
        blur=blur,
        noise=noise,
    )


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
    page = (scene.style * 22 + scene.font) * len(CHARACTERS) + scene.label
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
    image = image + scene.noise * barrier(_bell(bits))
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
    knots = (np.arange(_WAVES) + 0.5) / _WAVES
    at = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    bumps = np.exp(-0.5 * ((at[:, None] - knots) * _WAVES / 0.7) ** 2)
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


def _bell(bits):
    """Mean 0 and variance 1 from uint32: four bytes summed, near enough a normal and cheap."""
    total = sum((bits >> shift) & 0xFF for shift in (0, 8, 16, 24))
    return (total.astype(jnp.float32) - 510.0) / ((256**2 - 1) / 3) ** 0.5


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
    padding = (0, -count % BATCH)
    indices, labels = np.pad(indices, padding), np.pad(labels, padding)
    arrays = domain.arrays()
    parts = [
        _render(key, indices[start : start + BATCH], labels[start : start + BATCH], arrays,
                _glyphs())
        for start in range(0, len(indices), BATCH)
    ]  # fmt: skip
    parts = jax.device_get(parts)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
