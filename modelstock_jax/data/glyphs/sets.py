"""The datasets of the synthetic benchmark: to fine-tune on, and with distribution shifts.

The domains were fixed before any accuracy was measured and are not tuned. Hyperparameters such as
learning rates are selected on the validation set only.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from modelstock_jax.data.glyphs.render import (
    ALL_FONTS,
    CHARACTERS,
    HELD_OUT_FONTS,
    IMAGE_SIZE,
    Domain,
    render,
)
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.errors import UserError

ID_FONTS = (*HELD_OUT_FONTS, "DejaVuSans", "DejaVuSerif", "cmr10", "STIXGeneralBol")

ID = Domain(
    fonts=ID_FONTS,
    rotation=6.0,
    scale=(0.9, 1.1),
    shear=0.05,
    shift=0.06,
    elastic=0.01,
    contrast=(0.25, 0.55),
    paper=(0.65, 0.9),
    blur=0.3,
    noise=0.2,
)
V2 = Domain(
    fonts=(*ID_FONTS, "DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneral", "cmti10"),
    rotation=10.0,
    scale=(0.82, 1.15),
    shear=0.1,
    shift=0.09,
    elastic=0.02,
    contrast=(0.22, 0.55),
    paper=(0.6, 0.95),
    blur=0.4,
    noise=0.22,
)
R = Domain(
    fonts=ALL_FONTS,
    rotation=15.0,
    scale=(0.8, 1.2),
    shear=0.1,
    shift=0.08,
    elastic=0.03,
    heavy_prob=0.25,
    light_prob=0.15,
    outline_prob=0.1,
    contrast=(0.35, 0.9),
    paper=(0.6, 1.0),
    color_prob=1.0,
    inversion_prob=0.5,
    texture_prob=0.7,
    blur=0.3,
    noise=0.06,
)
SKETCH = Domain(
    fonts=ALL_FONTS,
    rotation=12.0,
    scale=(0.85, 1.2),
    shear=0.1,
    shift=0.08,
    elastic=0.04,
    outline_prob=1.0,
    contrast=(0.6, 0.95),
    paper=(0.9, 1.0),
    blur=0.3,
    noise=0.03,
)
OBJECTNET = Domain(
    fonts=ALL_FONTS,
    rotation=40.0,
    scale=(0.7, 1.1),
    shear=0.2,
    perspective=0.25,
    shift=0.15,
    elastic=0.02,
    contrast=(0.4, 0.85),
    paper=(0.55, 1.0),
    color_prob=0.2,
    inversion_prob=0.2,
    texture_prob=0.2,
    clutter_prob=0.8,
    occlusion_prob=0.1,
    blur=0.4,
    noise=0.08,
)

TRAIN_SIZE = 4096
POOL_SIZE = 32_768
ADVERSARIAL_FILE = pathlib.Path(__file__).with_name("adversarial.json")

# The number of a dataset is part of its random key: never renumber.
_DRAWN = {"v2": (3, V2), "r": (4, R), "sketch": (5, SKETCH), "objectnet": (6, OBJECTNET)}
_POOL_NUMBERS = (7, 8)
SHIFTS = (*_DRAWN, "a", "digits")


class GlyphSets(NamedTuple):
    """The splits of the fine-tuning distribution, and the shifted test sets by name."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]


def make_sets(
    seed: int = 0,
    *,
    train_size: int = TRAIN_SIZE,
    validation_size: int = 2048,
    test_size: int = 2000,
    shift_size: int = 2000,
    shifts: Sequence[str] = SHIFTS,
) -> GlyphSets:
    """Render the synthetic benchmark: datasets to fine-tune on, and six shifted test sets.

    Args:
      seed: random seed; 'a' and 'digits' do not depend on it
      train_size: number of training images
      validation_size: number of images for selecting hyperparameters such as the learning rate
      test_size: number of images of the in-distribution test set
      shift_size: maximum number of images of each shifted test set (digits has 1,797, a 2,000)
      shifts: names of the shifted test sets to render

    Returns:
      `GlyphSets` with uint8 [M, 24, 24, 3] images, classes as in `CLASS_NAMES`, and the shifted
      test sets in the order of `shifts`. Image i of a dataset does not depend on the size of the
      dataset. The classes are interleaved, so that every prefix of a dataset is balanced.

    Raises:
      UserError: a size is below 1, the seed is negative, or a shift is unknown

    >>> small = make_sets(train_size=62, validation_size=1, test_size=1, shift_size=2)
    >>> len(small.train), sorted(small.shifts)
    (62, ['a', 'digits', 'objectnet', 'r', 'sketch', 'v2'])
    """
    sizes = {
        "train_size": train_size,
        "validation_size": validation_size,
        "test_size": test_size,
        "shift_size": shift_size,
    }
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} is {size}: it must be at least 1")
    if seed < 0:
        raise UserError(f"seed is {seed}: it must be at least 0")
    if unknown := [name for name in shifts if name not in SHIFTS]:
        hint = "; write more than one as \"('v2','r')\"" if "," in unknown[0] else ""
        raise UserError(f"shifts: no {unknown[0]!r}; choose from {', '.join(SHIFTS)}{hint}")
    return GlyphSets(
        train=training_set(seed, train_size),
        validation=_draw("validation", seed, 1, ID, validation_size),
        test=_draw("id", seed, 2, ID, test_size),
        shifts={name: _shift(name, seed, shift_size) for name in shifts},
    )


def _shift(name: str, seed: int, size: int) -> ImageSet:
    if name in _DRAWN:
        return _draw(name, seed, *_DRAWN[name], size)
    return {"a": adversarial_set, "digits": digits}[name]().first(size)


def training_set(seed: int = 0, size: int = TRAIN_SIZE) -> ImageSet:
    """Return only the training images of `make_sets`."""
    return _draw("train", seed, 0, ID, size)


def pool(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Render images of the pool that A is selected from: even ones from ID, odd ones from V2.

    Args:
      indices: int [M], from 0 to `POOL_SIZE` - 1

    Returns:
      uint8 [M, 24, 24, 3] and int32 [M], images and labels.
    """
    indices = np.asarray(indices)
    labels = (indices // 2 % len(CHARACTERS)).astype(np.int32)
    images = np.empty((len(indices), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for parity, (number, domain) in enumerate(zip(_POOL_NUMBERS, (ID, V2), strict=True)):
        rows = indices % 2 == parity
        images[rows], _ = render(_key(0, number), indices[rows], labels[rows], domain)
    return images, labels


def adversarial_set() -> ImageSet:
    """Render A: images of the pool that a convolutional network trained on ID misclassifies.

    `python -m studies.glyph_adversarial` writes the file with their indices.
    """
    indices = json.loads(ADVERSARIAL_FILE.read_text())["indices"]
    images, labels = pool(np.asarray(indices, np.int32))
    present = tuple(int(label) for label in np.unique(labels))
    return ImageSet("a", images, labels, None if len(present) == len(CHARACTERS) else present)


def digits() -> ImageSet:
    """Return scikit-learn's 1,797 scans of handwritten digits, scored among ten classes.

    They are dark on white.
    """
    from sklearn.datasets import load_digits  # The import takes a second.

    scans: Any = load_digits()
    ink = np.round(255 - scans.images * (255 / 16)).astype(np.uint8)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    bicubic = Image.Resampling.BICUBIC
    gray = np.stack([np.asarray(Image.fromarray(x).resize(size, bicubic)) for x in ink])
    first = CHARACTERS.index("0")
    labels = (scans.target + first).astype(np.int32)
    return ImageSet(
        "digits", np.repeat(gray[..., None], 3, axis=-1), labels, tuple(range(first, first + 10))
    )


def _draw(name: str, seed: int, number: int, domain: Domain, size: int) -> ImageSet:
    indices = np.arange(size)
    labels = (indices % len(CHARACTERS)).astype(np.int32)
    return ImageSet(name, render(_key(seed, number), indices, labels, domain)[0], labels)


def _key(seed: int, number: int) -> jax.Array:
    # An explicit generator: the user's default one must not change the datasets.
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
