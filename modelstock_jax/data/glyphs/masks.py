"""Masks of 62 characters in the 22 Latin fonts that come with matplotlib."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import string
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modelstock_jax.errors import UserError

CHARACTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
MASK_SIZE = 40
STYLES = ("fill", "thick", "thin", "outline")

_OVERSAMPLING = 3
_EM = 34  # pixels of a mask; the widest character (W in a bold face) then spans 38 of 40
_BASELINE = 31


class Font(NamedTuple):
    """A font file of matplotlib and the words that describe it in a caption."""

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
    """Positions in `FONTS` of the fonts with these names."""
    known = [font.name for font in FONTS]
    return tuple(known.index(name) for name in names)


@functools.cache
def masks() -> np.ndarray:
    """Coverage of every character in every font and style.

    Every character is centred by its box from left to right and stands on one baseline, so that
    'c' and 'C' differ in height and 'p' and 'P' in place.

    Returns:
      uint8 [4, 22, 62, 40, 40]: style (`STYLES`), font (`FONTS`), character (`CHARACTERS`),
      row, column; 255 is ink. Read-only, and rendered once a process.

    Raises:
      UserError: matplotlib's font files are not there.

    >>> masks().shape
    (4, 22, 62, 40, 40)
    """
    directory = _font_directory()
    fine = np.stack([_render_font(directory / f"{font.name}.ttf") for font in FONTS])
    fill = _shrink(fine)
    thick = _shrink(_grow(fine, 3))
    # Hairlines vanish under an erosion alone.
    thin = np.maximum(_shrink(255 - _grow(255 - fine, 1)), fill // 2)
    outline = _shrink(_grow(fine, 5) - _grow(fine, 1))
    result = np.stack([fill, thick, thin, outline])
    result.flags.writeable = False
    return result


def _font_directory() -> pathlib.Path:
    # Found without importing matplotlib, which takes half a second.
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise UserError("the glyph world needs matplotlib's fonts: pip install matplotlib")
    directory = pathlib.Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    missing = [font.name for font in FONTS if not (directory / f"{font.name}.ttf").is_file()]
    if missing:
        raise UserError(
            f"matplotlib's font {missing[0]}.ttf is not in {directory}: "
            "pip install --force-reinstall matplotlib"
        )
    return directory


def _render_font(path: pathlib.Path) -> np.ndarray:
    """uint8 [62, 120, 120]: every character of one font, three times too large."""
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
    """Grey dilation by a square of 2 reach + 1 pixels, one axis after the other."""
    for axis in (-2, -1):
        ahead = np.moveaxis(fine, axis, -1)
        grown = fine.copy()
        into = np.moveaxis(grown, axis, -1)
        for step in range(1, reach + 1):
            np.maximum(into[..., step:], ahead[..., :-step], out=into[..., step:])
            np.maximum(into[..., :-step], ahead[..., step:], out=into[..., :-step])
        fine = grown
    return fine


def _shrink(fine: np.ndarray) -> np.ndarray:
    """Means over boxes of three by three pixels."""
    total = np.zeros((*fine.shape[:-2], MASK_SIZE, MASK_SIZE), np.uint16)
    for row in range(_OVERSAMPLING):
        for column in range(_OVERSAMPLING):
            total += fine[..., row::_OVERSAMPLING, column::_OVERSAMPLING]
    return (total // _OVERSAMPLING**2).astype(np.uint8)
