"""Renders the images of the synthetic benchmark in JAX.

`draw_scene` draws the random parameters of an image, and `compose` computes its pixels. Both are
written for one image and are vmapped over a batch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import operator
import pathlib
import string
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modelstock_jax.errors import UserError

IMAGE_SIZE = 24
BATCH = 512  # One compiled shape for all datasets: an image does not depend on the others.

_PALETTE = np.array(
    [[1, 0, 0], [1, 0.85, 0], [0, 0.75, 0.1], [0, 0.85, 0.9], [0.1, 0.2, 1], [0.65, 0, 0.8],
     [0.5, 0.5, 0.5]], np.float32)  # fmt: skip
_LUMINANCE = np.array([0.3, 0.59, 0.11], np.float32)


def render(
    key: jax.Array, indices: np.ndarray, labels: np.ndarray, domain: Domain
) -> tuple[np.ndarray, Scene]:
    """Render the images `indices` of the infinite sequence that `key` and `domain` define.

    Args:
      key: jax key of the sequence
      indices: int [M], indices in the sequence
      labels: int [M], the characters (indices into `CHARACTERS`)
      domain: distribution of the images' appearance

    Returns:
      uint8 [M, 24, 24, 3], and the scenes as NumPy leaves with leading axis M.
    """
    indices, labels = (np.asarray(values, np.int32) for values in (indices, labels))
    count = len(indices)
    padding = (0, max(1, -(-count // BATCH)) * BATCH - count)
    indices, labels = np.pad(indices, padding), np.pad(labels, padding)
    arrays = domain.arrays()
    batches = [
        _render(key, indices[start : start + BATCH], labels[start : start + BATCH], arrays,
                _glyphs())
        for start in range(0, len(indices), BATCH)
    ]  # fmt: skip
    batches = jax.device_get(batches)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *batches)


@jax.jit
def _render(key, indices, labels, domain, glyphs):
    def draw(index, label):
        # A single call of the generator: each call compiles for over a second on a CPU.
        words = jax.random.bits(
            jax.random.fold_in(key, index), (SCENE_WORDS + IMAGE_SIZE**2 * 3,), jnp.uint32
        )
        noise = words[SCENE_WORDS:].reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
        return draw_scene(words[:SCENE_WORDS], label, domain), noise

    scenes, noise = jax.lax.optimization_barrier(jax.vmap(draw)(indices, labels))
    return jax.vmap(compose, (0, 0, None))(scenes, noise, glyphs), scenes


def compose(scene: Scene, bits: jax.Array, glyphs: jax.Array) -> jax.Array:
    """Compute one image: sample the mask, blur, color, occlude, add noise.

    Args:
      scene: parameters of the image
      bits: uint32 [24, 24, 3], random bits for the noise
      glyphs: uint8 [4 * 22 * 62 * 40 * 40], `masks()` flattened

    Returns:
      uint8 [24, 24, 3].
    """
    # Without barriers XLA recomputes the coordinates at each use.
    barrier = jax.lax.optimization_barrier
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
    ink_color = _color(scene.ink_hue, scene.ink_light)[None, None, :]
    paper_color = _color(scene.paper_hue, scene.paper_light)[None, None, :]
    image = paper_color + ink[1][:, :, None] * 0.6 * (ink_color - paper_color)
    image = image + wave[:, :, None] * (1.0 - 0.5 * ink[0][:, :, None])
    image = image + ink[0][:, :, None] * (ink_color - image)

    present, center_y, center_x, half_height, half_width, light = scene.patch
    inside = (jnp.abs(y - center_y) < half_height) & (jnp.abs(x - center_x) < half_width)
    image = jnp.where((inside & (present > 0))[:, :, None], light, image)
    image = image + scene.noise * barrier(bell(bits))
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def _color(hue, light):
    """Return the hue as RGB, [3], mixed with black or white to the given luminance."""
    color = jnp.asarray(_PALETTE)[hue]
    luminance = (color * _LUMINANCE).sum()
    darker = color * (light / luminance)
    lighter = color + (1.0 - color) * ((light - luminance) / (1.0 - luminance))
    return jnp.where(light < luminance, darker, lighter)


def _mask_coordinates(scene: Scene, y, x):
    """Map pixels to rows and columns of the mask: invert shift, perspective, rotation, scale."""
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
    row, column = (jnp.clip(index, 0, MASK_SIZE - 1) for index in (row, column))
    index = (page * MASK_SIZE + row) * MASK_SIZE + column
    return jnp.where(inside, glyphs[index], 0).astype(jnp.float32) / 255.0


def _nearest(glyphs, page, rows, columns):
    row, column = (jnp.round(index).astype(jnp.int32) for index in (rows, columns))
    return _pixel(glyphs, page, row, column)


def _bilinear(glyphs, page, rows, columns):
    row, column = (jnp.floor(index).astype(jnp.int32) for index in (rows, columns))
    down, right = rows - row, columns - column
    top = _pixel(glyphs, page, row, column) * (1 - right)
    top = top + _pixel(glyphs, page, row, column + 1) * right
    bottom = _pixel(glyphs, page, row + 1, column) * (1 - right)
    bottom = bottom + _pixel(glyphs, page, row + 1, column + 1) * right
    return top * (1 - down) + bottom * down


def _smooth_basis() -> np.ndarray:
    """Return float32 [24, 4]: Gaussian bumps at four knots, each row of unit length."""
    knots = (np.arange(WAVES) + 0.5) / WAVES
    positions = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE
    bumps = np.exp(-0.5 * ((positions[:, None] - knots) * WAVES / 0.7) ** 2)
    return (bumps / np.linalg.norm(bumps, axis=1, keepdims=True)).astype(np.float32)


def _blur_matrix(sigma):
    """Return a banded matrix [24, 24]: each row is a normalized Gaussian of at most 7 pixels."""
    positions = np.arange(IMAGE_SIZE, dtype=np.float32)
    distance = np.abs(positions[:, None] - positions)
    weights = jnp.where(distance <= 3, jnp.exp(-0.5 * jnp.square(distance / sigma)), 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


@functools.cache
def _glyphs() -> jax.Array:
    return jnp.asarray(masks().reshape(-1))


CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
MASK_SIZE = 40
STYLES = ("fill", "thick", "thin", "outline")

_OVERSAMPLING = 3
_EM = 34  # Font size in mask pixels; the widest character (a bold W) then spans 38 of 40.
_BASELINE = 31


class Font(NamedTuple):
    """A font file of matplotlib, and the words for it in a caption."""

    name: str
    words: str


FONTS = (
    Font("DejaVuSans", "sans serif"),
    Font("DejaVuSans-Bold", "bold sans serif"),
    Font("DejaVuSans-Oblique", "italic sans serif"),
    Font("DejaVuSans-BoldOblique", "bold italic sans serif"),
    Font("DejaVuSansMono", "monospaced"),
    Font("DejaVuSansMono-Bold", "bold monospaced"),
    Font("DejaVuSansMono-Oblique", "italic monospaced"),
    Font("DejaVuSansMono-BoldOblique", "bold italic monospaced"),
    Font("DejaVuSerif", "slab serif"),
    Font("DejaVuSerif-Bold", "bold slab serif"),
    Font("DejaVuSerif-Italic", "italic slab serif"),
    Font("DejaVuSerif-BoldItalic", "bold italic slab serif"),
    Font("STIXGeneral", "book serif"),
    Font("STIXGeneralBol", "bold book serif"),
    Font("STIXGeneralItalic", "italic book serif"),
    Font("STIXGeneralBolIta", "bold italic book serif"),
    Font("cmb10", "bold modern serif"),
    Font("cmmi10", "italic mathematical"),
    Font("cmr10", "modern serif"),
    Font("cmss10", "modern sans serif"),
    Font("cmti10", "italic modern serif"),
    Font("cmtt10", "typewriter"),
)
HELD_OUT_FONTS = ("cmtt10", "STIXGeneralItalic", "DejaVuSerif-BoldItalic", "cmss10")


def font_indices(names) -> tuple[int, ...]:
    """Return the indices in `FONTS` of the fonts with these names."""
    all_names = [font.name for font in FONTS]
    return tuple(all_names.index(name) for name in names)


@functools.cache
def masks() -> np.ndarray:
    """Render the coverage masks of every character in every font and style.

    Characters are centered horizontally by their bounding box and share one baseline, so that 'c'
    and 'C' differ in height, and 'p' and 'P' in position.

    Returns:
      uint8 [4, 22, 62, 40, 40]: style (`STYLES`), font (`FONTS`), character (`CHARACTERS`),
      row, column; 255 is ink. The array is read-only and rendered once per process.

    Raises:
      UserError: matplotlib's font files are missing

    >>> masks().shape
    (4, 22, 62, 40, 40)
    """
    directory = _font_directory()
    fine = np.stack([_render_font(directory / f"{font.name}.ttf") for font in FONTS])
    fill = _shrink(fine)
    thick = _shrink(_grow(fine, 3))
    # With erosion only, hairlines would vanish.
    thin = np.maximum(_shrink(255 - _grow(255 - fine, 1)), fill // 2)
    outline = _shrink(_grow(fine, 5) - _grow(fine, 1))
    result = np.stack([fill, thick, thin, outline])
    result.flags.writeable = False
    return result


def _font_directory() -> pathlib.Path:
    # Does not import matplotlib, because the import takes half a second.
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise UserError("the synthetic benchmark needs matplotlib's fonts: pip install matplotlib")
    directory = pathlib.Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    missing = [font.name for font in FONTS if not (directory / f"{font.name}.ttf").is_file()]
    if missing:
        raise UserError(
            f"matplotlib's font {missing[0]}.ttf is not in {directory}: "
            "pip install --force-reinstall matplotlib"
        )
    return directory


def _render_font(path: pathlib.Path) -> np.ndarray:
    """Return uint8 [62, 120, 120], every character of one font at three times the mask size."""
    size = MASK_SIZE * _OVERSAMPLING
    font = ImageFont.truetype(str(path), _EM * _OVERSAMPLING, layout_engine=ImageFont.Layout.BASIC)
    pages = []
    for character in CHARACTERS:
        page = Image.new("L", (size, size))
        left, _, right, _ = font.getbbox(character, anchor="ls")
        origin = ((size - left - right) / 2, _BASELINE * _OVERSAMPLING)
        ImageDraw.Draw(page).text(origin, character, fill=255, font=font, anchor="ls")
        pages.append(np.asarray(page))
    return np.stack(pages)


def _grow(fine: np.ndarray, reach: int) -> np.ndarray:
    """Apply a gray dilation by a square of 2 reach + 1 pixels, one axis after the other."""
    for axis in (-2, -1):
        source = np.moveaxis(fine, axis, -1)
        grown = fine.copy()
        out = np.moveaxis(grown, axis, -1)
        for step in range(1, reach + 1):
            np.maximum(out[..., step:], source[..., :-step], out=out[..., step:])
            np.maximum(out[..., :-step], source[..., step:], out=out[..., :-step])
        fine = grown
    return fine


def _shrink(fine: np.ndarray) -> np.ndarray:
    """Downscale by averaging boxes of three by three pixels."""
    total = np.zeros((*fine.shape[:-2], MASK_SIZE, MASK_SIZE), np.uint16)
    for row in range(_OVERSAMPLING):
        for column in range(_OVERSAMPLING):
            total += fine[..., row::_OVERSAMPLING, column::_OVERSAMPLING]
    return (total // _OVERSAMPLING**2).astype(np.uint8)


ALL_FONTS = tuple(font.name for font in FONTS)
PRETRAINING_FONTS = tuple(name for name in ALL_FONTS if name not in HELD_OUT_FONTS)


@dataclasses.dataclass(frozen=True)
class Domain:
    """Distribution of an image's appearance; lengths are fractions of the image's side.

    A single value such as `rotation` is drawn uniformly from [-rotation, rotation], a range is
    drawn from uniformly, and a name that ends in `_prob` is a probability.

    Attributes:
      fonts: names of the fonts, equally likely
      mixed: whether each image draws a difficulty from [0, 1] that scales all other values (True),
        or all images have difficulty 1 (False)
      rotation: in degrees
      scale: range of the size; 1 is the size of the mask
      shear: tangent of the shear angle
      perspective: change of the size from one edge of the image to the other
      shift: displacement
      elastic: standard deviation of a smooth displacement
      heavy_prob: thicker strokes
      light_prob: thinner strokes
      outline_prob: outlined strokes
      contrast: range of the luminance difference between ink and paper
      paper: range of the paper's luminance (before an inversion)
      color_prob: colored instead of gray ink and paper
      inversion_prob: light ink on dark paper
      texture_prob: waves over the paper and the ink
      clutter_prob: a second character at the side, and bars
      occlusion_prob: a patch over a part of the image
      blur: maximum standard deviation, which is added to 0.35 pixels
      noise: maximum standard deviation; the noise of the color channels is independent
    """

    fonts: tuple[str, ...] = ALL_FONTS
    mixed: bool = False
    rotation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    perspective: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    heavy_prob: float = 0.0
    light_prob: float = 0.0
    outline_prob: float = 0.0
    contrast: tuple[float, float] = (0.9, 0.9)
    paper: tuple[float, float] = (0.95, 1.0)
    color_prob: float = 0.0
    inversion_prob: float = 0.0
    texture_prob: float = 0.0
    clutter_prob: float = 0.0
    occlusion_prob: float = 0.0
    blur: float = 0.0
    noise: float = 0.0

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the values as float32 arrays: one compiled function renders all domains."""
        fields = dataclasses.asdict(self)
        indices = font_indices(fields.pop("fonts"))
        padded = np.zeros(len(FONTS), np.int32)
        padded[: len(indices)] = indices
        arrays = {name: np.asarray(value, np.float32) for name, value in fields.items()}
        return arrays | {"fonts": padded, "num_fonts": np.asarray(len(indices), np.float32)}


PRETRAINING = Domain(
    fonts=PRETRAINING_FONTS,
    mixed=True,
    rotation=40.0,
    scale=(0.7, 1.25),
    shear=0.2,
    perspective=0.2,
    shift=0.18,
    elastic=0.05,
    heavy_prob=0.2,
    light_prob=0.2,
    outline_prob=0.25,
    contrast=(0.3, 0.95),
    paper=(0.6, 1.0),
    color_prob=0.6,
    inversion_prob=0.5,
    texture_prob=0.4,
    clutter_prob=0.35,
    occlusion_prob=0.15,
    blur=0.4,
    noise=0.12,
)
"""The pretraining distribution of the small CLIP; its captions describe what is visible."""


def at_difficulty(domain: dict, difficulty: jax.Array) -> dict:
    """Interpolate the domain's arrays between plain black on white (0) and their values (1)."""
    center = {"scale": 1.0, "contrast": 0.95, "paper": 1.0}
    unscaled = ("fonts", "num_fonts", "mixed")
    return {
        name: value
        if name in unscaled
        else center.get(name, 0.0) + difficulty * (value - center.get(name, 0.0))
        for name, value in domain.items()
    }


HUES = ("red", "yellow", "green", "cyan", "blue", "purple")
GRAY = len(HUES)

WAVES = 4  # The elastic displacement has 4 x 4 knots.
_KNOTS = 2 * WAVES * WAVES
SCENE_WORDS = _KNOTS + 40  # 40 is enough for all scalars.


class Scene(NamedTuple):
    """The random parameters of one image; scalars unless a shape is given."""

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
    patch: jax.Array  # [6]: present, center y and x, half height and width, luminance
    blur: jax.Array
    noise: jax.Array


def draw_scene(bits: jax.Array, label: jax.Array, domain: dict[str, jax.Array]) -> Scene:
    """Return the scene of one image for `SCENE_WORDS` random words, a label and a domain."""
    uniforms = (bits >> 8).astype(jnp.float32) * 2**-24
    draws = iter(uniforms[_KNOTS:])
    difficulty = jnp.where(domain["mixed"] > 0, _uniform(draws), 1.0)
    domain = at_difficulty(domain, difficulty)
    elastic = bell(bits[:_KNOTS].reshape(2, WAVES, WAVES))
    # The order of the draws determines every image: do not change it.
    return Scene(
        label=label,
        font=domain["fonts"][
            jnp.floor(_uniform(draws, 0.0, domain["num_fonts"])).astype(jnp.int32)
        ],
        style=_draw_style(draws, domain),
        rotation=_within(draws, domain["rotation"]) * (np.pi / 180),
        scale=_uniform(draws, *domain["scale"]),
        shear=_within(draws, domain["shear"]),
        perspective=jnp.stack([_within(draws, domain["perspective"]) for _ in range(2)]),
        shift=jnp.stack([_within(draws, domain["shift"]) for _ in range(2)]),
        elastic=elastic * domain["elastic"],
        **_draw_colors(draws, domain),
        wave=_draw_wave(draws, domain),
        clutter=_draw_clutter(draws, domain),
        patch=_draw_patch(draws, domain),
        blur=0.35 + _uniform(draws, 0.0, domain["blur"]),
        noise=_uniform(draws, 0.0, domain["noise"]),
    )


def _uniform(draws, low=0.0, high=1.0):
    return low + (high - low) * next(draws)


def _within(draws, limit):
    return _uniform(draws, -limit, limit)


def _draw_style(draws, domain) -> jax.Array:
    stroke = _uniform(draws)
    return jnp.select(
        [
            stroke < domain["outline_prob"],
            stroke < domain["outline_prob"] + domain["heavy_prob"],
            stroke < domain["outline_prob"] + domain["heavy_prob"] + domain["light_prob"],
        ],
        [STYLES.index("outline"), STYLES.index("thick"), STYLES.index("thin")],
        STYLES.index("fill"),
    )


def _draw_colors(draws, domain) -> dict[str, jax.Array]:
    """Draw the hue and luminance of ink and paper."""
    paper_light = _uniform(draws, *domain["paper"])
    ink_light = jnp.maximum(paper_light - _uniform(draws, *domain["contrast"]), 0.0)
    inverted = next(draws) < domain["inversion_prob"]
    colored = next(draws) < domain["color_prob"]
    hues = [jnp.where(colored, jnp.floor(_uniform(draws, 0.0, GRAY)), GRAY) for _ in range(2)]
    return {
        "ink_hue": hues[0].astype(jnp.int32),
        "ink_light": jnp.where(inverted, 1.0 - ink_light, ink_light),
        "paper_hue": hues[1].astype(jnp.int32),
        "paper_light": jnp.where(inverted, 1.0 - paper_light, paper_light),
    }


def _draw_wave(draws, domain) -> jax.Array:
    present = next(draws) < domain["texture_prob"]
    wave = [present * _uniform(draws, 0.05, 0.2)]
    wave += [_uniform(draws, -5.0, 5.0), _uniform(draws, -5.0, 5.0)]
    wave += [_uniform(draws, 0.0, 2 * np.pi)]
    return jnp.stack(wave)


def _draw_clutter(draws, domain) -> jax.Array:
    present = next(draws) < domain["clutter_prob"]
    clutter = [present * _uniform(draws, 0.4, 0.9)]
    clutter += [jnp.floor(_uniform(draws, 0.0, len(CHARACTERS)))]
    clutter += [_uniform(draws, 0.0, 2 * np.pi), _uniform(draws, 0.45, 0.6)]
    clutter += [_uniform(draws, 0.0, 2 * np.pi), _uniform(draws, -0.45, 0.45)]
    return jnp.stack(clutter)


def _draw_patch(draws, domain) -> jax.Array:
    present = next(draws) < domain["occlusion_prob"]
    patch = [1.0 * present, _uniform(draws, -0.35, 0.35), _uniform(draws, -0.35, 0.35)]
    patch += [_uniform(draws, 0.07, 0.2), _uniform(draws, 0.07, 0.2), _uniform(draws)]
    return jnp.stack(patch)


def bell(bits):
    """Map uint32 to mean 0 and variance 1: a sum of four bytes, a cheap approximate normal."""
    total = functools.reduce(operator.add, [(bits >> shift) & 0xFF for shift in (0, 8, 16, 24)])
    return (total.astype(jnp.float32) - 510.0) / ((256**2 - 1) / 3) ** 0.5
