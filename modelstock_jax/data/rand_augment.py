"""RandAugment on the host, by Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 30


class Operation(NamedTuple):
    """What is done to an image.

    Attributes:
      strongest: x at magnitude 30; at 0 it is 0, where most operations change nothing.
      signed: whether the sign of x is drawn.
      apply: (image, x) -> image.
    """

    strongest: float
    signed: bool
    apply: Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    # Nearest neighbour and black outside: torchvision's default.
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _enhance(enhancer: Callable) -> Operation:
    return Operation(0.9, True, lambda image, x: enhancer(image).enhance(1.0 + x))


OPERATIONS = {
    "identity": Operation(0.0, False, lambda image, x: image),
    "shear_x": Operation(0.3, True, lambda image, x: _affine(image, 1, x, 0, 0, 1, 0)),
    "shear_y": Operation(0.3, True, lambda image, x: _affine(image, 1, 0, 0, x, 1, 0)),
    "translate_x": Operation(
        150 / 331, True, lambda image, x: _affine(image, 1, 0, -int(x * image.width), 0, 1, 0)
    ),
    "translate_y": Operation(
        150 / 331, True, lambda image, x: _affine(image, 1, 0, 0, 0, 1, -int(x * image.height))
    ),
    "rotate": Operation(30.0, True, lambda image, x: image.rotate(x)),
    "brightness": _enhance(ImageEnhance.Brightness),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "posterize": Operation(4.0, False, lambda image, x: ImageOps.posterize(image, 8 - round(x))),
    "solarize": Operation(
        255.0, False, lambda image, x: ImageOps.solarize(image, math.ceil(255 - x))
    ),
    "autocontrast": Operation(0.0, False, lambda image, x: ImageOps.autocontrast(image)),
    "equalize": Operation(0.0, False, lambda image, x: ImageOps.equalize(image)),
}
_ALL = tuple(OPERATIONS.values())


def rand_augment(
    rng: np.random.Generator, image: Image.Image, operations: int, magnitude: float
) -> Image.Image:
    """Applies operations drawn with replacement, all of one magnitude (Cubuk et al. 2020).

    The 14 operations and their strengths are those of torchvision's RandAugment with 31 bins: at
    magnitude m, shear 0.3 m/30, translation 150/331 m/30 of the side, rotation 30 m/30 degrees,
    brightness, colour, contrast and sharpness by the factor 1 +- 0.9 m/30, 8 - round(4 m/30) bits,
    solarization from 255 (1 - m/30) on; autocontrast and equalization have no strength.

    Args:
      rng: takes two numbers an operation.
      image: RGB.
      operations: how many, the paper's N.
      magnitude: 0 to 30, the paper's M.

    >>> image = Image.new("RGB", (8, 8), (10, 20, 30))
    >>> rand_augment(np.random.default_rng(0), image, operations=2, magnitude=10).size
    (8, 8)
    """
    for which, sign in rng.random((operations, 2)):
        operation = _ALL[int(which * len(_ALL))]
        x = operation.strongest * magnitude / MAX_MAGNITUDE
        image = operation.apply(image, -x if operation.signed and sign < 0.5 else x)
    return image
