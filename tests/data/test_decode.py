"""Decoding gives the same pixels as Pillow for all kinds of files."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pytest
from PIL import Image

from modelstock_jax.data import transforms as decode_module
from modelstock_jax.data.transforms import Unreadable, decode, image_size
from tests.data.photographs import encode, opened, photograph


@cache
def kinds() -> dict[str, bytes]:
    """Return the kinds of files that ImageNet names .JPEG, and others."""
    image = opened(photograph()).crop((100, 100, 281, 221))
    return {
        "photograph": photograph(),
        "420": encode(image, quality=90),
        "444": encode(image, quality=90, subsampling=0),
        "422": encode(image, quality=90, subsampling=1),
        "progressive": encode(image, progressive=True),
        "gray": encode(image.convert("L")),
        "cmyk": encode(image.convert("CMYK")),
        "png": encode(image, "PNG"),
        "palette": encode(image.quantize(16), "PNG"),
        "alpha": encode(image.convert("RGBA"), "PNG"),
        "webp": encode(image, "WEBP"),
    }


@pytest.mark.parametrize("kind", kinds())
def test_equals_pillow_bit_for_bit(kind):
    stored = kinds()[kind]
    pixels = decode(stored)
    assert pixels.dtype == np.uint8 and pixels.shape == (*image_size(stored), 3)
    np.testing.assert_array_equal(pixels, np.asarray(opened(stored)))


def test_jpegs_are_not_decoded_by_pillow(monkeypatch):
    def no_pillow(stored):
        raise AssertionError("slow")

    monkeypatch.setattr(decode_module, "_open", no_pillow)
    for kind in ("photograph", "progressive", "gray"):
        decode(kinds()[kind])
    with pytest.raises(AssertionError, match="slow"):
        decode(kinds()["cmyk"])


def test_exif_orientation_is_ignored_as_in_image_folder():
    image = opened(photograph())
    exif = image.getexif()
    exif[0x0112] = 6  # A quarter turn.
    turned = encode(image, exif=exif, quality=95)
    assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
    assert decode(turned).shape == (427, 640, 3)
    np.testing.assert_array_equal(decode(turned), np.asarray(opened(turned)))


def test_sixteen_bit_images_use_the_high_byte():
    gray = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    pixels = decode(encode(Image.fromarray(gray), "PNG"))
    np.testing.assert_array_equal(pixels[..., 1], gray // 256)


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_a_downscaled_jpeg_is_near_the_mean_of_its_pixels(shrink):
    pixels = decode(photograph(), shrink)
    assert pixels.shape == (-(-427 // shrink), -(-640 // shrink), 3)
    height, width = 427 // shrink * shrink, 640 // shrink * shrink
    full = np.asarray(opened(photograph()), float)[:height, :width]
    boxes = full.reshape(height // shrink, shrink, width // shrink, shrink, 3).mean((1, 3))
    difference = pixels[: height // shrink, : width // shrink] - boxes
    # The decoder keeps the low frequencies of a block, which is not exactly the mean: 3 gray levels
    # of 255 on average. A shift by one pixel of the result would give 10 and more.
    assert np.abs(difference).mean() < 3


def test_files_that_only_pillow_tolerates_are_decoded_like_pillow():
    damaged = bytearray(photograph())
    middle = len(damaged) // 2
    damaged[middle : middle + 40] = bytes(40)  # Broken codes: libjpeg warns and continues.
    np.testing.assert_array_equal(decode(bytes(damaged)), np.asarray(opened(bytes(damaged))))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (photograph()[:50_000], "truncated"),
        (photograph()[:100], "Truncated File Read|cannot identify"),
        (kinds()["png"][:20_000], "truncated"),
        (b"<html>404</html>", "format"),
        (b"", "empty"),
    ],
)
def test_rejects_incomplete_images(stored, message):
    with pytest.raises(Unreadable, match=message):
        decode(stored)


def test_pixels_are_returned_unchanged():
    pixels = np.zeros((3, 5, 3), np.uint8)
    assert decode(pixels, shrink=4) is pixels and image_size(pixels) == (3, 5)
