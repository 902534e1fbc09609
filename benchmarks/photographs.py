"""Synthetic photographs: JPEGs whose decoding takes as long as that of real photographs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def photograph(seed: int, height: int = 375, width: int = 500) -> bytes:
    """Return a JPEG of smooth noise with the spectrum of photographs, edges, and sensor noise."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        shape = (cells * height // 512 + 2, cells * width // 512 + 2)
        for channel in range(3):
            coarse = Image.fromarray(rng.normal(size=shape).astype(np.float32))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
            pixels[..., channel] += 180 / cells**0.75 * smooth
    rows, columns = np.mgrid[:height, :width]
    for _ in range(20):  # Translucent bars at random angles.
        angle, center = rng.uniform(0, np.pi), rng.uniform(0, 1, 2) * (width, height)
        distance = np.cos(angle) * (columns - center[0]) + np.sin(angle) * (rows - center[1])
        bar = np.abs(distance) < rng.uniform(2, 30)
        pixels[bar] = (pixels[bar] + rng.uniform(0, 255, 3)) / 2
    pixels += rng.normal(size=(height, width, 1)) * 20
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
