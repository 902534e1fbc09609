"""Photographs (scikit-learn's samples, 640 x 427), and encoded images in memory."""

from __future__ import annotations

import io
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image

from modelstock_jax.data.image_set import EncodedImages, ImageSet


@cache
def photograph(name: str = "china") -> bytes:
    """Return 'china' or 'flower' as JPEG."""
    return (resources.files("sklearn.datasets.images") / f"{name}.jpg").read_bytes()


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def opened(stored: bytes) -> Image.Image:
    """Open an image as ImageFolder of torchvision does."""
    return Image.open(io.BytesIO(stored)).convert("RGB")


class InMemory(EncodedImages):
    """Encoded images in a list."""

    def __init__(self, stored: list[bytes]) -> None:
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, index: int) -> bytes:
        return self._stored[index]

    def name(self, index: int) -> str:
        return f"memory/{index}.JPEG"


def small_set(count: int, damaged: tuple[int, ...] = ()) -> ImageSet:
    """Return smooth JPEGs of several sizes, labeled by index; `damaged` ones are cut in half."""
    stored = []
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        size = (24 + 3 * (number % 5), 20 + 5 * (number % 3))
        jpeg = encode(coarse.resize(size, Image.Resampling.BICUBIC))
        stored.append(jpeg[: len(jpeg) // 2] if number in damaged else jpeg)
    return ImageSet("small", InMemory(stored), np.arange(count, dtype=np.int32))
