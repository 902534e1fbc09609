"""The datasets of the synthetic benchmark: sizes, classes, and A as in its committed file."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from modelstock_jax.data.glyphs import make_sets, sets
from modelstock_jax.data.glyphs.render import CHARACTERS, PRETRAINING_FONTS
from modelstock_jax.errors import UserError
from studies import glyph_adversarial

SHIFTS = ["v2", "r", "sketch", "objectnet", "a", "digits"]


@pytest.fixture(scope="module")
def benchmark():
    return make_sets()


def test_sizes(benchmark):
    assert [len(benchmark.train), len(benchmark.validation), len(benchmark.test)] == [
        4096,
        2048,
        2000,
    ]
    assert list(benchmark.shifts) == SHIFTS
    assert [len(part) for part in benchmark.shifts.values()] == [2000] * 5 + [1797]
    for part in (benchmark.train, benchmark.validation, benchmark.test, *benchmark.shifts.values()):
        assert part.images.shape == (len(part), 24, 24, 3) and part.images.dtype == np.uint8
        assert part.labels.shape == (len(part),) and part.labels.dtype == np.int32


def test_classes(benchmark):
    everything = [benchmark.train, benchmark.validation, benchmark.test, *benchmark.shifts.values()]
    for part in everything[:-1]:
        assert part.classes is None and set(part.labels.tolist()) == set(range(62)), part.name
    assert [CHARACTERS[label] for label in benchmark.shifts["digits"].classes] == list("0123456789")
    assert set(benchmark.shifts["digits"].labels.tolist()) == set(range(52, 62))


def test_sets_share_no_image(benchmark):
    everything = [benchmark.train, benchmark.validation, benchmark.test, *benchmark.shifts.values()]
    images = [image.tobytes() for part in everything for image in part.images]
    assert len(set(images)) == len(images)


def test_names(benchmark):
    assert (benchmark.train.name, benchmark.validation.name, benchmark.test.name) == (
        "train",
        "validation",
        "id",
    )
    assert [part.name for part in benchmark.shifts.values()] == SHIFTS


def test_shifts_leave_the_fine_tuning_distribution(benchmark):
    def spread(part):  # Between the channels, with the noise averaged out.
        return np.ptp(part.images.astype(float).mean(axis=(1, 2)), axis=-1).mean()

    assert spread(benchmark.test) < 3 and spread(benchmark.shifts["r"]) > 30
    assert spread(benchmark.shifts["sketch"]) < 3
    dark = (benchmark.test.images.mean(axis=(1, 2, 3)) < 128).mean()
    assert dark == 0 and (benchmark.shifts["r"].images.mean(axis=(1, 2, 3)) < 128).mean() > 0.3
    assert len(sets.ID.fonts) == 8 and len(set(sets.ID.fonts) & set(PRETRAINING_FONTS)) == 4


def test_the_first_images_do_not_depend_on_the_size(benchmark):
    small = make_sets(train_size=3, validation_size=2, test_size=1, shift_size=4)
    np.testing.assert_array_equal(small.train.images, benchmark.train.images[:3])
    for name, part in small.shifts.items():
        np.testing.assert_array_equal(part.images, benchmark.shifts[name].images[:4])
        np.testing.assert_array_equal(part.labels, benchmark.shifts[name].labels[:4])


def test_seeds_change_all_images_except_a_and_digits(benchmark):
    other = make_sets(1, train_size=8, validation_size=1, test_size=1, shift_size=8)
    assert not np.array_equal(other.train.images, benchmark.train.images[:8])
    for name, part in other.shifts.items():
        same = np.array_equal(part.images, benchmark.shifts[name].images[:8])
        assert same == (name in ("a", "digits")), name


def test_adversarial_file_is_unchanged():
    # A checksum of the indices: a change of A would change every result in the tables.
    chosen = json.loads(sets.ADVERSARIAL_FILE.read_text())
    indices = np.array(chosen["indices"], "<i4")
    assert len(indices) == glyph_adversarial.SIZE == 2000
    assert chosen["pool_size"] == sets.POOL_SIZE
    assert (np.diff(indices) > 0).all() and 0 <= indices[0] and indices[-1] < sets.POOL_SIZE
    assert hashlib.sha256(indices.tobytes()).hexdigest()[:16] == "4b1194d6f808c8b4"


def test_pool_renders_as_it_did_when_a_was_selected(benchmark):
    chosen = json.loads(sets.ADVERSARIAL_FILE.read_text())
    means = benchmark.shifts["a"].images.astype(np.float64).mean(axis=(1, 2, 3))
    # Means are stored to 0.01; another CPU may round a few of 1,728 pixels differently.
    np.testing.assert_allclose(means, chosen["means"], atol=0.02)
    images, labels = sets.pool(np.array(chosen["indices"][10:13]))
    np.testing.assert_array_equal(images, benchmark.shifts["a"].images[10:13])
    np.testing.assert_array_equal(labels, benchmark.shifts["a"].labels[10:13])


def test_lookalikes_are_not_errors():
    pairs = dict.fromkeys(["O0", "lI", "cC", "aa", "xX"], False)
    pairs |= dict.fromkeys(["cO", "a4", "x2"], True)
    labels, predictions = (
        np.array([CHARACTERS.index(pair[side]) for pair in pairs]) for side in (0, 1)
    )
    assert glyph_adversarial.is_error(labels, predictions).tolist() == list(pairs.values())


@pytest.mark.slow  # Its compilation takes 20 s on a busy core.
def test_the_network_that_selects_a_learns():
    part = sets.training_set(size=256)
    params = glyph_adversarial.train(part, epochs=20)
    accuracy = (glyph_adversarial.predict(params, part.images) == part.labels).mean()
    assert accuracy > 0.3  # Chance is 0.016.


def test_digits_are_dark_ink_on_light_paper_and_upright(benchmark):
    part = benchmark.shifts["digits"]
    assert (part.images == part.images[..., :1]).all()
    assert (part.images[:, 0, 0].mean(axis=-1) > 200).mean() > 0.95
    zeros = part.images[part.labels == CHARACTERS.index("0"), ..., 0].mean(axis=0)
    ones = part.images[part.labels == CHARACTERS.index("1"), ..., 0].mean(axis=0)
    assert zeros[12, 12] > 200 and ones[12, 12] < 100  # The center of 0 is paper, that of 1 is ink.


@pytest.mark.parametrize("name", ["train_size", "validation_size", "test_size", "shift_size"])
def test_rejects_empty_datasets(name):
    with pytest.raises(UserError, match=f"{name} .*0"):
        make_sets(**{name: 0})


def test_rejects_negative_seeds():
    with pytest.raises(UserError, match="seed .*-1"):
        make_sets(-1)


def test_error_shows_how_to_quote_shifts():
    with pytest.raises(UserError, match=r"'v2,r'; .* \"\('v2','r'\)\"$"):
        make_sets(shifts=("v2,r",))
    with pytest.raises(UserError, match="'v3'; .* v2, r, .*, digits$"):
        make_sets(shifts=("v3",))
