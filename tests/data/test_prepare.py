"""Preparation as ArrayRecord preserves all bytes and labels, also after interruptions."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modelstock_jax.data import prepare as preparation
from modelstock_jax.data.__main__ import main
from modelstock_jax.data.image_folder import read_folders
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.imagenet import open_real, open_set
from modelstock_jax.data.prepare import prepare, shrink
from modelstock_jax.data.published_sets import IMAGENET
from modelstock_jax.data.records import RecordImages, read_records
from modelstock_jax.errors import UserError
from tests.data.made_images import KINDS, encoded, write_folders, write_imagenet

SOURCES = {
    "train": "train",
    "validation": "val",
    "v2": "imagenetv2-matched-frequency-format-val",
    "r": "imagenet-r",
    "sketch": "sketch",
    "objectnet": "objectnet-1.0",
    "a": "imagenet-a",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("data"))


def command(source, out, name, *more):
    main(["prepare", str(source), "--out", str(out), "--set", name, "--workers", "1", *more])


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_format_gives_the_same_images_and_labels(root, tmp_path, name, capsys):
    command(root / SOURCES[name], tmp_path, name, "--no-check-counts")
    (directory,) = tmp_path.iterdir()
    assert capsys.readouterr().out.startswith(f"{directory}/1.0.0: ")
    assert directory.name in IMAGENET[name].locations, "this name is searched in data.root"
    plain = open_set(name, root / SOURCES[name], check_counts=False)
    records = open_set(name, directory, check_counts=False)
    assert list(records.images) == list(plain.images)
    np.testing.assert_array_equal(records.labels, plain.labels)
    for attribute in ("name", "classes", "groups", "crop_border"):
        assert getattr(records, attribute) == getattr(plain, attribute), attribute
    if name == "validation":
        real = open_real(root / "real.json", plain)
        assert open_real(root / "real.json", records).label_sets == real.label_sets


def make_set(root, names=("cat", "dog"), each=5):
    write_folders(root, names, each)
    stored = read_folders(root)
    return ImageSet("own", stored.images, stored.labels), stored.names


def test_an_interrupted_preparation_resumes(tmp_path, monkeypatch):
    """Finished shards are reused, half-written files are not; no result exists before the end."""
    image_set, names = make_set(tmp_path / "own")
    options = dict(dataset="own", split="train", per_shard=3)
    written, write_shard = [], preparation.write_shard

    def stop_in_the_third(shard):
        if len(written) == 2:
            shard.path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        written.append(shard.path)
        return write_shard(shard)

    monkeypatch.setattr(preparation, "write_shard", stop_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(image_set, names, tmp_path / "out", **options)
    assert not (tmp_path / "out" / "own" / "1.0.0").exists()
    times = [path.stat().st_mtime_ns for path in written]

    monkeypatch.setattr(preparation, "write_shard", write_shard)
    directory = prepare(image_set, names, tmp_path / "out", **options)
    reused = [directory / path.name for path in written]
    assert [path.stat().st_mtime_ns for path in reused] == times
    stored = read_records(directory, "train")
    assert list(stored.images) == list(image_set.images) and stored.names == names
    assert stored.labels.tolist() == image_set.labels.tolist()
    assert prepare(image_set, names, tmp_path / "out", **options) == directory


def test_different_preparations_are_not_mixed(tmp_path):
    image_set, names = make_set(tmp_path / "own")
    options = dict(dataset="own", split="train")
    unfinished = tmp_path / "out" / "own" / "1.0.0.incomplete"
    unfinished.mkdir(parents=True)
    (unfinished / "modelstock.json").write_text("{")
    with pytest.raises(UserError, match="modelstock.json: .*JSON"):
        prepare(image_set, names, tmp_path / "out", **options)
    (unfinished / "modelstock.json").write_text("{}")
    with pytest.raises(UserError, match="1.0.0.incomplete: .*--out"):
        prepare(image_set, names, tmp_path / "out", **options)
    prepare(image_set, names, tmp_path / "new", **options)
    with pytest.raises(UserError, match="resize .*-1"):
        prepare(image_set, names, tmp_path / "small", resize=-1, **options)
    assert not (tmp_path / "small").exists()
    with pytest.raises(UserError, match="1.0.0: .*--out"):
        prepare(image_set, names, tmp_path / "new", resize=20, **options)


def test_a_file_with_too_few_records_is_detected(tmp_path, monkeypatch):
    image_set, names = make_set(tmp_path / "own")
    monkeypatch.setattr(preparation, "_num_records", lambda path: 9)
    with pytest.raises(UserError, match="00000-of-00001: 9 records.* 10"):
        prepare(image_set, names, tmp_path / "out", dataset="own", split="train")


def test_several_processes_write_the_same_records(tmp_path):
    image_set, names = make_set(tmp_path / "own")
    options = dict(dataset="own", split="train", per_shard=4, resize=24)
    one, two = (
        prepare(image_set, names, tmp_path / str(workers), workers=workers, **options)
        for workers in (1, 2)
    )
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir()) and len(files) == 8
    one, two = (RecordImages(directory, "train") for directory in (one, two))
    assert [one.example(i) for i in range(10)] == [two.example(i) for i in range(10)]


def test_a_worker_process_gets_only_the_images_of_its_shard(tmp_path):
    """With all names in each of its shards, ImageNet would send 10 GB to the processes."""
    sizes = []
    for each in (8, 64):
        image_set, names = make_set(tmp_path / str(each), each=each)
        shards = preparation._shards(image_set, names, tmp_path, "own", "train", 0, 4)
        assert [shard.labels.tolist() for shard in shards[-2:]] == [[1] * 4] * 2
        assert list(shards[-1].images) == list(image_set.images)[-4:]
        sizes.append(len(pickle.dumps(shards[0])))
    assert sizes[1] < sizes[0] + 50, "bytes for longer paths, not for 112 more names"


@pytest.mark.parametrize("seed", range(12), ids=lambda seed: f"{KINDS[seed % 4]}-{seed % 3}")
def test_shrink(seed):
    """Compare with Pillow's resize; the re-encoding changes a smooth image by a few gray levels."""
    source, short, border = encoded(seed), 24, 2
    with Image.open(io.BytesIO(source)) as image:
        full = image.convert("RGB")
    inner = full.crop((border, border, full.width - border, full.height - border))
    scale = min(1, short / min(inner.size))
    expected = inner.resize([round(side * scale) for side in inner.size], Image.BICUBIC)
    with Image.open(io.BytesIO(shrink(source, short, border))) as result:
        assert result.mode == "RGB" and result.size == expected.size
        difference = np.asarray(result, int) - np.asarray(expected, int)
    assert np.abs(difference).mean() < 2  # JPEG at quality 95; another filter differs by more.


def test_small_images_are_unchanged():
    assert shrink(encoded(0), 30) == encoded(0)
    assert shrink(encoded(0), 29) != encoded(0)


def test_error_names_a_damaged_image(tmp_path):
    image_set, names = make_set(tmp_path / "own")
    file = Path(image_set.images.name(4))
    for content in (b"no image", file.read_bytes()[:100]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="cat_4.JPEG: .*image"):
            prepare(image_set, names, tmp_path / "out", dataset="own", split="train", resize=20)


def test_the_command(tmp_path):
    """Run it in a separate process, like a user: own folders, then an error of one line."""
    write_folders(tmp_path / "my-pets", ["cat", "dog"])
    run = [sys.executable, "-m", "modelstock_jax.data", "prepare", "--workers", "1", "--out"]
    options = dict(cwd=Path(__file__).parents[2], capture_output=True, text=True)
    done = subprocess.run([*run, str(tmp_path), str(tmp_path / "my-pets")], **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/my_pets/1.0.0: 4 images of 2 classes\n"
    done = subprocess.run([*run, str(tmp_path), "nowhere", "--set", "r"], **options)
    assert done.returncode == 1 and done.stderr.startswith("error: nowhere: ")
    assert done.stderr.count("\n") == 1
