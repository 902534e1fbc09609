"""What the model sees of a stored image: for training, at random; for evaluation, the centre."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from modelstock_jax.data.crops import central, largest_shrink, random_crop, resized_crop
from modelstock_jax.data.decode import Unreadable, decode, image_size
from modelstock_jax.data.rand_augment import MAX_MAGNITUDE, rand_augment
from modelstock_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainView:
    """A random resized crop, and what else is asked for, in the order of the attributes.

    Attributes:
      size: side of the result, pixels.
      crop_area: least and largest share of the image's area.
      crop_ratio: least and largest width / height.
      flip: left and right, half of the times.
      randaugment_ops: RandAugment's N; 0 turns it off.
      randaugment_magnitude: RandAugment's M, 0 to 30.
      scaled_decode: lets the JPEG decoder shrink an image of which much more is stored than the
        result needs (`crops.largest_shrink`). Faster, but not Pillow's numbers to the bit.

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
    def of(cls, config: ConfigDict, size: int) -> TrainView:
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
class EvalView:
    """The centre of the image, its short side brought to the model's size.

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
