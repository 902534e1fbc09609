"""Image transforms on the host: decoding, random crops, and center crops to evaluate."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import NamedTuple

import numpy as np
import simplejpeg
from ml_collections import ConfigDict
from PIL import Image

from modelstock_jax.data.randaugment import MAX_MAGNITUDE, apply_operations, draw_operations
from modelstock_jax.data.resize import BICUBIC, DEVICE_FILTERS, MAX_PIXELS
from modelstock_jax.data.views import View, canvas_side, check_resize_on, resized, vertical_first
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
      resize_on: 'host', or 'device': `loader.train_batches` then returns canvases, and
        `device_resize` resizes and augments them. Crops larger than a canvas are resized on the
        host

    Raises:
      UserError: a value is out of range, or the device does not have the filter
    """

    size: int
    crop_area: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    randaugment_ops: int = 0
    randaugment_magnitude: float = 0
    scaled_decode: bool = True
    resample: int = BICUBIC
    resize_on: str = "host"

    def __post_init__(self):
        """Check the ranges."""
        check_resize_on(self.resize_on, self.resample)
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
    def of(
        cls, config: ConfigDict, size: int, resample: int = BICUBIC, resize_on: str = "host"
    ) -> TrainTransform:
        """Return the transform of the group `data.augment` of configs/default.py."""
        return cls(
            size,
            crop_area=tuple(config.crop_area),
            crop_ratio=tuple(config.crop_ratio),
            flip=config.flip,
            randaugment_ops=config.randaugment_ops,
            randaugment_magnitude=config.randaugment_magnitude,
            resample=resample,
            resize_on=resize_on,
        )

    def __call__(self, stored: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Transform an image on the host.

        Args:
          stored: an encoded image, or pixels uint8 [H, W, 3]
          rng: the source of all random numbers

        Returns:
          uint8 [size, size, 3].

        Raises:
          Unreadable: the data is not a complete image
        """
        view = self.crop(stored, rng)
        return np.asarray(apply_operations(self._resize(view), view.operations))

    def view(self, stored: bytes | np.ndarray, rng: np.random.Generator, canvas: int) -> View:
        """Return what the device resizes, with the random numbers and the arguments of `__call__`.

        Args:
          stored: see `__call__`
          rng: see `__call__`
          canvas: side of the canvases; a view that does not fit is resized on the host
        """
        view = self.crop(stored, rng)
        if view.fits(canvas):
            return view
        return resized(np.asarray(self._resize(view)), view.operations)

    def canvas_side(self, sizes: tuple[np.ndarray, np.ndarray] | None) -> int:
        """Return the side of the canvases of a dataset.

        Args:
          sizes: heights and widths of all stored images, if they are known

        Example:
          >>> TrainTransform(224).canvas_side((np.array([256, 256]), np.array([341, 900])))
          352
        """
        if sizes is None or not len(sizes[0]):
            return canvas_side(self.size)
        heights, widths = sizes
        # A crop is at most as high as the image, and then at most the max ratio as wide.
        crop_widths = np.minimum(widths, np.rint(self.crop_ratio[1] * heights))
        crop_heights = np.minimum(heights, np.rint(widths / self.crop_ratio[0]))
        return canvas_side(self.size, max(crop_widths.max(), crop_heights.max()))

    def crop(self, stored: bytes | np.ndarray, rng: np.random.Generator) -> View:
        """Draw the crop, the flip and the operations; decode the pixels of the crop."""
        height, width = image_size(stored)
        crop = random_crop(rng, height, width, self.crop_area, self.crop_ratio)
        shrink = largest_shrink(crop, self.size) if self.scaled_decode else 1
        pixels = decode(stored, shrink)
        # Not the ratio of the heights: the last row of a downscaled JPEG may cover fewer rows.
        shrink = shrink if pixels.shape[0] < height else 1
        flip = self.flip and rng.random() < 0.5
        operations = draw_operations(rng, self.randaugment_ops, self.randaugment_magnitude)
        view = crop_view(pixels, crop, self.size, shrink)
        return view._replace(flip=flip, operations=operations)

    def _resize(self, view: View) -> Image.Image:
        return view.resize(self.size, self.resample)


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
      resize_on: see `TrainTransform`

    Raises:
      UserError: `resize_on` is unknown, or the device does not have the filter
    """

    size: int
    border: int = 0
    short_side: int | None = 0
    square_side: int = 0
    resample: int = BICUBIC
    resize_on: str = "host"

    def __post_init__(self):
        """Check the filter."""
        check_resize_on(self.resize_on, self.resample)

    def __call__(
        self, stored: bytes | np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:
        """Return the image, uint8 [size, size, 3]; `rng` is not used.

        Raises:
          Unreadable: the data is not a complete image, or too elongated to resize
        """
        return self._resize(self._decode(stored))

    def view(
        self, stored: bytes | np.ndarray, rng: np.random.Generator | None, canvas: int
    ) -> View:
        """Return what the device resizes: the pixels that the center of the result depends on.

        Args:
          stored: an encoded image, or pixels uint8 [H, W, 3]
          rng: not used
          canvas: side of the canvases; a view that does not fit is resized on the host

        Raises:
          Unreadable: see `__call__`
        """
        pixels = self._decode(stored)
        height, width = pixels.shape[:2]
        if self.short_side is None:
            sides = (self.square_side or self.size,) * 2
        else:
            sides = short_side_shape(height, width, self.short_side or self.size)
        radius = DEVICE_FILTERS[self.resample]
        rows, top, bottom = _center(height, sides[0], self.size, radius)
        columns, left, right = _center(width, sides[1], self.size, radius)
        order = vertical_first(height, width, *sides)
        view = View(pixels[rows, columns], (top, left, bottom, right), order)
        return view if view.fits(canvas) else resized(self._resize(pixels))

    @property
    def randaugment_ops(self) -> int:
        """0: evaluation does not augment."""
        return 0

    def canvas_side(self, sizes: tuple[np.ndarray, np.ndarray] | None) -> int:
        """Return the side of the canvases of a dataset, see `TrainTransform.canvas_side`."""
        if sizes is None or not len(sizes[0]):
            return canvas_side(self.size)
        return canvas_side(self.size, max(sizes[0].max(), sizes[1].max()))

    def _decode(self, stored: bytes | np.ndarray) -> np.ndarray:
        pixels = decode(stored)
        height, width = pixels.shape[:2]
        border = self.border
        if min(height, width) <= 2 * border:
            raise Unreadable(f"{height} x {width} pixels, too small for a border of {border}")
        return pixels[border : height - border, border : width - border]

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        if self.short_side is None:
            side = self.square_side or self.size
            image = Image.fromarray(pixels).resize((side, side), self.resample)
        else:
            image = resize_short_side(pixels, self.short_side or self.size, self.resample)
        return center_crop(image, self.size)


def _center(
    length: int, resized_length: int, size: int, radius: float
) -> tuple[slice, float, float]:
    """Return the pixels of a side that the center of the resized side depends on.

    Args:
      length: pixels of the side
      resized_length: pixels of the resized side
      size: pixels of its center
      radius: support of the filter

    Returns:
      The range of pixels; the start and the end of the center, in pixels after the range's start.
    """
    scale, first = length / resized_length, (resized_length - size) // 2
    start, stop = first * scale, (first + size) * scale
    margin = radius * max(scale, 1.0) + 1.0  # One pixel more than the filter needs.
    low, high = max(0, math.floor(start - margin)), min(length, math.ceil(stop + margin))
    return slice(low, high), start - low, stop - low


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


def crop_view(pixels: np.ndarray, crop: Crop, size: int, shrink: int = 1) -> View:
    """Return the view of a crop: its resize equals Pillow's `crop` and `resize`.

    Args:
      pixels: uint8 [H, W, 3]
      crop: the crop in pixels of the full-size image
      size: side of the result in pixels
      shrink: full-size pixels per pixel of `pixels`; the crop then starts within a pixel
    """
    top, left = crop.top / shrink, crop.left / shrink
    bottom, right = top + crop.height / shrink, left + crop.width / shrink
    row, column = math.floor(top), math.floor(left)
    cropped = pixels[row : math.ceil(bottom), column : math.ceil(right)]
    height, width = cropped.shape[:2]
    box = (top - row, left - column, min(bottom - row, height), min(right - column, width))
    return View(cropped, box, vertical_first(height, width, size, size))


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
    height, width = short_side_shape(pixels.shape[0], pixels.shape[1], size)
    image = Image.fromarray(pixels)
    return image if image.size == (width, height) else image.resize((width, height), resample)


def short_side_shape(height: int, width: int, size: int) -> tuple[int, int]:
    """Return the height and width of an image after `resize_short_side`.

    Raises:
      Unreadable: the result would be larger than any image that Pillow opens
    """
    short, long = min(height, width), max(height, width)
    long_side = int(size * long / short)
    if size * long_side > MAX_PIXELS:
        raise Unreadable(f"{height} x {width} pixels, too elongated to resize")
    return (long_side, size) if width <= height else (size, long_side)


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
