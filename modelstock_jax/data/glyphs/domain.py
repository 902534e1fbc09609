"""How images of the glyph world may vary: one `Domain` for each set."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from modelstock_jax.data.glyphs.masks import FONTS, HELD_OUT_FONTS, font_indices

ALL_FONTS = tuple(font.name for font in FONTS)
PRETRAINING_FONTS = tuple(name for name in ALL_FONTS if name not in HELD_OUT_FONTS)


@dataclasses.dataclass(frozen=True)
class Domain:
    """Ranges that an image's appearance is drawn from; lengths are shares of the image's side.

    A quantity called `rotation` or the like is drawn from [-rotation, rotation]; a range is drawn
    from uniformly; a name that ends in `_share` is a probability.

    Attributes:
      fonts: names of the fonts, equally likely.
      mixed: whether every image draws a difficulty from [0, 1] that scales all that follows
        (True), or all images have difficulty 1 (False).
      rotation: degrees.
      scale: range of the size, 1 being the mask's own.
      shear: tangent.
      perspective: change of the size from one edge of the image to the other.
      shift: displacement.
      elastic: standard deviation of a smooth displacement.
      heavy_share, light_share, outline_share: strokes made thicker, thinner, or outlined.
      contrast: range of the luminance between ink and paper.
      paper: range of the paper's luminance (before an inversion).
      colour_share: ink and paper coloured, not grey.
      inversion_share: light ink on dark paper.
      texture_share: waves over the paper and the ink.
      clutter_share: a second character at the side, and bars.
      occlusion_share: a patch over a part of the image.
      blur: largest standard deviation added to 0.35 pixels.
      noise: largest standard deviation, of each colour channel for itself.
    """

    fonts: tuple[str, ...] = ALL_FONTS
    mixed: bool = False
    rotation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    perspective: float = 0.0
    shift: float = 0.0
    elastic: float = 0.0
    heavy_share: float = 0.0
    light_share: float = 0.0
    outline_share: float = 0.0
    contrast: tuple[float, float] = (0.9, 0.9)
    paper: tuple[float, float] = (0.95, 1.0)
    colour_share: float = 0.0
    inversion_share: float = 0.0
    texture_share: float = 0.0
    clutter_share: float = 0.0
    occlusion_share: float = 0.0
    blur: float = 0.0
    noise: float = 0.0

    def arrays(self) -> dict[str, np.ndarray]:
        """The same as float32 arrays, so that one compiled function renders every domain."""
        fields = dataclasses.asdict(self)
        indices = font_indices(fields.pop("fonts"))
        padded = np.zeros(len(FONTS), np.int32)
        padded[: len(indices)] = indices
        arrays = {name: np.asarray(value, np.float32) for name, value in fields.items()}
        return arrays | {"fonts": padded, "num_fonts": np.asarray(len(indices), np.float32)}


BROAD = Domain(
    fonts=PRETRAINING_FONTS,
    mixed=True,
    rotation=40.0,
    scale=(0.7, 1.25),
    shear=0.2,
    perspective=0.2,
    shift=0.18,
    elastic=0.05,
    heavy_share=0.2,
    light_share=0.2,
    outline_share=0.25,
    contrast=(0.3, 0.95),
    paper=(0.6, 1.0),
    colour_share=0.6,
    inversion_share=0.5,
    texture_share=0.4,
    clutter_share=0.35,
    occlusion_share=0.15,
    blur=0.4,
    noise=0.12,
)
"""The world that the small CLIP is pretrained on; its captions tell what can be seen."""


def at_difficulty(domain: dict, difficulty: jax.Array) -> dict:
    """The domain's arrays between plain black on white (0) and their own values (1)."""
    centre = {"scale": 1.0, "contrast": 0.95, "paper": 1.0}
    unscaled = ("fonts", "num_fonts", "mixed")
    return {
        name: value
        if name in unscaled
        else centre.get(name, 0.0) + difficulty * (value - centre.get(name, 0.0))
        for name, value in domain.items()
    }
