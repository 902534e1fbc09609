"""The ledger's keys: if a key changes, its finished measurements run again."""

from __future__ import annotations

import pytest

from configs import glyphs
from studies.catalog import STUDIES
from studies.catalog.soup_search import soup
from studies.image_context import ImageContext
from studies.image_runs import ImageRuns
from studies.study import Setup

SETUP = Setup(seeds=(0, 1, 2, 3), epochs=8, steps_per_epoch=32, learning_rate=2e-3)


class Sized:
    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """Create a context with keys and without weights."""
    made = object.__new__(ImageContext)
    config = glyphs.get_config()
    made.config, made.checksum = config, "a fingerprint"
    made.runs = ImageRuns(config, tmp_path_factory.mktemp("none"), None, None, made.checksum, None)
    made._test, made._validation = Sized("test", 2000), Sized("validation", 1000)
    made._shifts = {name: Sized(name, 1000) for name in ("v2", "r")}
    return made


# A new option in configs/default.py changes all keys, unless its row in experiment/options.py
# leaves it out of a run's checksum.
KEYS = {
    ("fig2", "angles"): "5c2c34863b6034c7",
    ("fig3", ("line", 2, 0.75)): "00975626ec41bb7d",
    ("fig5", 5): "00148bec821e07dd",
    ("table1", ("shell", 2)): "4be3687e22c9c9c4",
    ("table2", ("greedy_soup", 0)): "559ed0629c44b981",
    ("table3", ("car_ft", 2)): "31236ad26f2e833a",
    ("table5", (4, 3)): "4496df17febf2237",
    ("table7", ("predicted", 2, 3)): "1363a66ec3cc9c00",
    ("units", ("head", 1)): "21d1a8a13ca8ce57",
    ("units", ("unclamped", "filter", 0)): "7d1e0b3ffbd1f915",
    ("carried", ("every", 2)): "19e9e917213aced1",
    ("unequal", (("weighted_model_stock", 4), 2)): "78f197b4b5580ebb",
    ("unequal", ("unequal", 1)): "1b6af3bed974aebf",
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_do_not_change(name, context):
    study, measurement = name
    assert context.key(STUDIES[study].measurements(SETUP)[measurement]) == KEYS[name]


def test_soups_of_stored_images_draw_randaugment_too():
    operations = []
    for seed in range(8):
        plain, stored = (
            dict(soup(SETUP._replace(stored_images=stored), seed, "cross_entropy")[0].run.options)
            for stored in (False, True)
        )
        operations += stored.pop("per_replica.randaugment_ops")
        magnitudes = stored.pop("per_replica.randaugment_magnitude")
        assert len(set(magnitudes)) > 1 and min(magnitudes) >= 1 and max(magnitudes) <= 20
        assert stored == plain, "all other options are equal"
    # Expected: 64, 24 and 8 of 96.
    zero, one, two = (operations.count(number) for number in range(3))
    assert zero + one + two == 96 and zero > one > two > 0
