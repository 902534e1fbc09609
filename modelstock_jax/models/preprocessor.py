"""Preprocessing of images, as in transformers' preprocessor_config.json."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from modelstock_jax.data.resize import BICUBIC, BILINEAR, MAX_SIDE, RESAMPLES
from modelstock_jax.errors import UserError, check_choice
from modelstock_jax.tensor_files.reader import read_json

if TYPE_CHECKING:
    from modelstock_jax.data.transforms import EvalTransform

PREPROCESSOR_FILE, _NEWER_FILE = "preprocessor_config.json", "processor_config.json"
PREPROCESSOR_FILES = (PREPROCESSOR_FILE, _NEWER_FILE)
# Pixel statistics of CLIP's training images; used for formats without a preprocessor file.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_CLIP, _SIGLIP = "CLIPImageProcessor", "SiglipImageProcessor"
_VIT, _DEIT = "ViTImageProcessor", "DeiTImageProcessor"
_BIT, _CONVNEXT = "BitImageProcessor", "ConvNextImageProcessor"
_NAFLEX = "Siglip2ImageProcessor"
_CONVNEXT_WARP_SIZE = 384  # ConvNextImageProcessor crops nothing at this size and above.

_COMMON = {
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.5,) * 3,
    "image_std": (0.5,) * 3,
    "resample": BICUBIC,
    "default_to_square": True,  # whether an integer `size` is both sides, not the short side
}
_CLIP_DEFAULTS = {
    **_COMMON,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "size": 224,
    "do_center_crop": True,
    "crop_size": 224,
    "default_to_square": False,
}
# The values of the keys that a file omits, for each class of transformers 5.
_DEFAULTS: dict[str, dict[str, Any]] = {
    _CLIP: _CLIP_DEFAULTS,
    _SIGLIP: {**_COMMON, "size": {"height": 224, "width": 224}, "default_to_square": False},
    _VIT: {**_COMMON, "size": 224, "resample": BILINEAR},
    _DEIT: {**_COMMON, "size": 256, "do_center_crop": True, "crop_size": 224},
    _BIT: _CLIP_DEFAULTS,
    _CONVNEXT: {**_COMMON, "size": 384, "crop_pct": 224 / 256, "default_to_square": False},
}


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """Preprocessing of the image tower: resize, center crop, then (pixel / 255 - mean) / std.

    The input pipeline resizes and crops (`eval_transform`); the model's jitted function normalizes
    (`__call__`).

    Attributes:
      mean: per channel, of pixels in [0, 1]
      std: per channel
      image_size: side of the tower's square input, in pixels
      short_side: side in pixels to which the short side of an image is resized before the center
        crop; 0 means `image_size`; None resizes to a square regardless of the aspect ratio
      square_side: side of that square, which is then center-cropped to `image_size`; 0 means
        `image_size`, without a crop; only with `short_side=None`
      resample: Pillow's code of the resize filter, 0 to 5: 2 is bilinear, 3 bicubic
      image_processor_type: transformers' class for `to_dict`

    Raises:
      UserError: mean and std have different lengths, a value is not finite, a std is not positive,
        a side is out of range, or the filter or the class is unknown

    Example:
      >>> half = Preprocessor((0.5,) * 3, (0.5,) * 3, image_size=2)
      >>> float(half(jnp.full((1, 2, 2, 3), 255, jnp.uint8)).max())
      1.0
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    short_side: int | None = 0
    square_side: int = 0
    resample: int = BICUBIC
    image_processor_type: str = _CLIP

    def __post_init__(self) -> None:
        finite = all(math.isfinite(x) for x in (*self.mean, *self.std))
        if not finite or len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise UserError(
                f"mean {self.mean} and std {self.std} must be finite, of equal length, and std > 0"
            )
        for name in ("image_size", "short_side", "square_side"):
            side, smallest = getattr(self, name) or self.image_size, max(1, self.image_size)
            if not smallest <= side <= MAX_SIDE:
                raise UserError(f"{name} is {side}; it must be from {smallest} to {MAX_SIDE}")
        if self.square_side and self.short_side is not None:
            raise UserError(f"square_side {self.square_side} needs short_side=None")
        if isinstance(self.resample, bool | float) or self.resample not in RESAMPLES:
            raise UserError(f"resample is {self.resample!r}; use one of Pillow's codes, 0 to 5")
        check_choice("image_processor_type", self.image_processor_type, _DEFAULTS)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map uint8 images [..., H, W, C] to the tower's input, float32 of the same shape."""
        images = jnp.asarray(images)
        shape = (1,) * (images.ndim - 1) + (-1,)
        scale = jnp.asarray([1 / (255 * s) for s in self.std], jnp.float32).reshape(shape)
        offset = jnp.asarray(
            [m / s for m, s in zip(self.mean, self.std, strict=True)], jnp.float32
        ).reshape(shape)
        return images.astype(jnp.float32) * scale - offset

    @property
    def resizes_as_clip(self) -> bool:
        """Whether images are resized by their short side to the input size, bicubic, as CLIP's."""
        short_side = self.short_side
        return short_side in (0, self.image_size) and self.resample == BICUBIC

    def eval_transform(self, resize_on: str = "host") -> EvalTransform:
        """Return the resize and the center crop of a stored image.

        Args:
          resize_on: 'host' or 'device', see `EvalTransform`

        Example:
          >>> import numpy as np
          >>> dinov2 = Preprocessor((0.5,) * 3, (0.5,) * 3, 224, short_side=256)
          >>> dinov2.eval_transform()(np.zeros((300, 500, 3), np.uint8)).shape
          (224, 224, 3)
        """
        # The compiled functions of a step need no image libraries.
        from modelstock_jax.data.transforms import EvalTransform

        return EvalTransform(
            self.image_size,
            short_side=self.short_side,
            square_side=self.square_side,
            resample=self.resample,
            resize_on=resize_on,
        )

    def with_image_size(self, size: int) -> Preprocessor:
        """Return the same preprocessing for another input size: the same fraction is cropped.

        Args:
          size: new side of the tower's input in pixels

        Raises:
          UserError: `size` is not positive

        Example:
          >>> dinov2 = Preprocessor((0.5,) * 3, (0.5,) * 3, 224, short_side=256)
          >>> dinov2.with_image_size(518).short_side
          592
        """
        short, square = (
            round(side * size / self.image_size) if side else side
            for side in (self.short_side, self.square_side)
        )
        return dataclasses.replace(self, image_size=size, short_side=short, square_side=square)

    @classmethod
    def read(cls, directory: Path) -> Preprocessor:
        """Read `preprocessor_config.json` (or the newer `processor_config.json`).

        The result means what transformers' image processor of the named class does; absent keys
        get the defaults of the class. A file that names no class is read as that of the class
        whose keys it has.

        Args:
          directory: the checkpoint's

        Returns:
          The preprocessor

        Raises:
          UserError: no such file, another class, or steps that cannot be represented
        """
        path, newer = directory / PREPROCESSOR_FILE, directory / _NEWER_FILE
        raw: Any
        if not path.is_file() and newer.is_file():
            path, raw = newer, read_json(newer)
            raw = raw.get("image_processor") if isinstance(raw, dict) else None
        else:
            raw = read_json(path)
        try:
            if not isinstance(raw, dict):
                raise UserError("no dictionary of an image processor")
            kind = _class_name(raw)
            return cls(image_processor_type=kind, **_fields(kind, {**_DEFAULTS[kind], **raw}))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the `preprocessor_config.json` that transformers opens with the same result."""
        kind, sides = self._written_sides()
        return {
            "image_processor_type": kind,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": sides.pop("size"),
            "resample": self.resample,
            **sides,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    def _written_sides(self) -> tuple[str, dict[str, Any]]:
        """Return the class to write and its keys for the resize and the crop."""
        kind, size, square = self.image_processor_type, self.image_size, self.short_side is None
        side = self.short_side or self.square_side or size
        crops = side != size or not square
        if kind == _CONVNEXT:
            if size >= _CONVNEXT_WARP_SIZE and not crops:
                return kind, {"size": {"shortest_edge": size}}
            if size < _CONVNEXT_WARP_SIZE and not square:
                return kind, {"size": {"shortest_edge": size}, "crop_pct": _crop_pct(size, side)}
            # The class has no such steps at this size, after `with_image_size`. This one has.
            kind = _BIT
        sides: dict[str, Any] = {
            "size": {"height": side, "width": side} if square else {"shortest_edge": side},
            "do_center_crop": crops,
        }
        return kind, sides | ({"crop_size": {"height": size, "width": size}} if crops else {})


def _class_name(raw: dict[str, Any]) -> str:
    """Return the name of the image processor's class, without the suffix of an implementation."""
    name = raw.get("image_processor_type") or raw.get("feature_extractor_type")
    if not name:
        name = _class_by_keys(raw)
    kind = re.sub(r"(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "ImageProcessor", str(name))
    if kind == _NAFLEX:
        raise UserError(
            f"{name} (NaFlex) gives images of variable resolution, which are not supported; use a "
            "SigLIP 2 checkpoint of fixed resolution, such as google/siglip2-base-patch16-224"
        )
    check_choice("image_processor_type", kind, _DEFAULTS)
    return kind


def _class_by_keys(raw: dict[str, Any]) -> str:
    """Return the class that has the keys of a file without a class name."""
    if "max_num_patches" in raw:
        return _NAFLEX
    if absent := [key for key in ("image_mean", "image_std", "size") if raw.get(key) is None]:
        raise UserError(
            f"{', '.join(absent)} and image_processor_type are missing; add the type, or all of "
            "image_mean, image_std and size"
        )
    if "crop_pct" in raw:
        return _CONVNEXT
    size = raw["size"]
    short_side = isinstance(size, dict) and "shortest_edge" in size
    return _CLIP if short_side or raw.get("crop_size") else _VIT


def _fields(kind: str, steps: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `Preprocessor` from the complete keys of a file."""
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if steps[key] is not True:
            raise UserError(f"{key} is {steps[key]!r}; only true is supported")
    if steps.get("do_pad"):
        raise UserError("do_pad is set; padding is not supported")
    factor = steps["rescale_factor"]
    if not isinstance(factor, float | int) or not abs(factor * 255 - 1) <= 1e-6:
        raise UserError(f"rescale_factor is {factor!r}; only 1 / 255 is supported")
    try:
        mean, std = (tuple(float(x) for x in steps[k]) for k in ("image_mean", "image_std"))
    except (OverflowError, TypeError, ValueError):
        raise UserError("image_mean and image_std must be lists of numbers") from None
    return {"mean": mean, "std": std, "resample": steps["resample"], **_sides(kind, steps)}


def _sides(kind: str, steps: dict[str, Any]) -> dict[str, int | None]:
    """Return `image_size`, `short_side` and `square_side`."""
    side, square = _size(steps["size"], steps["default_to_square"])
    crop = None
    if steps["do_center_crop"]:
        crop, is_square = _size(steps.get("crop_size"), default_to_square=True, name="crop_size")
        if not is_square:
            raise UserError("crop_size must have the keys height and width")
    if kind == _CONVNEXT:
        if square or crop not in (None, side):
            raise UserError(
                f"{kind} needs size.shortest_edge, and as crop_size, if any, the same number"
            )
        crop, square = side, side >= _CONVNEXT_WARP_SIZE
        crop_pct = steps["crop_pct"]
        if crop_pct is None:  # transformers 4 wrote null for the default.
            crop_pct = _DEFAULTS[kind]["crop_pct"]
        side = side if square else _before_crop(side, crop_pct)
    if crop is None:
        if not square:
            raise UserError(
                "size has a short side, but do_center_crop is false: the images would not be "
                "square; set do_center_crop and crop_size, or size.height and size.width"
            )
        crop = side
    if crop > side:
        raise UserError(f"crop_size {crop} is larger than size {side}; padding is not supported")
    resized = 0 if side == crop else side
    if square:
        return {"image_size": crop, "short_side": None, "square_side": resized}
    return {"image_size": crop, "short_side": resized}


def _size(value: Any, default_to_square: bool, name: str = "size") -> tuple[int, bool]:
    """Return (side, whether it is both sides of a square) of one of the notations in use."""
    sides: list[Any] = [value]
    if isinstance(value, dict):
        default_to_square = "shortest_edge" not in value
        keys = ("height", "width") if default_to_square else ("shortest_edge",)
        sides = [value[key] for key in keys] if value.keys() == set(keys) else []
    if len(set(map(str, sides))) != 1 or type(sides[0]) is not int or sides[0] < 1:
        raise UserError(
            f"{name} is {value!r}; only a positive integer, shortest_edge, or equal height and "
            "width are supported"
        )
    return sides[0], bool(default_to_square)


def _before_crop(size: int, crop_pct: Any) -> int:
    """Return the short side that ConvNextImageProcessor crops to `size`."""
    number = isinstance(crop_pct, float | int)
    if not number or not size / MAX_SIDE <= crop_pct <= 1:
        raise UserError(
            f"crop_pct is {crop_pct!r}; size / crop_pct must be from {size} to {MAX_SIDE}"
        )
    return int(size / crop_pct)


def _crop_pct(size: int, short_side: int) -> float:
    """Return a fraction with `_before_crop(size, fraction) == short_side`.

    Example:
      >>> _crop_pct(224, 256)
      0.875
    """
    exact = size / short_side
    # Rounded up, the fraction would give the next smaller side.
    return exact if _before_crop(size, exact) == short_side else size / (short_side + 0.5)
