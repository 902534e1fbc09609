"""Pillow's resize filters and largest images, for modules that do not need Pillow itself."""

from __future__ import annotations

import math

# Codes of the filters in every supported Pillow; 0, nearest neighbor, has no antialiasing.
RESAMPLES = range(6)
BILINEAR, BICUBIC = 2, 3
MAX_PIXELS = 178_956_970  # Pillow rejects larger images as decompression bombs.
MAX_SIDE = math.isqrt(MAX_PIXELS)  # of a square image
