"""ImageNet and its shifts as their authors distribute them, with a few classes and images each."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import imagenet
from modelstock_jax.data import benchmark
from modelstock_jax.data.imagenet import (
    CLASS_NAMES,
    CLASSES,
    TEMPLATES,
    WNIDS,
    check_complete,
    find_paths,
    missing_sets,
    open_real,
    open_set,
    open_sets,
)
from modelstock_jax.data.published_sets import IMAGENET
from modelstock_jax.errors import UserError
from tests.data.made_images import encoded, write_folders, write_imagenet, write_mappings

LABELS, EACH = (0, 2, 10, 207), 3
V2 = "imagenetv2-matched-frequency-format-val"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("data"), LABELS, EACH)


def config(root, **changes):
    options = dict(
        root=str(root),
        shifts=(),
        real_labels=True,
        paths={},
        check_counts=False,
        held_out_per_class=1,
    )
    return ConfigDict(options | changes)


def test_every_dataset(root):
    sets = open_sets(config(root))
    several = [label for label in LABELS for _ in range(EACH)]
    assert sets.train.labels.tolist() == [k for k in LABELS for _ in range(2 * EACH - 1)]
    assert sets.validation.labels.tolist() == list(LABELS) and sets.validation.name == "validation"
    assert sets.test.name == "id" and sets.test.labels.tolist() == several
    assert list(sets.shifts) == ["v2", "r", "sketch", "objectnet", "a"]
    for name in ("v2", "sketch"):
        assert sets.shifts[name].labels.tolist() == several and sets.shifts[name].classes is None
    for name, classes in CLASSES.items():
        assert sets.shifts[name].classes == classes and len(classes) == 200
        assert np.unique(sets.shifts[name].labels).tolist() == list(classes[: len(LABELS)])
    assert all(
        s.crop_border == (2 if name == "objectnet" else 0) for name, s in sets.shifts.items()
    )


def test_v2_folders_are_sorted_as_numbers(root):
    """As text, 10 is before 2: labels by the position of a folder would be wrong."""
    v2 = open_set("v2", root / V2, check_counts=False)
    assert v2.labels.tolist() == [label for label in LABELS for _ in range(EACH)]
    files = [root / V2 / str(label) / f"{label}_{n}.jpeg" for label in LABELS for n in range(EACH)]
    assert [v2.images.name(i) for i in range(len(v2))] == [str(file) for file in files]
    assert list(v2.images) == [file.read_bytes() for file in files]


def test_the_flat_validation_folder_is_the_same_dataset(tmp_path):
    """ILSVRC2012_val_*.JPEG in one folder, as in the archive: the file numbers give the labels."""
    wnids = {1: "n01751748", 2: "n09193705", 3: "n02105855", 50_000: "n02437616"}
    for number, wnid in wnids.items():
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        for folder in (tmp_path / "flat", tmp_path / "folders" / wnid):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(encoded(number))
    flat, folders = (
        open_set("validation", tmp_path / name, check_counts=False) for name in ("flat", "folders")
    )
    assert (
        flat.labels.tolist() == folders.labels.tolist() == sorted(map(WNIDS.index, wnids.values()))
    )
    assert list(flat.images) == list(folders.images)


@pytest.mark.parametrize("name", ["cat.JPEG", "ILSVRC2012_val_00000000.JPEG",
                                  "ILSVRC2012_val_00050001.JPEG"])  # fmt: skip
def test_error_names_a_foreign_file_in_the_flat_folder(tmp_path, name):
    for file in ("ILSVRC2012_val_00000001.JPEG", name):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}: .*validation"):
        open_set("validation", tmp_path, check_counts=False)


def test_objectnet_has_groups_and_only_its_shared_folders(root, tmp_path):
    objectnet = open_set("objectnet", root / "objectnet-1.0", check_counts=False)
    folders = ["alarm_clock", "bench", "t-shirt"]
    classes = write_mappings(tmp_path / "mappings", folders)
    assert objectnet.groups == tuple(classes.values()) and len(classes) == 113
    assert objectnet.labels.tolist() == [list(classes).index(f) for f in folders for _ in range(3)]
    assert "air_freshener" not in "".join(map(objectnet.images.name, range(len(objectnet))))


def test_real_labels_are_assigned_by_the_file_number(root):
    real = open_sets(config(root)).real_labels
    sets = [[(), (label,), (label, 0)] for label in LABELS]
    assert real.label_sets == tuple(sum(sets, []))
    test = open_set("validation", root / "val", check_counts=False).select(np.array([7, 1]))
    assert open_real(root / "real.json", test).label_sets == ((10,), (0,))
    sketch = open_set("sketch", root / "sketch", check_counts=False)
    with pytest.raises(UserError, match="n01440764_0.JPEG: .*real.json .*data.real_labels"):
        open_real(root / "real.json", sketch)


def test_paths(root, tmp_path):
    paths = find_paths(config(root, shifts=("a", "v2"), real_labels=False))
    assert paths == {
        "train": root / "train",
        "validation": root / "val",
        "a": root / "imagenet-a",
        "v2": root / V2,
    }
    elsewhere = config(
        root, shifts=("a",), real_labels=False, paths={"a": str(tmp_path), "train": "val"}
    )
    assert find_paths(elsewhere)["a"] == tmp_path and find_paths(elsewhere)["train"] == root / "val"
    assert missing_sets(elsewhere) == []

    empty = config(tmp_path, shifts=("a",), paths={"validation": "nothing"})
    train, validation, a, real = missing_sets(empty)
    assert "train or imagenet/train or" in train and "--config.data.paths.train" in train
    assert validation.startswith("data.paths.validation=nothing: ")
    assert "imagenet-a" in a and "data.shifts" in a
    assert "real.json" in real and "data.real_labels=False" in real
    with pytest.raises(UserError, match="train or .*; data.paths.validation=nothing"):
        open_sets(empty)
    with pytest.raises(UserError, match="'b'; .*v2, r, sketch"):
        find_paths(config(root, shifts=("b",)))


def test_rejects_an_unknown_class_without_count_checks_too(tmp_path):
    for name, folders, message in (
        ("sketch", ["n01440764", "n99999999"], "1,000 classes: n99999999"),
        ("v2", ["0", "1000"], "class 1000 .* 0 .*999"),
        ("a", ["n01440764"], "label 0 .*200 classes"),
    ):
        write_folders(tmp_path / name, folders, 1)
        with pytest.raises(UserError, match=message):
            open_set(name, tmp_path / name, check_counts=False)


def test_error_names_a_wrong_mapping(root, tmp_path):
    shutil.copytree(root / "objectnet-1.0", tmp_path / "objectnet")
    file = tmp_path / "objectnet" / "mappings" / "objectnet_to_imagenet_1k.json"
    file.write_text(json.dumps({"Bench": "no such class"}))
    with pytest.raises(UserError, match="objectnet_to_imagenet_1k.json: 'Bench': 'no such class'"):
        open_set("objectnet", tmp_path / "objectnet")
    shutil.rmtree(tmp_path / "objectnet" / "mappings")
    with pytest.raises(UserError, match="mappings/imagenet_to_label_2012_v2: "):
        open_set("objectnet", tmp_path / "objectnet")


def test_an_incomplete_dataset_is_one_line(root):
    with pytest.raises(UserError) as caught:
        open_set("v2", root / V2)
    for text in (
        f"{root / V2}: ",
        "1,000 classes (n01443537, n01491361, n01494475, n01496331, n01498041 and 991 more",
        " 10,000, 9,988 ",
        "(n01440764, n01484850, n01530575, n02099601 ",
        "--config.data.check_counts=False",
    ):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def published_labels(name):
    """Return labels with the published counts, and the classes."""
    published = IMAGENET[name].published
    classes = CLASSES.get(name, range(published.classes))
    return np.resize(np.array(classes, np.int32), published.images), list(classes)


@pytest.mark.parametrize("name", sorted(set(IMAGENET) - {"real"}))
def test_published_counts(name):
    """A complete dataset, one with an extra image, and one with an image of a wrong class."""
    labels, classes = published_labels(name)
    check_complete(name, "DIR", labels)
    with pytest.raises(UserError, match=r"images .*\d, 1 .*many"):
        check_complete(name, "DIR", np.append(labels, labels[:1]))
    if len(classes) == 200:
        other = next(k for k in range(1000) if k not in classes)
        with pytest.raises(UserError, match=f"{WNIDS[other]}, .*200 classes"):
            check_complete(name, "DIR", np.append(labels[:-1], np.int32(other)))


def test_error_names_a_class_with_too_few_images():
    labels, _ = published_labels("validation")
    with pytest.raises(UserError, match=r" 1 .*few \(n01498041 .*50\)"):
        check_complete("validation", "DIR", np.delete(labels, 6))


def test_the_benchmark(root):
    """The benchmark of a run; its summary excludes the held-out images too."""
    data = imagenet.get_config().data
    data.root, data.check_counts, data.held_out_per_class = str(root), False, 2
    assert benchmark.missing(data) == []
    assert benchmark.summarize(data).num_train == 1_281_167 - 2_000
    opened = benchmark.load(data)
    assert len(opened.train) == len(LABELS) * (2 * EACH - 2) and len(opened.validation) == 8
    assert opened.class_names == CLASS_NAMES and opened.templates == TEMPLATES
    assert opened.test.name == "id" and opened.real_labels.label_sets is not None
    data.paths.r = "elsewhere"
    with pytest.raises(UserError, match="data.paths.r=elsewhere: "):
        benchmark.load(data)


def test_evaluation_needs_no_training_images(root, tmp_path):
    """Nor does it write their decoded cache; training names what is missing."""
    shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns("train"))
    data = imagenet.get_config().data
    data.root, data.check_counts = str(tmp_path / "data"), False
    data.decoded_cache_dir = str(tmp_path / "cache")
    assert benchmark.missing(data, training=False) == []
    opened, complete = benchmark.load(data, training=False), open_sets(config(root))
    assert len(opened.train) == len(opened.validation) == 0
    assert opened.test.labels.tolist() == complete.test.labels.tolist()
    assert list(opened.shifts) == list(complete.shifts) and opened.real_labels is not None
    assert not (tmp_path / "cache").exists()
    (line,) = benchmark.missing(data)
    assert "no train " in line
    with pytest.raises(UserError, match="no train "):
        benchmark.load(data)


def test_a_shift_without_its_last_classes_is_incomplete():
    """R has labels up to 988 but only 200 classes: missing classes are counted correctly."""
    first, second = CLASSES["r"][:2]
    with pytest.raises(UserError, match=f"1 of 200 classes .*{WNIDS[second]}"):
        check_complete("r", "DIR", np.array([first], np.int32))
