"""Transforms: crops by torchvision's rule, Pillow's pixels, RandAugment's operations."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modelstock_jax.data.resize import BICUBIC, RESAMPLES
from modelstock_jax.data.transforms import (
    Crop,
    EvalTransform,
    TrainTransform,
    Unreadable,
    crop_view,
    largest_shrink,
    random_crop,
)
from modelstock_jax.errors import UserError
from tests.data.photographs import opened, photograph

RATIO = (3 / 4, 4 / 3)
PHOTOGRAPH = opened(photograph())
SMALL = PHOTOGRAPH.resize((96, 64), Image.Resampling.BICUBIC)


class FixedRng:
    """A generator that returns fixed numbers, one row per try of a crop."""

    def __init__(self, *rows):
        self._rows = rows

    def random(self, shape):
        return np.resize(np.array(self._rows, float), shape)


def by_torchvision(height, width, area, ratio, rows):
    """Apply the documented rule of RandomResizedCrop.get_params, one try after the other."""
    for a, r, top, left in rows:
        target = height * width * (area[0] + (area[1] - area[0]) * a)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * r)
        w, h = int(round(math.sqrt(target * aspect))), int(round(math.sqrt(target / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    if width / height < ratio[0]:
        w, h = width, int(round(width / ratio[0]))
    elif width / height > ratio[1]:
        w, h = int(round(height * ratio[1])), height
    else:
        w, h = width, height
    return Crop((height - h) // 2, (width - w) // 2, h, w)


@pytest.mark.parametrize("area", [(0.9, 1.0), (0.08, 1.0), (1.0, 1.0)])
def test_crops_follow_torchvisions_rule(area):
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(300):
        height, width = rng.integers(1, 700, 2).tolist()
        rows = rng.random((10, 4))
        crop = random_crop(FixedRng(*rows), height, width, area, RATIO)
        assert crop == by_torchvision(height, width, area, RATIO, rows)
        assert crop.top >= 0 and crop.top + crop.height <= height
        assert crop.left >= 0 and crop.left + crop.width <= width
        kinds.add(crop.height * crop.width < area[0] * height * width * 0.98)
    # Some images are too elongated for any such crop; the crop is then smaller than the min area.
    assert kinds == {True, False} or area[0] == 0.08


def test_crops_have_the_stated_areas_shapes_and_positions():
    rng = np.random.default_rng(1)
    crops = np.array([random_crop(rng, 400, 400, (0.08, 1.0), RATIO) for _ in range(4000)])
    top, left, height, width = crops.T
    areas, ratios = height * width / 400**2, width / height
    assert 0.078 < areas.min() < 0.09 and areas.max() > 0.95  # Sides are rounded to pixels.
    assert ratios.min() > 0.74 and ratios.max() < 1.35
    # Every crop below 3/4 of a square's area fits in it: these areas are equally likely. The
    # fraction below the middle, 0.415, has a standard deviation of 0.01.
    below = areas[areas < 0.75]
    assert abs((below < 0.415).mean() - 0.5) < 0.04
    free = (400 - height) > 50
    positions = top[free] / (400 - height[free])
    assert abs(positions.mean() - 0.5) < 0.03 and positions.min() < 0.02 and positions.max() > 0.98


@pytest.mark.parametrize("crop", [(0, 0, 427, 640), (11, 23, 301, 402), (100, 300, 60, 80)])
def test_a_resized_crop_equals_pillow(crop):
    crop = Crop(*crop)
    image = PHOTOGRAPH.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.NEAREST, Image.Resampling.LANCZOS):
        expected = image.resize((224, 224), resample)
        result = crop_view(np.asarray(PHOTOGRAPH), crop, 224).resize(224, resample)
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


def test_training_crops_have_the_stated_filter():
    """The same crop is resized by the checkpoint's filter; bicubic by default."""
    assert TrainTransform(64) == TrainTransform(64, resample=Image.Resampling.BICUBIC)
    results = {
        resample: TrainTransform(64, resample=resample)(
            np.asarray(PHOTOGRAPH), np.random.default_rng(0)
        )
        for resample in RESAMPLES
    }
    crop = random_crop(np.random.default_rng(0), *np.asarray(PHOTOGRAPH).shape[:2], (0.9, 1), RATIO)
    for resample, result in results.items():
        expected = crop_view(np.asarray(PHOTOGRAPH), crop, 64).resize(64, resample)
        np.testing.assert_array_equal(result, np.asarray(expected))
    assert len({result.tobytes() for result in results.values()}) == len(RESAMPLES)


def test_evaluation_resizes_then_crops_the_center():
    """The short side or, without the aspect ratio, both sides; by default CLIP's way."""
    pixels = np.asarray(PHOTOGRAPH)
    assert PHOTOGRAPH.size == (640, 427)
    short = PHOTOGRAPH.resize((int(40 * 640 / 427), 40), Image.Resampling.BOX)
    square = PHOTOGRAPH.resize((32, 32), Image.Resampling.BILINEAR)
    for transform, image, box in (
        (EvalTransform(32, short_side=40, resample=4), short, (13, 4, 45, 36)),
        (EvalTransform(32, short_side=None, resample=2), square, (0, 0, 32, 32)),
        (EvalTransform(20, short_side=None, square_side=32, resample=2), square, (6, 6, 26, 26)),
    ):
        np.testing.assert_array_equal(transform(pixels), np.asarray(image.crop(box)))
    np.testing.assert_array_equal(
        EvalTransform(32)(pixels), EvalTransform(32, short_side=32, resample=3)(pixels)
    )


def test_the_resize_is_antialiased():
    stripes = np.zeros((224 * 4, 224 * 4, 3), np.uint8)
    stripes[:, ::2] = 255
    result = np.asarray(crop_view(stripes, Crop(0, 0, 896, 896), 224).resize(224, BICUBIC))
    # Gray except for ringing at the border; without antialiasing, black and white.
    assert result.min() > 110 and result.max() < 146


def test_a_jpeg_is_downscaled_only_if_enough_pixels_remain():
    sides = (50, 399, 400, 799, 800, 1600)
    assert [largest_shrink(Crop(0, 0, side, 2000), 100) for side in sides] == [1, 1, 2, 2, 4, 8]


def test_a_downscaled_jpeg_gives_nearly_the_same_result():
    full, scaled = (TrainTransform(48, (0.9, 1.0), scaled_decode=s) for s in (False, True))
    for seed in range(5):
        expected, actual = (
            transform(photograph(), np.random.default_rng(seed)).astype(float)
            for transform in (full, scaled)
        )
        assert (expected != actual).any()
        # The two kinds of antialiasing differ by 0.7 gray levels on average. With the ratio of the
        # heights, 3.99, as the shrink factor, they would differ by 1.7.
        assert np.abs(expected - actual).mean() < 1


def test_evaluation_equals_the_clip_image_processor():
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        do_rescale=False,
        do_normalize=False,
    )
    for box in ((0, 0, 640, 427), (0, 0, 401, 427), (5, 5, 380, 400), (0, 0, 101, 300)):
        image = PHOTOGRAPH.crop(box)
        (expected,) = processor(images=image, return_tensors="np")["pixel_values"]
        result = EvalTransform(224)(np.asarray(image), None)
        np.testing.assert_array_equal(result, expected.transpose(1, 2, 0))


def test_a_border_is_cropped_first():
    pixels = np.asarray(PHOTOGRAPH)
    framed = np.pad(pixels, ((2, 2), (2, 2), (0, 0)), constant_values=255)
    result = EvalTransform(64, border=2)(framed, None)
    np.testing.assert_array_equal(result, EvalTransform(64)(pixels))
    with pytest.raises(Unreadable, match="4 x 9 .*border .*2"):
        EvalTransform(64, border=2)(np.zeros((4, 9, 3), np.uint8), None)


def test_a_flip_does_not_change_the_crop():
    transforms = [TrainTransform(32, flip=flip) for flip in (False, True)]
    flipped = 0
    for seed in range(40):
        plain, result = (t(photograph(), np.random.default_rng(seed)) for t in transforms)
        assert (result == plain).all() or (result == plain[:, ::-1]).all()
        flipped += not (result == plain).all()
    assert 10 < flipped < 30


def test_a_transform_depends_only_on_its_random_numbers():
    transform = TrainTransform(
        48, (0.08, 1.0), flip=True, randaugment_ops=2, randaugment_magnitude=15
    )
    first = transform(photograph(), np.random.default_rng(3))
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, transform(photograph(), np.random.default_rng(3)))
    assert not np.array_equal(first, transform(photograph(), np.random.default_rng(4)))


def test_transform_of_a_config():
    config = ConfigDict(
        {
            "crop_area": (0.08, 1.0),
            "crop_ratio": (0.5, 2.0),
            "flip": True,
            "randaugment_ops": 2,
            "randaugment_magnitude": 10,
            "mixup": 0.4,
        }
    )
    expected = TrainTransform(224, (0.08, 1.0), (0.5, 2.0), True, 2, 10)
    assert TrainTransform.of(config, 224) == expected
    bilinear = dataclasses.replace(expected, resample=2)
    assert TrainTransform.of(config, 224, resample=2) == bilinear


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_area": (0.0, 1.0)}, r"crop_area .*\(0.0, 1.0\)"),
        ({"crop_area": (0.5, 1.1)}, r"crop_area .*\(0.5, 1.1\)"),
        ({"crop_ratio": (2.0, 0.5)}, r"crop_ratio .*\(2.0, 0.5\)"),
        ({"randaugment_ops": -1}, "randaugment_ops .*-1"),
        ({"randaugment_magnitude": 31}, "randaugment_magnitude .*0 and 30"),
    ],
)
def test_transform_rejects(change, message):
    with pytest.raises(UserError, match=message):
        TrainTransform(224, **change)


@pytest.mark.parametrize("shape", [(1, 60_000, 3), (60_000, 1, 3)])
def test_an_extremely_elongated_image_does_not_fill_the_memory(shape):
    """Its file has 200 bytes; with a short side of 224 pixels it would have 3 billion pixels."""
    with pytest.raises(Unreadable, match="60000 .*pixels"):
        EvalTransform(224)(np.zeros(shape, np.uint8), np.random.default_rng(0))
