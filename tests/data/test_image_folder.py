"""Class folders: which files are listed, in which order, and that they are listed once."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modelstock_jax.data import caches, image_folder
from modelstock_jax.data.image_folder import FileImages, read_folders
from modelstock_jax.errors import UserError
from tests.data.made_images import write_folders

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Cache every listing in a temporary directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(caches, "MIN_ENTRIES", 1)
    return tmp_path / "cache"


def test_images_are_sorted_by_folder_then_by_name(tmp_path):
    written = write_folders(tmp_path, ["a", "b", "ü c"], each=3)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.jpg").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    (tmp_path / "LICENSE").write_text("")
    stored = read_folders(tmp_path)
    assert stored.names == ("a", "b", "ü c")
    assert stored.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and stored.labels.dtype == np.int32
    assert list(stored.images) == written
    assert stored.images.name(7) == str(tmp_path / "ü c" / "ü c_1.JPEG")
    assert list(pickle.loads(pickle.dumps(stored.images))) == written
    assert read_folders(tmp_path, {"b", "else"}).names == ("b",)


def test_a_selection_stores_only_its_own_names(tmp_path):
    """Otherwise each worker process and each shard of `prepare` would get the names of all."""
    written = write_folders(tmp_path, ["a", "b"], each=3)
    images = read_folders(tmp_path).images.select(np.array([5, 0, 4])).select(np.array([1, 2]))
    assert len(images) == 2 and list(images) == [written[0], written[4]]
    assert images.name(1) == str(tmp_path / "b" / "b_1.JPEG")

    names = np.full(10_000, b"n01440764_10026.JPEG")
    listed = FileImages(image_folder.Listing("set", ("n01440764",), np.zeros(10_000, int), names))
    assert len(pickle.dumps(listed)) > 200_000 > 100 * len(pickle.dumps(listed.select([7, 9])))


def test_a_listing_is_cached_until_a_folder_changes(tmp_path, cache, monkeypatch):
    root = tmp_path / "set"
    write_folders(root, ["a", "b"])
    first = image_folder.list_folders(root)
    assert len(list(cache.rglob("*.npz"))) == 1

    calls, images = [], image_folder._images
    monkeypatch.setattr(
        image_folder, "_images", lambda folder: calls.append(folder) or images(folder)
    )
    cached = image_folder.list_folders(root)
    assert not calls
    assert cached.folders == first.folders and cached.names.tolist() == first.names.tolist()
    np.testing.assert_array_equal(cached.folder_of, first.folder_of)

    (root / "b" / "new.png").write_bytes(b"")
    assert b"new.png" in image_folder.list_folders(root).names.tolist() and len(calls) == 2
    write_folders(root, ["c"])
    assert image_folder.list_folders(root).folders == ("a", "b", "c")
    assert image_folder.list_folders(root, only={"c"}).folders == ("c",)


def test_a_damaged_or_unwritable_cache_is_not_an_error(tmp_path, cache):
    root = tmp_path / "set"
    write_folders(root, ["a"])
    expected = image_folder.list_folders(root).names.tolist()
    (file,) = cache.rglob("*.npz")
    file.write_bytes(file.read_bytes()[:40])
    assert image_folder.list_folders(root).names.tolist() == expected
    for path in (file, file.parent):
        path.unlink() if path.is_file() else path.rmdir()
    file.parent.write_text("a file instead of the directory")
    assert image_folder.list_folders(root).names.tolist() == expected


def test_nothing_is_written_to_the_image_folders(tmp_path, cache):
    root = tmp_path / "set"
    write_folders(root, ["a"])
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    list(read_folders(root).images)
    assert before == {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere: "):
        read_folders(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{tmp_path}: .*class folders.*/CLASS/IMAGE.jpg"):
        read_folders(tmp_path)
    write_folders(tmp_path, ["a"])
    with pytest.raises(UserError, match=f"{tmp_path}: .*class folders"):
        read_folders(tmp_path, {"b"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="empty: .*image"):
        read_folders(tmp_path)


def test_error_names_a_missing_image(tmp_path):
    write_folders(tmp_path, ["a"])
    images = FileImages(image_folder.list_folders(tmp_path))
    (tmp_path / "a" / "a_1.JPEG").unlink()
    with pytest.raises(UserError, match="a_1.JPEG: "):
        images[1]
    with pytest.raises(IndexError):
        images[2]


@pytest.mark.skipif(os.name != "posix", reason="fork")
def test_images_are_read_in_a_forked_process(tmp_path):
    """The parent has read images before, like a training run that has evaluated."""
    written = write_folders(tmp_path, ["a"])
    code = (
        "import os, sys\n"
        "from modelstock_jax.data.image_folder import read_folders\n"
        f"images = read_folders({str(tmp_path)!r}).images; images[0]\n"
        "if os.fork() == 0: os._exit(len(images[1]) % 256)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]), 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(len(written[1]) % 256), "False"]
