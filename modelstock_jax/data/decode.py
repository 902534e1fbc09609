"""Encoded images to pixels."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

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
    flaws that Pillow (and so torchvision's ImageFolder) puts up with. Grey becomes RGB. An
    orientation in EXIF is not applied, as in ImageFolder. Of 16-bit grey the high byte is kept,
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
            height, width, colours, _ = simplejpeg.decode_jpeg_header(stored)
            if colours not in _CMYK:
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
