"""Smaller copies of large images, still encoded."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from modelstock_jax.errors import UserError

QUALITY = 95  # of JPEG


def shrink(encoded: bytes, short_side: int, border: int = 0, name: str = "image") -> bytes:
    """Cuts the border, then brings the short side down to `short_side` (bicubic, antialiased).

    An image that is small enough and has no border is returned as it is.

    Args:
      encoded: a JPEG, PNG or whatever Pillow reads.
      short_side: pixels.
      border: pixels to cut from each side.
      name: of the image, for the message.

    Returns:
      The same bytes, or an RGB JPEG of quality 95 without chroma subsampling.

    Raises:
      UserError: not an image, or a truncated one.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            width, height = image.size
            if min(width, height) - 2 * border <= short_side and not border:
                return encoded
            image = image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{name}: not a whole image ({error}); replace or remove it") from error
    image = image.crop((border, border, width - border, height - border))
    scale = min(1.0, short_side / min(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
