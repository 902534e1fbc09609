"""What is drawn at random for one image of the glyph world: its `Scene`."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.data.glyphs.domain import at_difficulty
from modelstock_jax.data.glyphs.masks import CHARACTERS, STYLES

HUES = ("red", "yellow", "green", "cyan", "blue", "purple")
GREY = len(HUES)

WAVES = 4  # the elastic displacement has 4 x 4 knots
_KNOTS = 2 * WAVES * WAVES
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
    elastic = bell(bits[:_KNOTS].reshape(2, WAVES, WAVES))
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


def bell(bits):
    """Mean 0 and variance 1 from uint32: four bytes summed, near enough a normal and cheap."""
    total = functools.reduce(operator.add, [(bits >> shift) & 0xFF for shift in (0, 8, 16, 24)])
    return (total.astype(jnp.float32) - 510.0) / ((256**2 - 1) / 3) ** 0.5
