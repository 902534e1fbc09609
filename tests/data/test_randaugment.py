"""RandAugment: torchvision's operations, by Pillow and, bit for bit, on the device."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from modelstock_jax.data.device_randaugment import apply_operation
from modelstock_jax.data.randaugment import (
    MAX_MAGNITUDE,
    OPERATIONS,
    apply_operations,
    draw_operations,
    encode_operation,
)
from tests.data.photographs import opened, photograph
from tests.data.test_transforms import FixedRng

SMALL = opened(photograph()).resize((96, 64), Image.Resampling.BICUBIC)


def rand_augment(rng, image, operations, magnitude):
    return apply_operations(image, draw_operations(rng, operations, magnitude))


def affine(*matrix):
    return lambda: SMALL.transform(
        SMALL.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
    )


# torchvision's table at magnitude 20 of 30, computed by hand; both signs, positive first.
AT_20 = {
    "identity": [lambda: SMALL],
    "shear_x": [affine(1, 0.2, 0, 0, 1, 0), affine(1, -0.2, 0, 0, 1, 0)],
    "shear_y": [affine(1, 0, 0, 0.2, 1, 0), affine(1, 0, 0, -0.2, 1, 0)],
    "translate_x": [affine(1, 0, -29, 0, 1, 0), affine(1, 0, 29, 0, 1, 0)],  # 150/331 * 96 * 2/3
    "translate_y": [affine(1, 0, 0, 0, 1, -19), affine(1, 0, 0, 0, 1, 19)],
    "rotate": [lambda: SMALL.rotate(20), lambda: SMALL.rotate(-20)],
    "posterize": [lambda: ImageOps.posterize(SMALL, 5)],  # 8 - round(4 * 2/3)
    "solarize": [lambda: ImageOps.solarize(SMALL, 85)],  # 255 / 3
    "autocontrast": [lambda: ImageOps.autocontrast(SMALL)],
    "equalize": [lambda: ImageOps.equalize(SMALL)],
} | {
    kind.lower(): [lambda e=e: e(SMALL).enhance(1.6), lambda e=e: e(SMALL).enhance(0.4)]
    for kind, e in (
        ("Brightness", ImageEnhance.Brightness),
        ("Color", ImageEnhance.Color),
        ("Contrast", ImageEnhance.Contrast),
        ("Sharpness", ImageEnhance.Sharpness),
    )
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_pillow_at_torchvisions_strength(name):
    which = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
    for expected, sign in zip(AT_20[name], (0.7, 0.2), strict=False):
        result = rand_augment(FixedRng([which, sign]), SMALL, 1, 20)
        difference = np.asarray(result, int) - np.asarray(expected(), int)
        # The factors 1.6 and 0.4 are sums of floats: their last bit may change a pixel's rounding.
        assert np.abs(difference).max() <= (1 if OPERATIONS[name].strongest == 0.9 else 0)


def test_operations_are_applied_in_sequence_and_all_are_drawn():
    rows = [(0.5 + list(OPERATIONS).index(name)) / 14 for name in ("solarize", "posterize")]
    both = rand_augment(FixedRng([rows[0], 0], [rows[1], 0]), SMALL, 2, 20)
    expected = ImageOps.posterize(ImageOps.solarize(SMALL, 85), 5)
    assert both.tobytes() == expected.tobytes()
    rng = np.random.default_rng(0)
    results = {rand_augment(rng, SMALL, 1, 15).tobytes() for _ in range(300)}
    assert len(results) == len(AT_20) + 9  # Nine of the fourteen have two signs.


def test_magnitude_zero_changes_almost_nothing():
    unchanging = set(OPERATIONS) - {"solarize", "autocontrast", "equalize"}
    for name in unchanging:
        which = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
        assert rand_augment(FixedRng([which, 0]), SMALL, 1, 0).tobytes() == SMALL.tobytes()


SIDE = 48
RNG = np.random.default_rng(0)


def drawing() -> Image.Image:
    """Return few colors and large areas: a channel has one value, another only two."""
    image = Image.new("RGB", (SIDE, SIDE), (7, 200, 0))
    ImageDraw.Draw(image).rectangle((9, 5, 30, 40), fill=(7, 90, 255))
    return image


IMAGES = [
    opened(photograph()).resize((SIDE, SIDE)),
    opened(photograph("flower")).resize((SIDE, SIDE)),
    drawing(),
    Image.new("RGB", (SIDE, SIDE), (255, 0, 3)),
    *(
        Image.fromarray(RNG.integers(low, high, (SIDE, SIDE, 3), np.uint8))
        for low, high in ((0, 256), (40, 200), (100, 104), (0, 2))
    ),
]
PIXELS = np.stack([np.asarray(image) for image in IMAGES])
ON_DEVICE = jax.jit(jax.vmap(jax.vmap(apply_operation, (0, None)), (None, 0)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_device_returns_the_same_bits(name):
    """At every integer magnitude, with both signs."""
    operation = OPERATIONS[name]
    strengths = [operation.strongest * m / MAX_MAGNITUDE for m in range(MAX_MAGNITUDE + 1)]
    strengths += [-x for x in strengths] if operation.signed else []
    encoded = np.stack([encode_operation(name, x, SIDE) for x in strengths])
    expected = [
        [np.asarray(apply_operations(image, [(name, x)])) for image in IMAGES] for x in strengths
    ]
    np.testing.assert_array_equal(ON_DEVICE(PIXELS, encoded), np.array(expected))


@given(st.sampled_from([n for n in OPERATIONS if OPERATIONS[n].signed]), st.floats(-1, 1))
def test_the_device_returns_the_same_bits_at_any_strength(name, fraction):
    x = OPERATIONS[name].strongest * fraction
    encoded = encode_operation(name, x, SIDE)[None]
    expected = np.stack([np.asarray(apply_operations(image, [(name, x)])) for image in IMAGES])
    np.testing.assert_array_equal(ON_DEVICE(PIXELS, encoded)[0], expected)


def test_autocontrast_equals_pillow_for_every_range_of_values():
    """Also where float64 rounds an integer down."""
    lows, highs = np.triu_indices(256, 1)
    chosen = RNG.choice(len(lows), 400, replace=False)
    images = []
    for low, high in zip(lows[chosen], highs[chosen], strict=True):
        ramp = np.resize(np.arange(low, high + 1), (16, 16))
        images.append(np.stack([ramp, ramp[::-1], np.full_like(ramp, low)], -1).astype(np.uint8))
    apply = jax.jit(jax.vmap(apply_operation, (0, None)))
    result = apply(np.stack(images), encode_operation("autocontrast", 0.0, 16))
    expected = [np.asarray(ImageOps.autocontrast(Image.fromarray(image))) for image in images]
    np.testing.assert_array_equal(result, np.stack(expected))
