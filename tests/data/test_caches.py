"""The cache of decoded images is complete, is written once, and matches its source."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest

from configs import default
from modelstock_jax.data import benchmark
from modelstock_jax.data import caches as cache_module
from modelstock_jax.data.caches import CachedImages, write_cache
from modelstock_jax.data.loader import LoaderOptions, eval_batches, train_batches
from modelstock_jax.data.transforms import (
    EvalTransform,
    TrainTransform,
    Unreadable,
    decode,
    resize_short_side,
)
from modelstock_jax.errors import UserError
from tests.data.made_images import write_folders
from tests.data.photographs import InMemory, encode, opened, photograph, small_set

SOURCE = InMemory([*small_set(9).images, photograph(), encode(opened(photograph("flower")))])


@pytest.fixture(autouse=True)
def _parts_of_four(monkeypatch):
    monkeypatch.setattr(cache_module, "_IMAGES_PER_PART", 4)


def test_contains_the_decoded_and_resized_images(tmp_path):
    cached = write_cache(SOURCE, tmp_path / "cache", short_side=128)
    assert len(cached) == 11
    for index in range(9):  # Smaller than 128 pixels: unchanged.
        np.testing.assert_array_equal(cached[index], decode(SOURCE[index]))
    for index in (9, 10):
        expected = np.asarray(resize_short_side(decode(SOURCE[index]), 128))
        assert expected.shape == (128, 191, 3)
        np.testing.assert_array_equal(cached[index], expected)
    cached.verify()
    copy = pickle.loads(pickle.dumps(CachedImages(tmp_path / "cache")))
    np.testing.assert_array_equal(copy[10], cached[10])
    np.testing.assert_array_equal(copy.select(np.array([10]))[0], cached[10])
    assert "image 3" in cached.name(3)


def test_batches_equal_those_of_the_source_without_a_resize(tmp_path):
    image_set = small_set(9)
    cached = dataclasses.replace(image_set, images=write_cache(image_set.images, tmp_path / "c"))
    options = {
        "batch_size": 4,
        "seed": 0,
        "num_replicas": 2,
        "transform": TrainTransform(16, (0.5, 1.0)),
    }
    for expected, actual in itertools.islice(
        zip(train_batches(image_set, **options), train_batches(cached, **options), strict=True), 3
    ):
        for name in expected:
            np.testing.assert_array_equal(actual[name], expected[name])
    for expected, actual in zip(
        eval_batches(image_set, 4, transform=EvalTransform(16)),
        eval_batches(cached, 4, transform=EvalTransform(16)),
        strict=True,
    ):
        np.testing.assert_array_equal(actual["image"], expected["image"])


def test_a_run_writes_its_cache_and_reuses_it(tmp_path, monkeypatch):
    write_folders(tmp_path / "own" / "train", ["cat", "dog"], each=4)
    write_folders(tmp_path / "own" / "test", ["cat", "dog"], each=1)
    config = default.get_config().data
    config.name, config.root, config.decoded_cache_dir = (
        "folder",
        str(tmp_path / "own"),
        str(tmp_path / "c"),
    )
    config.decoded_cache_short_side = 20
    first = benchmark.load(config).train
    config.decoded_cache_dir = ""
    plain = benchmark.load(config).train
    config.decoded_cache_dir = str(tmp_path / "c")
    assert isinstance(first.images, CachedImages) and len(first) == len(plain)
    monkeypatch.setattr(cache_module, "decode", None)
    reopened = benchmark.load(config).train
    for index in range(len(plain)):
        expected = np.asarray(resize_short_side(decode(plain.images[index]), 20))
        np.testing.assert_array_equal(reopened.images[index], expected)


def test_resumes_after_an_interruption(tmp_path, monkeypatch):
    decoded = []

    def slow(stored):
        if len(decoded) == 6:
            raise KeyboardInterrupt
        decoded.append(stored)
        return decode(stored)

    monkeypatch.setattr(cache_module, "decode", slow)
    with pytest.raises(KeyboardInterrupt):
        write_cache(SOURCE, tmp_path / "cache", threads=1)
    with pytest.raises(UserError, match="cache: 2 .*3 parts"):
        CachedImages(tmp_path / "cache")
    decoded[:] = [None] * 100
    cached = write_cache(SOURCE, tmp_path / "cache", threads=1)
    assert len(decoded) == 100 + 7  # The first part is not written again.
    np.testing.assert_array_equal(cached[0], decode(SOURCE[0]))
    np.testing.assert_array_equal(cached[8], decode(SOURCE[8]))
    assert not list((tmp_path / "cache").glob("*.tmp"))
    decoded[:] = [None] * 100
    write_cache(SOURCE, tmp_path / "cache")
    assert len(decoded) == 100


def test_rejects_another_source_or_size(tmp_path):
    write_cache(SOURCE, tmp_path / "cache")
    with pytest.raises(UserError, match="cache: .*short_side"):
        write_cache(SOURCE, tmp_path / "cache", short_side=128)
    with pytest.raises(UserError, match="cache: .*source"):
        write_cache(SOURCE.select(np.arange(11)[::-1]), tmp_path / "cache")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file.txt").write_text("not a cache")
    with pytest.raises(UserError, match="other: "):
        write_cache(SOURCE, tmp_path / "other")
    with pytest.raises(UserError, match="short_side .*0"):
        write_cache(SOURCE, tmp_path / "new", short_side=0)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="file.txt/cache: Not a directory"):
        write_cache(SOURCE, tmp_path / "other" / "file.txt" / "cache")


def test_damage_is_detected(tmp_path):
    cached = write_cache(SOURCE, tmp_path / "cache")
    pixels = tmp_path / "cache" / "part-00001.images"
    good = pixels.read_bytes()
    pixels.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(UserError, match=r"part-00001.images: image 4 .*npy"):
        cached.verify()
    pixels.write_bytes(good[:-1])
    with pytest.raises(UserError, match=f" {len(good)} bytes"):
        CachedImages(tmp_path / "cache")
    index = tmp_path / "cache" / "part-00001.npy"
    for damaged in (index.read_bytes()[:-1], b"", b"\x80\x04pickle"):
        index.write_bytes(damaged)
        with pytest.raises(UserError, match="part-00001.npy: damaged"):
            CachedImages(tmp_path / "cache")
    np.save(index, np.zeros(4))
    with pytest.raises(UserError, match="part-00001.npy: damaged"):
        CachedImages(tmp_path / "cache")
    index.unlink()
    write_cache(SOURCE, tmp_path / "cache").verify()
    file = tmp_path / "cache" / "cache.json"
    metadata = json.loads(file.read_text())
    for damaged in (metadata | {"format": 2}, metadata | {"count": "11"}, [metadata]):
        file.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="version"):
            CachedImages(tmp_path / "cache")
    with pytest.raises(UserError, match="cache.json"):
        CachedImages(tmp_path)


def test_an_unreadable_image_is_an_error_or_an_empty_entry(tmp_path):
    damaged = small_set(6, damaged=(4,))
    with pytest.raises(UserError, match="memory/4.JPEG: image 4 "):
        write_cache(damaged.images, tmp_path / "one")
    cached = write_cache(damaged.images, tmp_path / "two", unreadable="skip")
    cached.verify()
    with pytest.raises(Unreadable, match="cache"):
        cached[4]
    np.testing.assert_array_equal(cached[5], decode(damaged.images[5]))
    image_set = dataclasses.replace(damaged, images=cached)
    options = {"batch_size": 6, "seed": 0, "num_replicas": 1, "transform": TrainTransform(16)}
    with pytest.raises(UserError, match=r"image 4 .*\(.*cache.*unreadable"):
        next(train_batches(image_set, **options))
    batch = next(train_batches(image_set, loader=LoaderOptions(unreadable="skip"), **options))
    assert sorted(batch["label"][0].tolist()) == [0, 1, 2, 3, 5, 5]
