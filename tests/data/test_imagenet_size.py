"""A dataset with as many files as ImageNet is listed, opened and resumed in little memory and time.

The benchmark measures it (`benchmarks/imagenet_size.py`). The slow test runs it at a tenth of the
size of ImageNet, where one image more costs as much as at full size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import imagenet_size, imagenet_tree, turns
from modelstock_jax.data import caches
from modelstock_jax.data.image_folder import list_folders
from modelstock_jax.data.imagenet import WNIDS


def run(directory: Path, *options: str) -> dict:
    """Run the benchmark and return its results."""
    file = directory / "results.json"
    imagenet_size.main(["--directory", str(directory), "--json", str(file), *options])
    return json.loads(file.read_text())


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
    results = run(tmp_path, "--fraction=0.5", "--images=482", "--folders=6", "--batch=16")
    assert results["setup"] == {"images": 241, "folders": 6, "batch": 16, "replicas": 2}
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
