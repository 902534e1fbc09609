"""The resize on the device equals Pillow's, except for sums near a half, for every image."""

from __future__ import annotations

import dataclasses
import itertools

import chex
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageDraw

from modelstock_jax.data.caches import write_cache
from modelstock_jax.data.device_resize import make_resize, resize_batch
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.loader import LoaderOptions, eval_batches, train_batches
from modelstock_jax.data.randaugment import ENCODED, OPERATIONS, apply_operations
from modelstock_jax.data.resize import BICUBIC, BILINEAR, DEVICE_FILTERS, RESAMPLES
from modelstock_jax.data.transforms import EvalTransform, TrainTransform
from modelstock_jax.data.views import GEOMETRY, View, canvas_side, vertical_first
from modelstock_jax.errors import UserError
from tests.data.photographs import InMemory, encode, opened, photograph, small_set

DEVICES = np.array(jax.devices())
ONE = NamedSharding(Mesh(DEVICES[:1], ("data",)), PartitionSpec("data"))
EIGHT = NamedSharding(Mesh(DEVICES.reshape(2, 4), ("replica", "data")),
                      PartitionSpec("replica", "data"))  # fmt: skip
RNG = np.random.default_rng(0)


def text() -> np.ndarray:
    """Return black letters on white."""
    image = Image.new("RGB", (420, 300), "white")
    draw = ImageDraw.Draw(image)
    for line in range(20):
        draw.text((3, 15 * line), "Sphinx of black quartz, judge my vow. 0123456789", "black")
    return np.asarray(image)


def board(side: int) -> np.ndarray:
    """Return a checkerboard of single pixels: the bicubic filter overshoots most here."""
    return np.repeat(255 * (np.indices((side, side + 9)).sum(0) % 2)[..., None], 3, 2).astype("u1")


IMAGES = {
    "photograph": np.asarray(opened(photograph())),
    "flower": np.asarray(opened(photograph("flower")).resize((160, 240))),
    "gray": np.repeat(np.asarray(opened(photograph()).convert("L"))[..., None], 3, -1),
    "text": text(),
    "checkerboard": board(300),
    "noise": RNG.integers(0, 256, (260, 330, 3), np.uint8),
    "tiny": RNG.integers(0, 256, (5, 7, 3), np.uint8),
    "one pixel": RNG.integers(0, 256, (1, 1, 3), np.uint8),
    "panorama": RNG.integers(0, 256, (20, 500, 3), np.uint8),
    "tall": RNG.integers(0, 256, (600, 260, 3), np.uint8),
}
CANVAS = 640


def on_device(views: list[View], size: int, resample: int, canvas: int = CANVAS) -> np.ndarray:
    # What is in a canvas besides the view must not matter.
    arrays = {
        "image": RNG.integers(0, 256, (len(views), canvas, canvas, 3), np.uint8),
        "geometry": np.zeros((len(views), GEOMETRY), np.float32),
    }
    if count := max(len(view.operations) for view in views):
        arrays["operations"] = np.zeros((len(views), count, ENCODED), np.int32)
    for number, view in enumerate(views):
        view.store({name: array[number] for name, array in arrays.items()}, size)
    return np.asarray(make_resize(ONE, size, resample)(arrays))


def assert_within_one_level(result: np.ndarray, expected: np.ndarray) -> None:
    chex.assert_equal_shape([result, expected])
    assert result.dtype == expected.dtype == np.uint8
    assert np.abs(result.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", IMAGES)
def test_crops_equal_pillow(name, size):
    """Both areas of the configs, flipped and not; the center crops of evaluation."""
    image = IMAGES[name]
    for resample in DEVICE_FILTERS if size == 32 else [BICUBIC]:
        views, expected = [], []
        for area, seed in itertools.product([(0.9, 1.0), (0.08, 1.0)], (0, 4, 5)):
            transform = TrainTransform(size, area, flip=True, resample=resample)
            views.append(transform.view(image, np.random.default_rng(seed), CANVAS))
            expected.append(transform(image, np.random.default_rng(seed)))
        for options in ({}, {"short_side": size + 30}, {"short_side": None},
                        {"short_side": None, "square_side": size + 9}):  # fmt: skip
            evaluation = EvalTransform(size, resample=resample, **options)
            views.append(evaluation.view(image, None, CANVAS))
            expected.append(evaluation(image))
        assert {view.flip for view in views[:6]} == {True, False}
        assert_within_one_level(on_device(views, size, resample), np.stack(expected))


def test_most_pixels_equal_pillow():
    """Only values near a half are rounded to the other side."""
    transform = TrainTransform(224)
    image = IMAGES["photograph"]
    views = [transform.view(image, np.random.default_rng(seed), CANVAS) for seed in range(4)]
    expected = [transform(image, np.random.default_rng(seed)) for seed in range(4)]
    assert (on_device(views, 224, BICUBIC) != np.stack(expected)).mean() < 1e-4


def test_black_and_white_noise():
    """Many sums are exactly a half; where the first pass rounds one differently, 2 is possible."""
    image = RNG.integers(0, 2, (400, 500, 3), np.uint8) * 255
    transform = TrainTransform(224, (0.08, 1.0))
    views = [transform.view(image, np.random.default_rng(seed), CANVAS) for seed in range(8)]
    expected = np.stack([np.asarray(view.resize(224, BICUBIC)) for view in views])
    difference = np.abs(on_device(views, 224, BICUBIC).astype(int) - expected)
    assert difference.max() <= 2 and (difference > 1).mean() < 1e-5


@settings(max_examples=60)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    box=st.tuples(*[st.floats(0, 1)] * 4),
    flip=st.booleans(),
    resample=st.sampled_from(sorted(DEVICE_FILTERS)),
    seed=st.integers(0, 2**32 - 1),
)
@example(26, 26, (0.87109375, 0.1796875, 0.87109375, 0.1796875), False, BILINEAR, 26)  # one by 2
def test_any_box_equals_pillow(height, width, box, flip, resample, seed):
    """Boxes that start within a pixel, as after scaled decoding; enlarged and reduced.

    In eighths of a pixel, some sums are exactly a half, as in `test_black_and_white_noise`.
    """
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    # Multiples of 1/8 pixel, at least 1/8 high and wide.
    top, bottom = sorted(round(8 * height * x) / 8 for x in box[:2])
    left, right = sorted(round(8 * width * x) / 8 for x in box[2:])
    top, left = min(top, height - 0.125), min(left, width - 0.125)
    bottom, right = max(bottom, top + 0.125), max(right, left + 0.125)
    order = vertical_first(height, width, 16, 16)
    view = View(pixels, (top, left, bottom, right), order, flip)
    expected = np.asarray(view.resize(16, resample))
    difference = np.abs(on_device([view], 16, resample, 96)[0].astype(int) - expected)
    assert difference.max() <= 2 and (difference > 1).mean() < 0.01


def test_dithered_black_and_white():
    """Regular patterns have more such sums than noise has."""
    image = np.asarray(opened(photograph()).resize((400, 300)).convert("1").convert("RGB"))
    transform, square = TrainTransform(224, (0.08, 1.0)), EvalTransform(224, short_side=None)
    views = [transform.view(image, np.random.default_rng(seed), CANVAS) for seed in range(8)]
    expected = np.stack([np.asarray(view.resize(224, BICUBIC)) for view in views] + [square(image)])
    views.append(square.view(image, None, CANVAS))
    difference = np.abs(on_device(views, 224, BICUBIC).astype(int) - expected)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.05
    assert (difference > 1).mean((1, 2, 3)).max() < 1e-3


def test_a_crop_larger_than_a_canvas_is_resized_on_the_host():
    image = IMAGES["photograph"]
    for transform in (TrainTransform(32), EvalTransform(32)):
        view = transform.view(image, np.random.default_rng(0), 128)
        assert view.pixels.shape == (32, 32, 3)
        expected = transform(image, np.random.default_rng(0))
        np.testing.assert_array_equal(on_device([view], 32, BICUBIC)[0], expected)


def test_randaugment_is_applied_to_the_resized_image():
    transform = TrainTransform(32, flip=True, randaugment_ops=2, randaugment_magnitude=15)
    plain = dataclasses.replace(transform, randaugment_ops=0)
    image = IMAGES["flower"]
    views = [transform.view(image, np.random.default_rng(seed), CANVAS) for seed in range(40)]
    resized = on_device([view._replace(operations=()) for view in views], 32, BICUBIC)
    flipped = np.stack([plain(image, np.random.default_rng(seed)) for seed in range(40)])
    assert_within_one_level(resized, flipped)
    expected = [
        np.asarray(apply_operations(Image.fromarray(pixels), view.operations))
        for pixels, view in zip(resized, views, strict=True)
    ]
    assert len({name for view in views for name, _ in view.operations}) == len(OPERATIONS)
    np.testing.assert_array_equal(on_device(views, 32, BICUBIC), np.stack(expected))


def test_products_have_full_precision():
    """Else a GPU would round the weights to TF32."""
    shapes = {"image": jax.ShapeDtypeStruct((2, 64, 64, 3), np.uint8),
              "geometry": jax.ShapeDtypeStruct((2, GEOMETRY), np.float32)}  # fmt: skip
    lowered = make_resize(ONE, 32, BICUBIC).lower(shapes).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert len(products) >= 2 and all("HIGHEST" in line for line in products)


TRANSFORM = TrainTransform(16, (0.3, 1.0), flip=True)
LOADER = LoaderOptions(threads=1)


def batches(resize_on: str, sharding=EIGHT, steps: int = 7, **options):
    """Return {name: [steps, R, B, ...]} of the first batches, resized on eight devices."""
    transform = dataclasses.replace(TRANSFORM, resize_on=resize_on)
    defaults = {"image_set": small_set(23), "batch_size": 4, "seed": 0, "num_replicas": 2}
    defaults |= {"transform": transform, "loader": LOADER}
    stream = train_batches(**defaults | options)
    first = [
        resize_batch(jax.device_put(batch, sharding), sharding, 16, BICUBIC)
        for batch in itertools.islice(stream, steps)
    ]
    return {name: np.stack([batch[name] for batch in first]) for name in first[0]}


def test_batches_equal_those_of_the_host():
    host, device = batches("host"), batches("device")
    assert set(device) == {"image", "label"}
    np.testing.assert_array_equal(device["label"], host["label"])
    assert_within_one_level(device["image"], host["image"])


def test_batches_do_not_depend_on_threads_or_the_first_step():
    device = batches("device")
    chex.assert_trees_all_equal(batches("device", loader=LoaderOptions(threads=3)), device)
    resumed = batches("device", start_step=3, steps=4)
    chex.assert_trees_all_equal(resumed, {name: values[3:] for name, values in device.items()})


def test_another_mesh_changes_only_the_rounding():
    """Another order of a sum in float32 rounds a few values near a half to the other side."""
    one = NamedSharding(Mesh(DEVICES[:1].reshape(1, 1), ("replica", "data")), EIGHT.spec)
    eight, single = batches("device")["image"], batches("device", one)["image"]
    assert_within_one_level(eight, single)
    assert (eight != single).mean() < 1e-3


def test_a_batch_without_views_is_unchanged():
    batch = {"image": jax.numpy.zeros((2, 8, 8, 3), jax.numpy.uint8)}
    assert resize_batch(batch, ONE, 4, BICUBIC) is batch


def test_evaluation_masks_padding_and_unreadable_images():
    images = small_set(6, damaged=(2,))
    transform = EvalTransform(16, resize_on="device")
    loader = LoaderOptions(threads=1, unreadable="skip")
    stream = eval_batches(images, 4, transform=transform, loader=loader)
    expected = eval_batches(images, 4, transform=EvalTransform(16), loader=loader)
    for batch, host in zip(stream, expected, strict=True):
        np.testing.assert_array_equal(batch["mask"], host["mask"])
        result = resize_batch(jax.device_put(batch, ONE), ONE, 16, BICUBIC)["image"]
        assert_within_one_level(np.asarray(result), host["image"])
        assert not np.asarray(result)[~batch["mask"]].any()


def test_canvases_of_a_cache_are_as_large_as_its_crops(tmp_path):
    """Crops of at most 4:3 of images with a short side of 40 pixels."""
    stored = [encode(Image.new("RGB", size, "red")) for size in ((90, 40), (200, 40), (40, 40))]
    files = InMemory(stored)
    cached = write_cache(files, tmp_path / "cache", short_side=40)
    transform, sides = TrainTransform(16, resize_on="device"), []
    for images in (files, cached, cached.select(np.array([2]))):
        image_set = ImageSet("red", images, np.arange(len(images), dtype=np.int32))
        stream = train_batches(
            image_set, batch_size=1, seed=0, num_replicas=1, transform=transform, loader=LOADER
        )
        sides.append(next(stream)["image"].shape[2])
    # Unknown sizes; 40 * 4/3 = 53 pixels and 40 pixels, rounded up to a multiple of 16.
    assert sides == [canvas_side(16), 64, 48]
    assert canvas_side(16) == 96


def test_other_filters_are_an_error():
    for resample in set(RESAMPLES) - set(DEVICE_FILTERS):
        for transform in (TrainTransform, EvalTransform):
            with pytest.raises(UserError, match="data.resize_on"):
                transform(16, resample=resample, resize_on="device")
    with pytest.raises(UserError, match="data.resize_on"):
        TrainTransform(16, resize_on="gpu")
