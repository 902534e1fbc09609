"""Smaller copies of large images, still encoded."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from modelstock_jax.data.decode import Unreadable, decode, image_size
from modelstock_jax.errors import UserError

QUALITY = 95  # of JPEG


def shrink(
    encoded: bytes | np.ndarray, short_side: int, border: int = 0, name: str = "image"
) -> bytes | np.ndarray:
    """Cuts the border, then brings the short side down to `short_side` (bicubic, antialiased).

    An image that is small enough and has no border is returned as it is.

    Args:
      encoded: as a file holds it, or pixels uint8 [H, W, 3].
      short_side: pixels.
      border: pixels to cut from each side.
      name: of the image, for the message.

    Returns:
      The same, or an RGB JPEG of quality 95 without chroma subsampling.

    Raises:
      UserError: not an image, or a truncated one.
    """
    try:
        if not border and min(image_size(encoded)) <= short_side:
            return encoded
        image = Image.fromarray(decode(encoded))
    except Unreadable as error:
        raise UserError(f"{name}: not a whole image ({error}); replace or remove it") from error
    image = image.crop((border, border, image.width - border, image.height - border))
    scale = min(1.0, short_side / min(image.size))
    size = round(image.width * scale), round(image.height * scale)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
