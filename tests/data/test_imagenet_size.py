"""A dataset with as many files as ImageNet is listed, opened and resumed in little memory and time.

The benchmark measures it (`benchmarks/imagenet_size.py`). The slow test runs it at a tenth of the
size of ImageNet, where one image more costs as much as at full size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import imagenet_size, imagenet_tree, turns
from modelstock_jax.data import caches
from modelstock_jax.data.image_folder import list_folders
from modelstock_jax.data.imagenet import WNIDS

ROOT = Path(__file__).parents[2]


def files(directory: Path) -> list[str]:
    """Return the options that name the files of the benchmark."""
    return ["--directory", str(directory), "--json", str(directory / "results.json")]


def check_equal(results: dict, tree: Path) -> None:
    """Check that the listings equal os.walk, and the resumed batches those of the streams."""
    walked = [
        os.path.join(directory, name)
        for directory, _, names in sorted(os.walk(tree))
        for name in sorted(names)
    ]
    checksums = {row["checksum"] for row in results["listing"].values()}
    assert checksums == {imagenet_size.paths_checksum(walked)}
    sources = [results[source] for source in imagenet_size.SOURCES]
    batches = {row[name]["checksum"] for row in sources for name in ("resume", "stream")}
    assert len(batches) == 1, "folder and ArrayRecord, resumed and uninterrupted"
    assert batches.isdisjoint(row["start"]["checksum"] for row in sources)
    assert results["iteration"]["equal"]


def test_a_small_tree(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # The benchmark sets it.
    monkeypatch.setattr(caches, "MIN_ENTRIES", 1)
    monkeypatch.setattr(turns, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(imagenet_size, "STEP_MS", 1)
    monkeypatch.setattr(imagenet_size, "usable_cores", lambda: 1)
    small = ["--fraction=0.5", "--images=482", "--folders=6", "--batch=16", "--threads=3"]
    imagenet_size.main([*files(tmp_path), *small])
    results = json.loads((tmp_path / "results.json").read_text())
    expected = {"images": 241, "folders": 6, "batch": 16, "replicas": 2, "threads": 3}
    assert results["setup"] == expected
    assert list(results["listing"]) == ["sorted os.walk", "warm", "cached"]
    check_equal(results, tmp_path / "train")
    printed = capsys.readouterr().out
    assert printed.count("| yes |") == 5 and "NO" not in printed
    # 217 images remain: 13 steps per epoch, and six more to the middle of the third one.
    assert "| first batch at step 32, s |" in printed
    assert len(list((tmp_path / "user_cache").rglob("*.npz"))) == 1


def test_a_wrong_listing_and_a_wrong_batch_are_reported():
    row = {"wall": 1, "cpu": 1, "peak_mb": 1, "kept_mb": 1}
    listing = {"sorted os.walk": row | {"checksum": "a"}, "warm": row | {"checksum": "b"}}
    cells = imagenet_size.listing_cells({"listing": listing})
    assert [row["equal"] for row in cells] == ["yes", "NO"]
    assert not imagenet_size.resumed_is_equal(
        {"resume": {"checksum": "a"}, "stream": {"checksum": "b"}}
    )


def test_temporary_datasets_are_removed_after_an_error(tmp_path, monkeypatch):
    removed, remove_tree = [], imagenet_tree.remove_tree

    def fail(function, setup, *arguments):
        imagenet_tree.write_tree(setup.root / "train", 9, 3)
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(turns, "in_new_process", fail)
    monkeypatch.setattr(
        imagenet_tree, "remove_tree", lambda root: removed.append(remove_tree(root) or root)
    )
    with pytest.raises(KeyboardInterrupt):
        imagenet_size.main([])
    assert len(removed) == 1 and not list(tmp_path.iterdir())


def test_finished_folders_are_kept_and_incomplete_ones_are_not_listed(tmp_path, monkeypatch):
    write, calls = imagenet_tree._write_files, []

    def interrupted(folder, *arguments):
        calls.append(folder.name)
        write(folder, *arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(imagenet_tree, "_write_files", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imagenet_tree.write_tree(tmp_path, 31, 3)
    assert list_folders(tmp_path).folders == WNIDS[:1]
    imagenet_tree.write_tree(tmp_path, 31, 3)
    assert calls == [f".{WNIDS[i]}" for i in (0, 1, 1, 2)]
    listing = list_folders(tmp_path)
    assert listing.folder_of.tolist() == [0] * 10 + [1] * 10 + [2] * 11
    assert listing.names[0] == f"{WNIDS[0]}_115.JPEG".encode(), "sorted as text, not as numbers"
    assert {path.stat().st_size < 1000 for path in tmp_path.rglob("*.JPEG")} == {True}
    imagenet_tree.remove_tree(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.slow
def test_a_tenth_of_imagenet(tmp_path):
    """Bounds are 1.1 to 1.4 times the memory, which varies little, and 5 times the time."""
    script = [sys.executable, "benchmarks/imagenet_size.py", "--fraction=0.1"]
    subprocess.run([*script, *files(tmp_path)], cwd=ROOT, check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    check_equal(results, tmp_path / "train")
    imagenet_tree.remove_tree(tmp_path / "train")  # pytest would need minutes.

    # A list of paths needs 190 bytes per file, a name and the index of its folder 24.
    listing = results["listing"]
    for name in ("warm", "cached"):
        assert listing[name]["peak_mb"] < 0.6 * listing["sorted os.walk"]["peak_mb"], name
    assert listing["cached"]["cpu"] < 0.5 * listing["warm"]["cpu"]

    for source, bytes_per_image in (("folder", 20 + 4 + 4), ("ArrayRecord", 8 + 4)):
        row = results[source]
        # Name, index of the folder, label; index among all images, label. 50 kB for the folders.
        assert 1e6 * row["open"]["pickle_mb"] < (bytes_per_image + 2) * row["open"]["images"] + 5e4
        # No image is read: reading the labels of all records takes 6 s.
        assert row["open"]["cpu"] < 2, source
        # Reading all skipped batches would take a hundred seconds.
        skipped = row["resume"]["step"] * row["stream"]["seconds"]
        assert row["resume"]["wall"] < row["start"]["wall"] + 0.05 * skipped, source

    row = results["iteration"]
    assert row["seconds"] < 0.001 and row["blank"] < 0.1
    # The next order is ready while the training step runs.
    assert row["epoch_change_wait"] < 0.2 * imagenet_size.STEP_MS / 1000
