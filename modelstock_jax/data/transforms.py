"""Host-side image transforms: decoding, random crops, RandAugment, and center crops to evaluate."""

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

from modelstock_jax.data.resize import BICUBIC, MAX_PIXELS
from modelstock_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """A random resized crop, then an optional flip and RandAugment, in the attributes' order.

    Attributes:
      size: side of the result in pixels
      crop_area: min and max fraction of the image's area
      crop_ratio: min and max width / height
      flip: whether to flip horizontally with probability 0.5
      randaugment_ops: RandAugment's N; 0 disables it
      randaugment_magnitude: RandAugment's M, 0 to 30
      scaled_decode: whether the JPEG decoder may downscale images that are much larger than the
        result needs (`largest_shrink`): faster, but not bitwise identical to Pillow
      resample: Pillow's code of the crop's resize filter

    Raises:
      UserError: a value is out of range
    """

    size: int
    crop_area: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    randaugment_ops: int = 0
    randaugment_magnitude: float = 0
    scaled_decode: bool = True
    resample: int = BICUBIC

    def __post_init__(self):
        """Check the ranges."""
        for name, maximum in (("crop_area", 1.0), ("crop_ratio", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= maximum:
                raise UserError(
                    f"data.augment.{name} is ({low}, {high}): give two values above 0"
                    + (f" and at most {maximum:g}" if maximum == 1 else "")
                    + ", the smaller one first"
                )
        if self.randaugment_ops < 0:
            raise UserError(
                f"data.augment.randaugment_ops is {self.randaugment_ops}: it must be at least 0"
            )
        if not 0 <= self.randaugment_magnitude <= MAX_MAGNITUDE:
            raise UserError(
                f"data.augment.randaugment_magnitude is {self.randaugment_magnitude}: it must be "
                f"between 0 and {MAX_MAGNITUDE}"
            )

    @classmethod
    def of(cls, config: ConfigDict, size: int, resample: int = BICUBIC) -> TrainTransform:
        """Return the transform of the group `data.augment` of configs/default.py."""
        return cls(
            size,
            crop_area=tuple(config.crop_area),
            crop_ratio=tuple(config.crop_ratio),
            flip=config.flip,
            randaugment_ops=config.randaugment_ops,
            randaugment_magnitude=config.randaugment_magnitude,
            resample=resample,
        )

    def __call__(self, stored: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Transform one image.

        Args:
          stored: an encoded image, or pixels uint8 [H, W, 3]
          rng: the source of all random numbers

        Returns:
          uint8 [size, size, 3].

        Raises:
          Unreadable: the data is not a complete image
        """
        height, width = image_size(stored)
        crop = random_crop(rng, height, width, self.crop_area, self.crop_ratio)
        shrink = largest_shrink(crop, self.size) if self.scaled_decode else 1
        pixels = decode(stored, shrink)
        # Not the ratio of the heights: the last row of a downscaled JPEG may cover fewer rows.
        shrink = shrink if pixels.shape[0] < height else 1
        image = resized_crop(pixels, crop, self.size, shrink, self.resample)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.randaugment_ops:
            image = rand_augment(rng, image, self.randaugment_ops, self.randaugment_magnitude)
        return np.asarray(image)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """A resize, then a center crop: transformers' image processors, up to normalization.

    The pixels are bitwise identical to those of the processors with Pillow. By default, the short
    side is resized to the result's side, as for CLIP.

    Attributes:
      size: side of the result in pixels
      border: pixels to crop from each side before the resize (ObjectNet: 2)
      short_side: side in pixels to which the short side is resized; 0 means `size`; None resizes
        to a square regardless of the aspect ratio
      square_side: side of that square in pixels; 0 means `size`
      resample: Pillow's code of the resize filter
    """

    size: int
    border: int = 0
    short_side: int | None = 0
    square_side: int = 0
    resample: int = BICUBIC

    def __call__(
        self, stored: bytes | np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Return the image, uint8 [size, size, 3]; `rng` is not used.

        Raises:
          Unreadable: the data is not a complete image, or too elongated to resize
        """
        pixels = decode(stored)
        height, width = pixels.shape[:2]
        border = self.border
        if min(height, width) <= 2 * border:
            raise Unreadable(f"{height} x {width} pixels, too small for a border of {border}")
        pixels = pixels[border : height - border, border : width - border]
        if self.short_side is None:
            side = self.square_side or self.size
            image = Image.fromarray(pixels).resize((side, side), self.resample)
        else:
            image = resize_short_side(pixels, self.short_side or self.size, self.resample)
        return center_crop(image, self.size)


_JPEG = b"\xff\xd8"
_CMYK = ("CMYK", "YCCK")  # Pillow converts these to RGB.


class Unreadable(ValueError):
    """Bytes that are not a complete image; the message is the reason, without the image's name."""


def image_size(stored: bytes | np.ndarray) -> tuple[int, int]:
    """Return height and width in pixels, from the header only if there is one.

    Args:
      stored: a JPEG, a PNG or any other format of Pillow, or pixels uint8 [H, W, 3]

    Raises:
      Unreadable: the data is not an image
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
    """Decode an image to RGB pixels, as `PIL.Image.open(...).convert("RGB")` does.

    simplejpeg decodes JPEGs, with the same values as Pillow in less time. Pillow decodes all other
    data: other formats (regardless of the file extension), CMYK, and files with errors that Pillow
    (and thus torchvision's ImageFolder) tolerates. Grayscale becomes RGB. As in ImageFolder, an
    EXIF orientation is not applied. 16-bit grayscale uses the high byte (Pillow would make it
    white).

    Args:
      stored: the bytes of a file; pixels uint8 [H, W, 3] are returned unchanged
      shrink: 1, 2, 4 or 8; the decoder may return a JPEG at 1 / shrink of its size, rounded up,
        in much less time

    Returns:
      uint8 [H, W, 3], or 1 / shrink of that height and width.

    Raises:
      Unreadable: the data is truncated or not an image

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
        # Pillow's plugins raise these for damaged files.
        except (OSError, ValueError, SyntaxError, IndexError) as error:
            raise Unreadable(str(error)) from error


def _open(stored: bytes) -> Image.Image:
    if not stored:
        raise Unreadable("the file is empty")
    try:
        return Image.open(io.BytesIO(stored))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        unidentified = isinstance(error, Image.UnidentifiedImageError)
        reason = "not an image in a known format" if unidentified else str(error)
        raise Unreadable(reason) from error


_TRIES = 10


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
    """Draw a crop of random size, shape and position by torchvision's rule.

    Up to ten times: area a H W with a ~ U(area), aspect ratio r = e^u with u ~ U(log ratio),

        w = round(sqrt(a H W r)),   h = round(sqrt(a H W / r)),

    at a random position if it fits. If none fits, use the largest centered crop whose aspect ratio
    is in `ratio`, which is the full image if its own aspect ratio is. This is
    `RandomResizedCrop.get_params` of torchvision 0.24, whose `int(round(...))` rounds halves to
    even; the random numbers differ.

    Args:
      rng: source of forty random numbers, regardless of the number of tries
      height: H of the image
      width: W of the image
      area: min and max fraction of the image's area
      ratio: min and max width / height

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
    """Return the factor (1, 2, 4 or 8) by which a decoder may downscale before `crop` is resized.

    The decoded crop keeps at least twice the pixels per side that `size` needs, so that the resize
    still determines the result, which differs by less than 1 gray level of 255 on average. With
    exactly the needed pixels the difference would be up to 3, more than between bicubic and
    bilinear.
    """
    return max(k for k in (1, 2, 4, 8) if k == 1 or min(crop.height, crop.width) >= 2 * k * size)


def resized_crop(
    pixels: np.ndarray, crop: Crop, size: int, shrink: int = 1, resample: int = BICUBIC
) -> Image.Image:
    """Resize `crop` to size x size pixels by Pillow, whose filters are antialiased.

    Args:
      pixels: uint8 [H, W, 3]
      crop: the crop in pixels of the full-size image
      size: side of the result
      shrink: full-size pixels per pixel of `pixels`; with 1 the result equals Pillow's `crop` and
        `resize`
      resample: Pillow's code of the filter
    """
    top, left = crop.top / shrink, crop.left / shrink
    bottom, right = top + crop.height / shrink, left + crop.width / shrink
    row, column = math.floor(top), math.floor(left)
    cropped = pixels[row : math.ceil(bottom), column : math.ceil(right)]
    height, width = cropped.shape[:2]
    box = (left - column, top - row, min(right - column, width), min(bottom - row, height))
    return Image.fromarray(cropped).resize((size, size), resample, box=box)


def resize_short_side(pixels: np.ndarray, size: int, resample: int = BICUBIC) -> Image.Image:
    """Resize the full image so that its short side is `size`; keep the aspect ratio.

    The long side is int(size * long / short), as in torchvision's Resize and transformers.

    Args:
      pixels: uint8 [H, W, 3]
      size: short side of the result in pixels
      resample: Pillow's code of the filter

    Raises:
      Unreadable: the result would be larger than any image that Pillow opens
    """
    height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    long_side = int(size * long / short)
    if size * long_side > MAX_PIXELS:
        raise Unreadable(f"{height} x {width} pixels, too elongated to resize")
    shape = (size, long_side) if width <= height else (long_side, size)
    image = Image.fromarray(pixels)
    return image if image.size == shape else image.resize(shape, resample)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return the central size x size pixels, uint8 [size, size, 3].

    If the margin is odd, the smaller half is cropped on the left or the top, as in transformers;
    torchvision's CenterCrop rounds half of the odd margins to the other side.

    Args:
      image: at least that large
      size: in pixels

    >>> center_crop(Image.new("RGB", (20, 30)), 16).shape
    (16, 16, 3)
    """
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


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
_OPERATIONS = tuple(OPERATIONS.values())


def rand_augment(
    rng: np.random.Generator, image: Image.Image, operations: int, magnitude: float
) -> Image.Image:
    """Apply random operations, drawn with replacement, at one magnitude (Cubuk et al. 2020).

    The 14 operations and their strengths are those of torchvision's RandAugment with 31 bins. At
    magnitude m: shear by 0.3 m/30; translation by 150/331 m/30 of the side; rotation by 30 m/30
    degrees; brightness, color, contrast and sharpness by the factor 1 +- 0.9 m/30; posterization
    to 8 - round(4 m/30) bits; solarization above 255 (1 - m/30). Autocontrast and equalization
    have no strength.

    Args:
      rng: source of two random numbers per operation
      image: RGB
      operations: number of operations, the paper's N
      magnitude: 0 to 30, the paper's M

    >>> image = Image.new("RGB", (8, 8), (10, 20, 30))
    >>> rand_augment(np.random.default_rng(0), image, operations=2, magnitude=10).size
    (8, 8)
    """
    for which, sign in rng.random((operations, 2)):
        operation = _OPERATIONS[int(which * len(_OPERATIONS))]
        x = operation.strongest * magnitude / MAX_MAGNITUDE
        image = operation.apply(image, -x if operation.signed and sign < 0.5 else x)
    return image
