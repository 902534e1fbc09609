"""RandAugment: its operations on the host, by Pillow, and their random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 30


class Operation(NamedTuple):
    """An operation of RandAugment, by Pillow.

    Attributes:
      strongest: x at magnitude 30; at magnitude 0, x is 0 and most operations change nothing
      signed: whether the sign of x is random
      apply: (image, x) -> image
    """

    strongest: float
    signed: bool
    apply: Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    # Nearest neighbor, black outside the image: torchvision's default.
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
_NAMES = tuple(OPERATIONS)


def draw_operations(
    rng: np.random.Generator, count: int, magnitude: float
) -> tuple[tuple[str, float], ...]:
    """Draw random operations, with replacement, at one magnitude (Cubuk et al. 2020).

    The 14 operations and their strengths are those of torchvision's RandAugment with 31 bins. At
    magnitude m: shear by 0.3 m/30; translation by 150/331 m/30 of the side; rotation by 30 m/30
    degrees; brightness, color, contrast and sharpness by the factor 1 +- 0.9 m/30; posterization
    to 8 - round(4 m/30) bits; solarization above 255 (1 - m/30). Autocontrast and equalization
    have no strength.

    Args:
      rng: source of two random numbers per operation; of none without operations
      count: number of operations, the paper's N
      magnitude: 0 to 30, the paper's M

    Returns:
      Names of `OPERATIONS` with their x.

    >>> draw_operations(np.random.default_rng(0), count=2, magnitude=10)
    (('contrast', -0.3), ('identity', 0.0))
    """
    drawn = []
    for which, sign in rng.random((count, 2)) if count else ():
        name = _NAMES[int(which * len(_NAMES))]
        operation = OPERATIONS[name]
        x = operation.strongest * magnitude / MAX_MAGNITUDE
        drawn.append((name, -x if operation.signed and sign < 0.5 else x))
    return tuple(drawn)


def apply_operations(image: Image.Image, operations: Sequence[tuple[str, float]]) -> Image.Image:
    """Apply the operations of `draw_operations` to an RGB image.

    >>> image = Image.new("RGB", (8, 8), (10, 20, 30))
    >>> apply_operations(image, [("solarize", 255.0), ("rotate", 9.0)]).getpixel((4, 4))
    (245, 235, 225)
    """
    for name, x in operations:
        image = OPERATIONS[name].apply(image, x)
    return image


# The operations of `device_randaugment`, in the order of their codes; 0 changes nothing.
DEVICE_OPERATIONS = (
    *("identity", "affine", "brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
ENCODED = 8  # integers per operation
_FIXED = 1 << 16  # Pillow's affine transforms have positions in units of 1 / 65536 pixel.


@lru_cache
def encode_operation(name: str, x: float, size: int) -> np.ndarray:
    """Return an operation as the integers that `device_randaugment.apply_operation` reads.

    Args:
      name: of `OPERATIONS`
      x: strength
      size: side of the images in pixels

    Returns:
      int32 [8].

    >>> encode_operation("posterize", 4.0, 224).tolist()
    [6, 240, 0, 0, 0, 0, 0, 0]
    """
    encoded = np.zeros(ENCODED, np.int32)
    matrix = _affine_matrix(name, x, size)
    kind = DEVICE_OPERATIONS.index("affine" if matrix else name)
    if matrix:
        values = [kind, *_fixed_point(matrix)]
    elif name in ("brightness", "color", "contrast", "sharpness"):
        # factor = mantissa * unit, an integer below 2^24 and a power of two.
        fraction, exponent = np.frexp(np.float32(1.0 + x))
        unit = np.float32(2.0 ** (int(exponent) - 24))
        values = [kind, int(fraction * 2**24), int(unit.view(np.int32))]
    elif name == "posterize":
        values = [kind, 256 - 2 ** round(x)]
    elif name == "solarize":
        values = [kind, math.ceil(255 - x)]
    else:
        values = [kind]
    encoded[: len(values)] = values
    return encoded


def _affine_matrix(name: str, x: float, size: int) -> tuple[float, ...] | None:
    """Return the matrix of a geometric operation, which Pillow's `transform` would get."""
    if name == "rotate":
        angle, center = -math.radians(x % 360.0), size / 2
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        shifts = cos * -center + sin * -center + center, -sin * -center + cos * -center + center
        return cos, sin, shifts[0], -sin, cos, shifts[1]
    return {
        "shear_x": (1, x, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, x, 1, 0),
        "translate_x": (1, 0, -int(x * size), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -int(x * size)),
    }.get(name)


def _fixed_point(matrix: tuple[float, ...]) -> list[int]:
    """Return the matrix in units of 1 / 65536, with the positions of pixel centers."""
    a, b, c, d, e, f = matrix
    centered = (a, b, c + 0.5 * a + 0.5 * b, d, e, f + 0.5 * d + 0.5 * e)
    return [math.floor(value * _FIXED + 0.5) for value in centered]
