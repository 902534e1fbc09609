"""Stored images to pixels on the host: decoding, crops and RandAugment; fixed crops to evaluate."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

from modelstock_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """A random resized crop, and what else is asked for, in the order of the attributes.

    Attributes:
      size: side of the result, pixels.
      crop_area: least and largest share of the image's area.
      crop_ratio: least and largest width / height.
      flip: left and right, half of the times.
      randaugment_ops: RandAugment's N; 0 turns it off.
      randaugment_magnitude: RandAugment's M, 0 to 30.
      scaled_decode: lets the JPEG decoder shrink an image of which much more is stored than the
        result needs (`transforms.largest_shrink`). Faster, but not Pillow's numbers to the bit.

    Raises:
      UserError: a value out of its range.
    """

    size: int
    crop_area: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    randaugment_ops: int = 0
    randaugment_magnitude: float = 0
    scaled_decode: bool = True

    def __post_init__(self):
        """Checks the ranges."""
        for name, greatest in (("crop_area", 1.0), ("crop_ratio", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= greatest:
                raise UserError(
                    f"data.augment.{name} is ({low}, {high}): two numbers above 0"
                    + (f" and up to {greatest:g}" if greatest == 1 else "")
                    + ", the smaller one first"
                )
        if self.randaugment_ops < 0:
            raise UserError(f"data.augment.randaugment_ops is {self.randaugment_ops}: at least 0")
        if not 0 <= self.randaugment_magnitude <= MAX_MAGNITUDE:
            raise UserError(
                f"data.augment.randaugment_magnitude is {self.randaugment_magnitude}: it must lie "
                f"between 0 and {MAX_MAGNITUDE}"
            )

    @classmethod
    def of(cls, config: ConfigDict, size: int) -> TrainTransform:
        """The view that the group `data.augment` of configs/default.py describes."""
        return cls(
            size,
            crop_area=tuple(config.crop_area),
            crop_ratio=tuple(config.crop_ratio),
            flip=config.flip,
            randaugment_ops=config.randaugment_ops,
            randaugment_magnitude=config.randaugment_magnitude,
        )

    def __call__(self, stored: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One view.

        Args:
          stored: an encoded image, or pixels uint8 [H, W, 3].
          rng: all that is random comes from it.

        Returns:
          uint8 [size, size, 3].

        Raises:
          Unreadable: not a whole image.
        """
        height, width = image_size(stored)
        crop = random_crop(rng, height, width, self.crop_area, self.crop_ratio)
        shrink = largest_shrink(crop, self.size) if self.scaled_decode else 1
        pixels = decode(stored, shrink)
        # Not a ratio of heights: a shrunk JPEG's last row may stand for fewer rows.
        shrink = shrink if pixels.shape[0] < height else 1
        image = resized_crop(pixels, crop, self.size, shrink)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment_ops:
            image = rand_augment(rng, image, self.randaugment_ops, self.randaugment_magnitude)
        return np.asarray(image)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The center of the image, its short side brought to the model's size.

    Attributes:
      size: side of the result, pixels.
      border: pixels to cut from each side before anything else (ObjectNet: 2).
    """

    size: int
    border: int = 0

    def __call__(self, stored: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The one view, uint8 [size, size, 3]; nothing of it is random.

        Raises:
          Unreadable: not a whole image.
        """
        pixels = decode(stored)
        height, width = pixels.shape[:2]
        border = self.border
        if min(height, width) <= 2 * border:
            raise Unreadable(f"{height} x {width} pixels, nothing within a border of {border}")
        return central(pixels[border : height - border, border : width - border], self.size)


# Encoded images to pixels.

_JPEG = b"\xff\xd8"
_CMYK = ("CMYK", "YCCK")  # The conversion to RGB is Pillow's.


class Unreadable(ValueError):
    """Bytes that are no whole image; the message says why, the caller knows which."""


def image_size(stored: bytes | np.ndarray) -> tuple[int, int]:
    """Height and width in pixels, from the header alone where there is one.

    Args:
      stored: a JPEG, PNG or whatever Pillow reads, or pixels uint8 [H, W, 3].

    Raises:
      Unreadable: not an image.
    """
    if isinstance(stored, np.ndarray):
        return stored.shape[0], stored.shape[1]
    if stored.startswith(_JPEG):
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(stored)
            return int(height), int(width)
        except ValueError:
            pass
    with _open(stored) as image:
        return image.height, image.width


def decode(stored: bytes | np.ndarray, shrink: int = 1) -> np.ndarray:
    """Pixels in RGB, as `PIL.Image.open(...).convert("RGB")` gives them.

    JPEGs go through simplejpeg, which gives the same numbers as Pillow in less time; what it does
    not read goes through Pillow: other formats, whatever the file is called, CMYK, and files with
    flaws that Pillow (and so torchvision's ImageFolder) puts up with. Gray becomes RGB. An
    orientation in EXIF is not applied, as in ImageFolder. Of 16-bit gray the high byte is kept,
    where Pillow would make it white.

    Args:
      stored: the file's bytes; pixels uint8 [H, W, 3] are returned as they are.
      shrink: 1, 2, 4 or 8: the decoder may give a JPEG at 1 / shrink of its size, rounded up,
        in much less time.

    Returns:
      uint8 [H, W, 3], or at 1 / shrink of that.

    Raises:
      Unreadable: truncated, or not an image.

    >>> pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    >>> file = io.BytesIO()
    >>> Image.fromarray(pixels).save(file, "PNG")
    >>> bool((decode(file.getvalue()) == pixels).all())
    True
    """
    if isinstance(stored, np.ndarray):
        return stored
    if stored.startswith(_JPEG):
        try:
            height, width, colors, _ = simplejpeg.decode_jpeg_header(stored)
            if colors not in _CMYK:
                return simplejpeg.decode_jpeg(
                    stored,
                    min_height=-(-int(height) // shrink),
                    min_width=-(-int(width) // shrink),
                )
        except ValueError:
            pass
    with _open(stored) as image:
        try:
            if image.mode.startswith("I;16"):
                return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
            return np.asarray(image.convert("RGB"))
        # Pillow's plugins raise these on damaged files.
        except (OSError, ValueError, SyntaxError, IndexError) as error:
            raise Unreadable(str(error)) from error


def _open(stored: bytes) -> Image.Image:
    if not stored:
        raise Unreadable("the file is empty")
    try:
        return Image.open(io.BytesIO(stored))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        known = isinstance(error, Image.UnidentifiedImageError)
        raise Unreadable("not an image in a known format" if known else str(error)) from error


# Which part of an image is seen, at which size.

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

    at a random place if it fits. Else the largest centerd part whose aspect ratio lies in
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
    the result is less than 1 gray level of 255 away on average. With just the pixels that are
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
    """Short side to `size`, then the center: the evaluation transform of CLIP.

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


# RandAugment on the host, by Pillow.

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
    # Nearest neighbor and black outside: torchvision's default.
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
    brightness, color, contrast and sharpness by the factor 1 +- 0.9 m/30, 8 - round(4 m/30) bits,
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
