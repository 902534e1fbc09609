"""Which part of an image is seen, at which size."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from modelstock_jax.data.decode import Unreadable

_TRIES = 10
_MOST_PIXELS = 178_956_970  # beyond which Pillow takes an image for a trap
_BICUBIC = Image.Resampling.BICUBIC


class Crop(NamedTuple):
    """A rectangle in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Crop:
    """A part of an image of random size, shape and place, by torchvision's rule.

    Up to ten times: area a H W with a ~ U(area), aspect ratio r = e^u with u ~ U(log ratio),

        w = round(sqrt(a H W r)),   h = round(sqrt(a H W / r)),

    at a random place if it fits. Else the largest centred part whose aspect ratio lies in
    `ratio`, which is the whole image if its own does. This is `RandomResizedCrop.get_params` of
    torchvision 0.24, whose `int(round(...))` rounds halves to even; the random numbers differ.

    Args:
      rng: takes forty numbers, however many tries it needs.
      height: H, of the image.
      width: W, of the image.
      area: least and largest share of the image's area.
      ratio: least and largest width / height.

    >>> random_crop(np.random.default_rng(0), 375, 500, (0.9, 1.0), (3 / 4, 4 / 3))
    Crop(top=2, left=0, height=373, width=479)
    """
    drawn = rng.random((_TRIES, 4))
    areas = height * width * (area[0] + (area[1] - area[0]) * drawn[:, 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(low + (high - low) * drawn[:, 1])
    widths = np.rint(np.sqrt(areas * ratios)).astype(int)
    heights = np.rint(np.sqrt(areas / ratios)).astype(int)
    fits = (0 < widths) & (widths <= width) & (0 < heights) & (heights <= height)
    if fits.any():
        first = int(fits.argmax())
        h, w = int(heights[first]), int(widths[first])
        top, left = drawn[first, 2:] * (height - h + 1, width - w + 1)
        return Crop(int(top), int(left), h, w)
    h, w = height, width
    if width < ratio[0] * height:
        h = round(width / ratio[0])
    elif width > ratio[1] * height:
        w = round(height * ratio[1])
    return Crop((height - h) // 2, (width - w) // 2, h, w)


def largest_shrink(crop: Crop, size: int) -> int:
    """By how much a decoder may shrink an image (1, 2, 4, 8) of which `crop` is seen at `size`.

    Twice the pixels a side that are needed remain, so that the resize still decides what is seen:
    the result is less than 1 grey level of 255 away on average. With just the pixels that are
    needed it would be up to 3, more than between bicubic and bilinear.
    """
    return max(k for k in (1, 2, 4, 8) if k == 1 or min(crop.height, crop.width) >= 2 * k * size)


def resized_crop(pixels: np.ndarray, crop: Crop, size: int, shrink: int = 1) -> Image.Image:
    """The part `crop` at size x size pixels, bicubic with antialiasing, as Pillow does it.

    Args:
      pixels: uint8 [H, W, 3].
      crop: within the image at its full size.
      size: side of the result.
      shrink: pixels of the image at its full size for one of `pixels`; at 1 the result is that of
        Pillow's `crop` and `resize`.
    """
    top, left = crop.top / shrink, crop.left / shrink
    bottom, right = top + crop.height / shrink, left + crop.width / shrink
    first, start = math.floor(top), math.floor(left)
    part = pixels[first : math.ceil(bottom), start : math.ceil(right)]
    height, width = part.shape[:2]
    box = (left - start, top - first, min(right - start, width), min(bottom - first, height))
    return Image.fromarray(part).resize((size, size), _BICUBIC, box=box)


def resize_short_side(pixels: np.ndarray, size: int) -> Image.Image:
    """The whole image, its short side brought to `size`, the other one in proportion.

    The long side is int(size * long / short), as in torchvision's Resize and transformers.

    Args:
      pixels: uint8 [H, W, 3].
      size: pixels.

    Raises:
      Unreadable: an image that would be larger than any that Pillow opens.
    """
    height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    other = int(size * long / short)
    if size * other > _MOST_PIXELS:
        raise Unreadable(f"{height} x {width} pixels, too long for its width")
    shape = (size, other) if width <= height else (other, size)
    image = Image.fromarray(pixels)
    return image if image.size == shape else image.resize(shape, _BICUBIC)


def central(pixels: np.ndarray, size: int) -> np.ndarray:
    """Short side to `size`, then the centre: the evaluation transform of CLIP.

    Equals transformers' CLIPImageProcessor with Pillow bit for bit. Where the margin is odd the
    smaller half is cut on the left or the top; torchvision's CenterCrop rounds half of the times
    to the other side.

    Args:
      pixels: uint8 [H, W, 3].
      size: S, pixels.

    Returns:
      uint8 [S, S, 3].

    >>> central(np.zeros((30, 20, 3), np.uint8), 16).shape
    (16, 16, 3)
    """
    image = resize_short_side(pixels, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
