"""Keys of studies whose options are alike and whose models or images are not."""

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
        drawn = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        return ImageSet(name, drawn, np.array(labels, np.int32))

    sets = [images(name) for name in ("train", "validation", "id")]
    return Benchmark(*sets, {"v2": images("v2")}, names, templates, lambda key, images: images)


def key(data, **options):
    config = glyphs.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in options.items()})
    return identity(config, "print", data)


def test_the_plain_case_is_the_weights_own_digest():
    assert key(benchmark(0)) == key(benchmark(1)) == "print"


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
def test_what_is_not_plain_has_a_key_of_its_own(options):
    assert key(benchmark(), **options) not in ("print", key(benchmark(), compute__dtype="float16"))


def test_files_are_known_by_what_they_hold():
    one = {"data__templates": "prompts.txt", "data__class_names": "names.txt"}
    assert key(benchmark(), **one) == key(benchmark(1), **one)
    assert key(benchmark(), **one) != key(benchmark(templates=("the {}.",)), **one)
    assert key(benchmark(), **one) != key(benchmark(names=("cat", "cow")), **one)
    own = {"data__name": "folder"}
    assert key(benchmark(), **own) == key(benchmark(), **own)
    assert key(benchmark(), **own) != key(benchmark(1), **own)
    assert key(benchmark(), **own) != key(benchmark(labels=(1, 1, 0)), **own)
