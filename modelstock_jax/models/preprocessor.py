"""Preprocessing of a model's images, as in preprocessor_config.json."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_json

PREPROCESSOR_FILE = "preprocessor_config.json"
# Pixel statistics of CLIP's training images; used for formats without a preprocessor file.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BICUBIC = 3  # Pillow's code


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """Preprocessing of the image tower: (pixel / 255 - mean) / std, per channel.

    Attributes:
      mean: per channel, of pixels in [0, 1]
      std: per channel
      image_size: side of the square image, in pixels

    Raises:
      UserError: mean and std have different lengths, a value is not finite, or a std is not
        positive

    Example:
      >>> half = Preprocessor((0.5,) * 3, (0.5,) * 3, image_size=2)
      >>> float(half(jnp.full((1, 2, 2, 3), 255, jnp.uint8)).max())
      1.0
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int

    def __post_init__(self) -> None:
        finite = all(math.isfinite(x) for x in (*self.mean, *self.std))
        if not finite or len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise UserError(
                f"mean {self.mean} and std {self.std} must be finite, of equal length, and std > 0"
            )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map uint8 images [..., H, W, C] to the tower's input, float32 of the same shape."""
        images = jnp.asarray(images)
        shape = (1,) * (images.ndim - 1) + (-1,)
        scale = jnp.asarray([1 / (255 * s) for s in self.std], jnp.float32).reshape(shape)
        offset = jnp.asarray(
            [m / s for m, s in zip(self.mean, self.std, strict=True)], jnp.float32
        ).reshape(shape)
        return images.astype(jnp.float32) * scale - offset

    @classmethod
    def read(cls, directory: Path) -> Preprocessor:
        """Read `preprocessor_config.json` (or the newer `processor_config.json`).

        Args:
          directory: the checkpoint's

        Returns:
          The preprocessor

        Raises:
          UserError: no such file, or other steps than CLIP's
        """
        path, newer = directory / PREPROCESSOR_FILE, directory / "processor_config.json"
        raw: Any
        if not path.is_file() and newer.is_file():
            path, raw = newer, read_json(newer)
            raw = raw.get("image_processor") if isinstance(raw, dict) else None
        else:
            raw = read_json(path)
        try:
            size = _side(raw.get("crop_size") or raw["size"])
            mean = tuple(float(x) for x in raw["image_mean"])
            std = tuple(float(x) for x in raw["image_std"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise UserError(
                f"{path}: image_mean, image_std and size or crop_size are required"
            ) from None
        factor = raw.get("rescale_factor", 1 / 255)
        by_255 = isinstance(factor, float | int) and abs(factor * 255 - 1) <= 1e-6
        if not by_255 or False in (raw.get("do_normalize", True), raw.get("do_rescale", True)):
            raise UserError(f"{path}: only rescaling by 1 / 255 with normalization is supported")
        if raw.get("resample", _BICUBIC) != _BICUBIC:
            raise UserError(
                f"{path}: resample is {raw['resample']!r}; only {_BICUBIC} (bicubic) is supported"
            )
        try:
            return cls(mean, std, size)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the `preprocessor_config.json` that transformers' image processor opens."""
        size = self.image_size
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "resample": _BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def _side(size: Any) -> int:
    """Return the side of a square from an integer or one of the dictionaries in use."""
    if isinstance(size, dict):
        sides = {size[key] for key in ("height", "width", "shortest_edge") if key in size}
        if len(sides) != 1:
            raise ValueError(size)
        size = sides.pop()
    return int(size)
