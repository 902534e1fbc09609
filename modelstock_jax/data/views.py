"""Views: the pixels of an image that a resize reads, for a resize on the host or on the device.

For a resize on the device, the views of a batch are stored in canvases of one size, because the
arrays of a compiled program have fixed shapes. Crops that do not fit are resized on the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from modelstock_jax.data.randaugment import encode_operation
from modelstock_jax.data.resize import DEVICE_FILTERS
from modelstock_jax.errors import UserError, check_choice

VIEW_ARRAYS = ("image", "geometry", "operations")
RESIZE_ON = ("host", "device")
GEOMETRY = 12  # numbers per view: five per axis, and two flags; see `View.store`
_COARSE = 512.0  # A coarse scale is a multiple of 1 / 512: its products with results are exact.
# Pillow 13 changed the order of the two passes for tall images.
_PILLOW_ORDERS_PASSES = int(PIL.__version__.split(".")[0]) >= 13


class View(NamedTuple):
    """A part of an image, the box in it that is resized, and a flip after the resize.

    Attributes:
      pixels: uint8 [h, w, 3]
      box: top, left, bottom and right of the resized box, in pixels of `pixels`
      vertical_first: whether Pillow resizes along the columns first (`vertical_first`)
      flip: whether to flip the result horizontally
      operations: of RandAugment, applied after that (`randaugment.draw_operations`)
    """

    pixels: np.ndarray
    box: tuple[float, float, float, float]
    vertical_first: bool = False
    flip: bool = False
    operations: tuple[tuple[str, float], ...] = ()

    def resize(self, size: int, resample: int) -> Image.Image:
        """Return the box resized to `size` x `size` pixels by Pillow, and flipped.

        Pillow chooses the order of its passes.
        """
        top, left, bottom, right = self.box
        image = Image.fromarray(self.pixels)
        image = image.resize((size, size), resample, box=(left, top, right, bottom))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

    def fits(self, canvas: int) -> bool:
        """Return whether the pixels fit in a canvas of this side."""
        return max(self.pixels.shape[:2]) <= canvas

    def store(self, arrays: dict[str, np.ndarray], size: int) -> None:
        """Write the view to the arrays of one example of a batch.

        The geometry of an axis is: number of pixels; start of the box, as an integer and a
        fraction; pixels per result, as a multiple of 1 / 512 and the rest. In parts, float32 gives
        exact positions.

        Args:
          arrays: {"image": canvas uint8 [C, C, 3], which keeps its content outside of the view;
            "geometry": float32 [12], five numbers per axis, `vertical_first` and `flip`;
            "operations": int32 [n, 8], zeros, if views have up to n operations}
          size: side of the result in pixels
        """
        height, width = self.pixels.shape[:2]
        arrays["image"][:height, :width] = self.pixels
        top, left, bottom, right = self.box
        geometry = arrays["geometry"]
        geometry[:5] = _axis(height, top, bottom, size)
        geometry[5:10] = _axis(width, left, right, size)
        geometry[10:] = self.vertical_first, self.flip
        for number, (name, x) in enumerate(self.operations):
            arrays["operations"][number] = encode_operation(name, x, size)


def _axis(length: int, start: float, stop: float, size: int) -> tuple[float, ...]:
    scale, pixel = (stop - start) / size, math.floor(start)
    coarse = math.floor(_COARSE * scale) / _COARSE
    return length, pixel, start - pixel, coarse, scale - coarse


def resized(image: np.ndarray, operations: tuple[tuple[str, float], ...] = ()) -> View:
    """Return the view of an image that has its final size: a resize on the device keeps it."""
    height, width = image.shape[:2]
    return View(image, (0, 0, height, width), operations=operations)


def vertical_first(height: int, width: int, rows: int, columns: int) -> bool:
    """Return whether Pillow resizes an image along its columns before its rows.

    Each pass rounds, so that the order changes the result. Before Pillow 13, the rows were always
    first.

    Args:
      height: of the image in pixels, also if only a box of it is resized
      width: of the image
      rows: height of the result
      columns: width of the result

    Example:
      >>> vertical_first(400, 500, 224, 224)
      False
    """
    tall = height > rows and height - rows > 2 * (width - columns)
    return _PILLOW_ORDERS_PASSES and tall


def canvas_side(size: int, largest: float = math.inf) -> int:
    """Return the side of the canvases of a dataset, a multiple of 16.

    Args:
      size: side of the result in pixels; the side of a canvas is at most 2 `size` + 64
      largest: side of the largest view, if it is known

    Example:
      >>> canvas_side(224), canvas_side(224, 341)
      (512, 352)
    """
    side = int(min(2 * size + 64, max(largest, size)))
    return -(-side // 16) * 16


def check_resize_on(resize_on: str, resample: int) -> None:
    """Check the option `data.resize_on`.

    Raises:
      UserError: it is unknown, or the device does not have the filter
    """
    check_choice("data.resize_on", resize_on, RESIZE_ON)
    if resize_on == "device" and resample not in DEVICE_FILTERS:
        raise UserError(
            f"data.resize_on='device' does not support the resize filter {resample} of the "
            "checkpoint's preprocessor_config.json (nearest neighbor or box); set "
            "data.resize_on='host'"
        )
