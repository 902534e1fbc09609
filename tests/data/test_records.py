"""Datasets prepared by TensorFlow Datasets as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from modelstock_jax.data import caches
from modelstock_jax.data.imagenet import WNIDS, open_real, open_set
from modelstock_jax.data.records import RecordImages, find_records, read_records
from modelstock_jax.errors import UserError
from tests.data.made_images import encoded
from tests.data.made_records import write_set

ROOT = Path(__file__).parents[2]


def imagenet_set(directory: Path, splits: dict[str, list[int]]) -> Path:
    """Write a dataset with the features of imagenet2012, imagenet_v2 and the others."""
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=WNIDS),
        "file_name": tfds.features.Text(),
    }
    examples = {
        split: [
            {"image": encoded(i), "label": WNIDS[label], "file_name": f"{split}_{i}.JPEG"}
            for i, label in enumerate(labels)
        ]
        for split, labels in splits.items()
    }
    return write_set(directory, features, examples)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    labels = {"train": [7, 0, 3, 3, 999], "validation": [5, 1, 5]}
    return imagenet_set(tmp_path_factory.mktemp("tfds") / "imagenet2012" / "5.1.0", labels)


@pytest.mark.parametrize("versioned", [True, False])
def test_bytes_labels_and_names(imagenet, versioned):
    """They are as stored, in the order of the records."""
    train = open_set("train", imagenet if versioned else imagenet.parent, check_counts=False)
    assert train.labels.tolist() == [7, 0, 3, 3, 999]
    assert list(train.images) == [encoded(i) for i in range(5)]
    assert train.images.name(3) == f"{imagenet}, split train, record 3 (train_3.JPEG)"
    test = open_set("validation", imagenet.parent, check_counts=False)
    assert test.labels.tolist() == [5, 1, 5] and test.name == "id"
    assert test.images.sizes() is None, "ImageNet's images have different sizes"


def test_images_can_be_pickled_for_other_processes(imagenet):
    images = RecordImages(imagenet, "train")
    assert images[4] == encoded(4)
    copy = pickle.loads(pickle.dumps(images))
    assert copy._source is None, "an open reader is not pickled"
    assert list(copy) == list(images)
    with pytest.raises(IndexError):
        images[5]


def test_threads_open_the_files_once(imagenet, monkeypatch):
    images, opened, builder = RecordImages(imagenet, "train"), [], RecordImages._builder

    def slow(self):
        opened.append(self)
        time.sleep(0.05)
        return builder(self)

    monkeypatch.setattr(RecordImages, "_builder", slow)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(images.__getitem__, [4] * 8)) == [encoded(4)] * 8
    assert opened == [images]


def test_reading_needs_no_tensorflow_and_raises_in_a_fork(imagenet):
    """A forked process has no reader threads: reading in it would hang occasionally."""
    code = (
        "import os, sys\n"
        "from modelstock_jax.data.records import RecordImages\n"
        f"images = RecordImages({str(imagenet)!r}, 'train')\n"
        "if os.fork() == 0: os._exit(len(images[1]) % 256)\n"
        "before = os.waitstatus_to_exitcode(os.wait()[1])\n"
        "images[1]\n"
        "if os.fork() == 0:\n"
        "    try: images[1]\n"
        "    except RuntimeError as error: os._exit(77 if 'spawn' in str(error) else 1)\n"
        "print(before, os.waitstatus_to_exitcode(os.wait()[1]), 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(len(encoded(1)) % 256), "77", "False"]
    assert "tensorflow" not in sys.modules


def test_labels_of_a_large_dataset_are_read_once(imagenet, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(caches, "MIN_ENTRIES", 1)
    first = read_records(imagenet, "train").labels
    monkeypatch.setattr(RecordImages, "example", lambda *_: pytest.fail("read again"))
    np.testing.assert_array_equal(read_records(imagenet, "train").labels, first)


def test_real_labels_of_tensorflow_datasets(tmp_path):
    """imagenet2012_real contains the label sets and the images."""
    label = tfds.features.ClassLabel(names=WNIDS)
    features = {
        "image": tfds.features.Image(),
        "original_label": label,
        "real_label": tfds.features.Sequence(label),
        "file_name": tfds.features.Text(),
    }
    sets = [[3, 8], [], [5]]
    rows = [
        {"image": encoded(i), "original_label": i, "real_label": labels, "file_name": f"{i}.JPEG"}
        for i, labels in enumerate(sets)
    ]
    directory = write_set(tmp_path / "imagenet2012_real" / "1.0.0", features, {"validation": rows})
    real = open_real(directory.parent, None)
    assert real.label_sets == ((3, 8), (), (5,)) and real.labels.tolist() == [0, 1, 2]
    assert list(real.images) == [encoded(i) for i in range(3)]
    with pytest.raises(UserError, match="class label 'label' .*original_label"):
        open_set("validation", directory)


def test_the_newest_version_is_read(tmp_path):
    for version in ("1.0.0", "2.0.0", "10.0.0", "3.0.0.incomplete"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").write_text("{}")
    assert find_records(tmp_path) == tmp_path / "10.0.0"
    assert find_records(tmp_path / "1.0.0") == tmp_path / "1.0.0"
    assert find_records(tmp_path / "nothing") is None


def test_class_folders_are_not_searched_for_versions(tmp_path, monkeypatch):
    """On a network disk, a look into each of a thousand folders takes a second."""
    for wnid in WNIDS[:50]:
        (tmp_path / wnid).mkdir()
    (tmp_path / "1.0.0").mkdir()
    (tmp_path / "1.0.0" / "dataset_info.json").write_text("{}")
    looked, stat = [], os.stat
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, **rest: looked.append(path) or stat(path, **rest))
        assert find_records(tmp_path) == tmp_path / "1.0.0"
    assert looked and not any(path.parent.name in WNIDS for path in map(Path, looked))


def test_mistakes(imagenet, tmp_path):
    with pytest.raises(UserError, match="dataset_info.json"):
        read_records(tmp_path, "train")
    with pytest.raises(UserError, match="'test'.*train, validation"):
        read_records(imagenet, "test")
    with pytest.raises(UserError, match="splits train, validation"):
        read_records(imagenet)
    copy = tmp_path / "imagenet2012" / "5.0.0"
    copy.mkdir(parents=True)
    for file in imagenet.glob("*.*"):
        (copy / file.name).write_bytes(file.read_bytes())
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="5.0.0: .*tfrecord.*file_format=array_record"):
        read_records(copy, "train")
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="dataset_info.json: .*JSON"):
        read_records(copy, "train")
    (copy / "dataset_info.json").write_text(json.dumps(info))
    (copy / "features.json").unlink()
    with pytest.raises(UserError, match=r"5.0.0: .*\(Cannot restore"):
        read_records(copy, "train")
