"""Image-text pairs of the broad world, for pretraining a small CLIP."""

from __future__ import annotations

import jax
import numpy as np

from modelstock_jax.data.glyphs.captions import captions
from modelstock_jax.data.glyphs.domain import BROAD
from modelstock_jax.data.glyphs.masks import CHARACTERS
from modelstock_jax.data.glyphs.render import render
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.errors import UserError

# Keep these draws apart from those of the sets.
_STREAM = 1
_LABELLED = 101


def pretraining_batch(seed: int, n: int) -> tuple[np.ndarray, list[str]]:
    """A batch of image-text pairs of the broad world; no held-out font is in it.

    Args:
      seed: any int >= 0; the same seed gives the same batch in every process.
      n: number of pairs; multiples of 512 waste nothing.

    Returns:
      uint8 [n, 24, 24, 3], and n captions.

    Raises:
      UserError: n < 1 or seed < 0.

    >>> images, texts = pretraining_batch(0, 2)
    >>> images.shape, len(texts)
    ((2, 24, 24, 3), 2)
    """
    if n < 1 or seed < 0:
        raise UserError(f"pretraining_batch takes a seed >= 0 and n >= 1; not {seed} and {n}")
    rng = np.random.default_rng([_STREAM, seed])
    labels = rng.integers(len(CHARACTERS), size=n)
    key = jax.random.key(int(rng.integers(2**31)), impl="threefry2x32")
    images, scenes = render(key, np.arange(n), labels, BROAD)
    return images, captions(rng, scenes)


def broad_set(size: int) -> ImageSet:
    """Labelled images of the broad world, for towers that are pretrained without text.

    >>> broad_set(3).images.shape
    (3, 24, 24, 3)
    """
    labels = (np.arange(size) % len(CHARACTERS)).astype(np.int32)
    key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), _LABELLED)
    return ImageSet("broad", render(key, np.arange(size), labels, BROAD)[0], labels)

