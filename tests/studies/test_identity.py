"""Keys of studies with equal options and different models or images."""

from __future__ import annotations

import numpy as np
import pytest

from configs import glyphs
from modelstock_jax.data.benchmark import Benchmark
from modelstock_jax.data.image_set import ImageSet
from studies.runs import identity


def benchmark(seed=0, names=("cat", "dog"), templates=("a {}.",), labels=(0, 1, 0)):
    rng = np.random.default_rng(seed)

    def images(name):
        pixels = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        return ImageSet(name, pixels, np.array(labels, np.int32))

    sets = [images(name) for name in ("train", "validation", "id")]
    return Benchmark(*sets, {"v2": images("v2")}, names, templates, lambda key, images: images)


def key(data, **options):
    config = glyphs.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in options.items()})
    return identity(config, "a checksum", data)


def test_by_default_the_identity_is_the_checksum_of_the_weights():
    assert key(benchmark(0)) == key(benchmark(1)) == "a checksum"


@pytest.mark.parametrize(
    "options",
    [
        {"objective__head": "random"},
        {"compute__dtype": "bfloat16"},
        {"data__templates": "prompts.txt"},
        {"data__class_names": "names.txt"},
        {"data__name": "folder"},
    ],
)
def test_other_options_change_the_key(options):
    assert key(benchmark(), **options) not in (
        "a checksum",
        key(benchmark(), compute__dtype="float16"),
    )


def test_files_are_identified_by_their_contents():
    files = {"data__templates": "prompts.txt", "data__class_names": "names.txt"}
    assert key(benchmark(), **files) == key(benchmark(1), **files)
    assert key(benchmark(), **files) != key(benchmark(templates=("the {}.",)), **files)
    assert key(benchmark(), **files) != key(benchmark(names=("cat", "cow")), **files)
    folder = {"data__name": "folder"}
    assert key(benchmark(), **folder) == key(benchmark(), **folder)
    assert key(benchmark(), **folder) != key(benchmark(1), **folder)
    assert key(benchmark(), **folder) != key(benchmark(labels=(1, 1, 0)), **folder)
