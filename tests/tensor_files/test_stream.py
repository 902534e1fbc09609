"""Files that several threads write in pieces and that are read in ranges."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import ShardWriter

RNG = np.random.default_rng(0)
TENSORS = {
    "odd": RNG.integers(0, 255, 3, np.uint8),
    "wide": RNG.standard_normal(5),
    "half": RNG.standard_normal((300, 7001)).astype(ml_dtypes.bfloat16),
    "none": np.zeros((0, 2), np.float32),
    "one": np.array(7, np.int64),
}
CODES = {"odd": "U8", "wide": "F64", "half": "BF16", "none": "F32", "one": "I64"}


def writer(path, checksum="sha256") -> ShardWriter:
    tensors = {n: (CODES[n], t.shape) for n, t in TENSORS.items()}
    return ShardWriter(path, tensors, {"a": "b"}, checksum)


def pieces(seed=0):
    cuts = [
        (n, a, min(a + 100_000, t.size))
        for n, t in TENSORS.items()
        for a in range(0, t.size, 100_000)
    ]
    return [cuts[k] for k in np.random.default_rng(seed).permutation(len(cuts))]


def test_pieces_in_any_order_from_any_thread(tmp_path):
    checksums = {"sha256": set(), "crc32": set()}
    for seed, kind in enumerate([*checksums, *checksums]):
        file = writer(tmp_path / f"{seed}.safetensors", kind)
        with ThreadPoolExecutor(4) as pool:
            list(
                pool.map(
                    lambda p, file=file: file.write(
                        p[0], p[1], TENSORS[p[0]].reshape(-1)[p[1] : p[2]]
                    ),
                    pieces(seed),
                )
            )
        checksums[kind].add(file.finish())
    path = tmp_path / "0.safetensors"
    assert checksums == {
        "sha256": {hashlib.sha256(path.read_bytes()).hexdigest()},
        "crc32": {f"{zlib.crc32(path.read_bytes()):08x}"},
    }
    read = load_file(path)  # with the reader of the safetensors library
    for name, tensor in TENSORS.items():
        assert read[name].tobytes() == tensor.tobytes()
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
    assert TensorFiles(path).metadata() == {"format": "pt", "a": "b"}


def test_read_ranges(tmp_path):
    file = writer(tmp_path / "w.safetensors")
    for name, start, stop in pieces():
        file.write(name, start, TENSORS[name].reshape(-1)[start:stop])
    file.finish()
    files = TensorFiles(tmp_path / "w.safetensors")
    flat = TENSORS["half"].reshape(-1)
    cuts = [(0, 1), (5, 5), (17, 70_000), (flat.size - 3, flat.size)] * 20
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda cut: files.read("half", *cut), cuts))
    for (start, stop), part in zip(cuts, parts, strict=True):
        np.testing.assert_array_equal(part, flat[start:stop])
    for wrong in [(-1, 2), (2, 1), (0, flat.size + 1)]:
        with pytest.raises(IndexError):
            files.read("half", *wrong)


def test_file_truncated_while_it_is_read(tmp_path):
    path = tmp_path / "w.safetensors"
    file = ShardWriter(path, {"w": ("F32", (4,))})
    file.write("w", 0, np.ones(4, np.float32))
    file.finish()
    files = TensorFiles(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(UserError, match="w.safetensors: "):
        files.read("w", 0, 4)


def test_missing_element_fails_finish(tmp_path):
    file = ShardWriter(tmp_path / "w", {"w": ("F32", (4,))})
    file.write("w", 1, np.ones(3, np.float32))
    with pytest.raises(ValueError, match="w: byte 96 "):
        file.finish()
    file = ShardWriter(tmp_path / "w", {"w": ("F32", (4,))})
    for wrong in [(2, np.ones(3, np.float32)), (-1, np.ones(1, np.float32)), (0, np.ones(4))]:
        with pytest.raises(ValueError):
            file.write("w", *wrong)
    file.abandon()
    assert not (tmp_path / "w").exists()


def test_file_truncated_while_it_is_written(tmp_path):
    file = ShardWriter(tmp_path / "w", {"w": ("F32", (4,))})
    file.write("w", 0, np.ones(4, np.float32))
    os.truncate(tmp_path / "w", 0)
    with pytest.raises(UserError, match="w: .*truncated"):
        file.finish()


def test_full_disk_error_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = ShardWriter(tmp_path / "w", {"w": ("F32", (4,))})
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="w: .*No space left on device"):
        file.write("w", 0, np.ones(4, np.float32))
    file.abandon()
    # If even the header cannot be written, no file and no thread remain.
    before = threading.active_count()
    with pytest.raises(UserError, match="w: .*No space left on device"):
        ShardWriter(tmp_path / "w", {"w": ("F32", (4,))})
    assert threading.active_count() == before and not (tmp_path / "w").exists()
