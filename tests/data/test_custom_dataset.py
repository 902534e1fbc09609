"""A user's image folders: labels, splits, class names and shifts."""

from __future__ import annotations

import numpy as np
import pytest

from configs import folder
from modelstock_jax.data.__main__ import main
from modelstock_jax.data.benchmark import load
from modelstock_jax.data.custom_dataset import open_sets
from modelstock_jax.errors import UserError
from tests.data.made_images import write_folders


def config(root, **changes):
    data = folder.get_config().data
    data.root = str(root)
    data.update(changes)
    return data


def test_folders_for_everything(tmp_path):
    write_folders(tmp_path / "train", ["fox", "cat", "big_dog"], 4)
    written = write_folders(tmp_path / "test", ["big_dog", "cat", "fox"], 2)
    write_folders(tmp_path / "val", ["big_dog", "cat", "fox"], 1)
    write_folders(tmp_path / "shifts" / "sketch", ["cat", "fox"], 2)
    write_folders(tmp_path / "shifts" / "night", ["big_dog", "cat", "fox"], 1)
    sets = open_sets(config(tmp_path))
    assert sets.class_names == ("big dog", "cat", "fox")
    assert sets.templates == ("a photo of a {}.",)
    assert sets.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (sets.validation.name, len(sets.validation)) == ("validation", 3)
    assert sets.test.name == "id" and list(sets.test.images) == written
    assert list(sets.shifts) == ["night", "sketch"]
    assert sets.shifts["sketch"].labels.tolist() == [1, 1, 2, 2]
    assert sets.shifts["sketch"].classes == (1, 2) and sets.shifts["night"].classes is None
    assert list(open_sets(config(tmp_path, shifts=("sketch",))).shifts) == ["sketch"]


@pytest.mark.parametrize("train", ["train", "."])
def test_fractions_are_held_out_without_folders(tmp_path, train):
    """With `train`, or with the class folders directly next to the shifts."""
    written = write_folders(tmp_path / train, ["cat", "dog"], 20)
    write_folders(tmp_path / "shifts" / "sketch", ["cat"], 1)
    sets = open_sets(config(tmp_path, validation_fraction=0.25, test_fraction=0.1))
    counts = [
        np.bincount(part.labels).tolist() for part in (sets.train, sets.validation, sets.test)
    ]
    assert counts == [[14, 14], [4, 4], [2, 2]]  # A quarter of the images left after the test set.
    parts = [list(part.images) for part in (sets.train, sets.validation, sets.test)]
    assert sorted(sum(parts, [])) == sorted(written)
    reopened = open_sets(config(tmp_path, validation_fraction=0.25, test_fraction=0.1))
    assert list(reopened.test.images) == parts[2]


def test_names_and_prompts_from_files(tmp_path):
    write_folders(tmp_path / "train", ["c1", "c2"], 4)
    (tmp_path / "names.txt").write_text("a cat\na dog\n")
    (tmp_path / "prompts.txt").write_text("a drawing of {}\n{} at night\n")
    files = {"class_names": "names.txt", "templates": "prompts.txt"}
    sets = load(config(tmp_path, **{key: str(tmp_path / file) for key, file in files.items()}))
    assert sets.class_names == ("a cat", "a dog")
    assert sets.templates == ("a drawing of {}", "{} at night")


def test_prepared_records_replace_folders(tmp_path):
    write_folders(tmp_path / "train", ["cat", "dog"], 6)
    write_folders(tmp_path / "shifts" / "sketch", ["dog"], 2)
    plain, out = open_sets(config(tmp_path)), tmp_path / "out"
    for path, split in (("train", "train"), ("shifts/sketch", "test")):
        parent = (out / path).parent
        main(
            ["prepare", str(tmp_path / path), f"--out={parent}", f"--split={split}", "--workers=1"]
        )
    records = open_sets(config(out))
    for expected, actual in zip(
        (plain.train, plain.validation, plain.test, *plain.shifts.values()),
        (records.train, records.validation, records.test, *records.shifts.values()),
        strict=True,
    ):
        assert list(expected.images) == list(actual.images) and expected.classes == actual.classes
        assert expected.labels.tolist() == actual.labels.tolist()


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match="data.root=.*nowhere: "):
        open_sets(config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="data.root .* --config.data.root=DIR"):
        open_sets(config(""))
    write_folders(tmp_path / "train", ["cat", "dog"], 3)
    write_folders(tmp_path / "shifts" / "sketch", ["cow"], 1)
    with pytest.raises(UserError, match="sketch: 'cow' .* 2 classes"):
        open_sets(config(tmp_path, test_fraction=0.4, validation_fraction=0.4))
    with pytest.raises(UserError, match="'cat' .*1 images, .* 1 .*validation"):
        open_sets(config(tmp_path, test_fraction=0.7))
    with pytest.raises(UserError, match="data.shifts: .*night; .*sketch"):
        open_sets(config(tmp_path, shifts=("night",), test_fraction=0.4, validation_fraction=0.4))
    data = config(tmp_path)
    data.paths.test = "elsewhere"
    with pytest.raises(UserError, match="data.paths.test=elsewhere: "):
        open_sets(data)
