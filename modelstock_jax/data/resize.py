"""Pillow's resize filters and largest images, for modules that do not need Pillow itself."""

from __future__ import annotations

import math

# Codes of the filters in every supported Pillow; 0, nearest neighbor, has no antialiasing.
RESAMPLES = range(6)
LANCZOS, BILINEAR, BICUBIC, HAMMING = 1, 2, 3, 5
# The filters of `device_resize` and their supports: the pixels of the result over which a filter
# extends to each side. Nearest neighbor and the box filter are discontinuous, so that the rounding
# of a position would change a pixel.
DEVICE_FILTERS = {LANCZOS: 3.0, BILINEAR: 1.0, BICUBIC: 2.0, HAMMING: 1.0}
MAX_PIXELS = 178_956_970  # Pillow rejects larger images as decompression bombs.
MAX_SIDE = math.isqrt(MAX_PIXELS)  # of a square image
