"""Safetensors round trips, shards and indexes, and invalid files."""

from __future__ import annotations

import hashlib
import json
import os
import zlib

import ml_dtypes
import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import new_directory
from modelstock_jax.tensor_files import reader, writer
from modelstock_jax.tensor_files.checksums import RangeChecksum, checksum_file, checksum_tensors
from modelstock_jax.tensor_files.reader import INDEX, TensorFiles, read_header

TENSORS = {
    "a.half": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    "b.transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "c.scalar": np.float64(2.5),
    "d.empty": np.zeros((0, 4), np.float16),
    "e.integers": np.arange(-3, 3, dtype=np.int64),
    "f.flags": np.array([True, False]),
}


def assert_same(read, written):
    assert sorted(read) == sorted(written)
    for name, value in written.items():
        assert read[name].dtype == read.dtype(name) == np.asarray(value).dtype
        assert read[name].shape == read.shape(name) == np.shape(value)
        np.testing.assert_array_equal(read[name], value)


def test_round_trip(tmp_path):
    writer.write_tensors(tmp_path / "model.safetensors", TENSORS, {"step": "3"})
    files = TensorFiles(tmp_path)
    assert_same(files, TENSORS)
    assert_same(TensorFiles(tmp_path / "model.safetensors"), TENSORS)
    assert files.metadata() == {"format": "pt", "step": "3"}
    assert len(files) == 6 and "a.half" in files and "nothing" not in files
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_contain_every_tensor_once(tmp_path):
    writer.write_directory_tensors(tmp_path, TENSORS, max_shard_bytes=40)
    assert_same(TensorFiles(tmp_path), TENSORS)
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(index["weight_map"]) == sorted(TENSORS)
    assert index["metadata"]["total_size"] == sum(np.asarray(t).nbytes for t in TENSORS.values())
    for file in set(index["weight_map"].values()):
        sizes = [TENSORS[n].nbytes for n, f in index["weight_map"].items() if f == file]
        assert sum(sizes) <= 40 or len(sizes) == 1


def header(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text


INVALID = {
    "empty": b"",
    "header longer than the file": header(10**6, b"{}"),
    "header of exabytes": header(2**63, b"{}"),
    "not json": header(4, b"{{{{"),
    "offsets beyond the end": header(
        59, b'{"w":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}'[:59]
    ),
    "a pickle of an old protocol": b"cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID.keys())
def test_error_names_the_invalid_file(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors: "):
        TensorFiles(tmp_path)


def test_invalid_indexes(tmp_path):
    writer.write_directory_tensors(tmp_path, TENSORS, max_shard_bytes=40)
    index = tmp_path / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]

    def check_error(message, **changes):
        changed = {k: v for k, v in {**weight_map, **changes}.items() if v is not None}
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(UserError, match=message):
            TensorFiles(tmp_path)

    check_error(f"{INDEX}: '../model.safetensors'", **{"x": "../model.safetensors"})
    check_error(f"{INDEX}: '/etc/passwd'", **{"x": "/etc/passwd"})
    check_error(f"{INDEX}: 3 ", **{"x": 3})
    check_error("files .*: gone.safetensors", **{"x": "gone.safetensors"})
    check_error("files .*: xx", **{"x": "x" * 300})
    check_error(r"shard .*: x\b", **{"x": weight_map["a.half"]})
    check_error(r"shard .*: 'x\\n\\x1b\[2J'", **{"x\n\x1b[2J": weight_map["a.half"]})
    check_error("'d.empty'", **{"d.empty": None})
    check_error("model.bin: .*pickle", **{"x": "model.bin"})
    index.write_text("[]")
    with pytest.raises(UserError, match="'weight_map'"):
        TensorFiles(tmp_path)


def test_path_errors(tmp_path):
    with pytest.raises(UserError, match="gone: "):
        TensorFiles(tmp_path / "gone")
    with pytest.raises(UserError, match="xx: "):
        TensorFiles(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match=f"{tmp_path}: .*{INDEX}"):
        TensorFiles(tmp_path)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "model.safetensors").touch()
    with pytest.raises(UserError, match="run: .* model .*run/model"):
        TensorFiles(tmp_path / "run")
    (tmp_path / "model.pt").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "model.pt"):
        with pytest.raises(UserError, match="model.pt: .*pickle"):
            TensorFiles(path)
    writer.write_tensors(tmp_path / "one.safetensors", TENSORS)
    assert_same(TensorFiles(tmp_path), TENSORS)
    writer.write_tensors(tmp_path / "two.safetensors", TENSORS)
    with pytest.raises(UserError, match="2 safetensors files .*index"):
        TensorFiles(tmp_path)


def test_file_replaced_during_open_is_read_consistently(tmp_path, monkeypatch):
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    writer.write_tensors(path, {"w": np.arange(4.0), "z": np.zeros(3)})
    writer.write_tensors(other, {"a": np.ones(3), "w": np.full(4, 7.0)})

    def read_and_replace(*args):
        header = read_header(*args)
        other.rename(path)
        return header

    monkeypatch.setattr(reader, "read_header", read_and_replace)
    files = TensorFiles(path)
    assert sorted(files) == ["w", "z"] and files["w"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_error_names_the_unsupported_dtype(tmp_path):
    text = b'{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "m.safetensors").write_bytes(header(len(text), text) + b"123")
    files = TensorFiles(tmp_path)
    assert files.shape("w") == (4,) and files.code("w") == "F6_E2M3"
    with pytest.raises(UserError, match="'w' .*F6_E2M3"):
        files["w"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    writer.write_tensors(path, {"w": np.ones(3)})
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_file", full)
    with pytest.raises(UserError, match="model.safetensors: .*No space left on device"):
        writer.write_tensors(path, {"w": np.zeros(3)})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_umask_is_not_changed(tmp_path, monkeypatch):
    """Reading the umask sets it for all threads; files made meanwhile are writable by anyone."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the process's umask was set"))
    with new_directory(tmp_path / "model") as temporary:
        (temporary / "deep").mkdir(mode=0o700)
        writer.write_tensors(temporary / "deep" / "w.safetensors", {"w": np.ones(3)})
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").touch()
    for made, plain in (("model/deep", "folder"), ("model/deep/w.safetensors", "plain")):
        assert oct((tmp_path / made).stat().st_mode) == oct((tmp_path / plain).stat().st_mode)


def test_lone_surrogate_is_preserved(tmp_path):
    writer.write_indented_json(tmp_path / "config.json", {"é": "\ud83d"})
    assert json.loads((tmp_path / "config.json").read_text("utf-8")) == {"é": "\ud83d"}


def test_checksum_depends_on_every_bit_name_shape_and_dtype(tmp_path):
    base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(1, np.float32)}
    variants = [
        {**base, "a": np.zeros((3, 2), np.float32)},
        {**base, "a": np.zeros((2, 3), np.int32)},
        {**base, "a": np.full((2, 3), -0.0, np.float32)},
        {"a": base["b"], "b": base["a"]},
        {"a": base["a"]},
    ]
    checksums = {checksum_tensors(v) for v in [base, *variants]}
    assert len(checksums) == 6
    assert checksum_tensors(TENSORS) == checksum_tensors(dict(reversed(TENSORS.items())))
    path = tmp_path / "f"
    path.write_bytes(os.urandom(1000))
    assert checksum_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_crc32_of_ranges_in_any_order(tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, 50_000, np.uint8).tobytes()
    path = tmp_path / "file"
    path.write_bytes(raw)
    expected = f"{zlib.crc32(raw):08x}"
    assert checksum_file(path, "crc32") == expected
    rng = np.random.default_rng(1)
    for num_ranges in (0, 1, 30, 300):
        checksum = RangeChecksum(len(raw))
        # Ranges may overlap, repeat and leave gaps, which are read from the file.
        for start in rng.integers(0, len(raw), num_ranges):
            checksum.update(int(start), raw[start : start + int(rng.integers(0, 2000))])
        assert checksum.complete(path) == expected and checksum.gaps() == []
    with pytest.raises(ValueError, match="3 to 7"):
        checksum = RangeChecksum(9)
        checksum.update(0, b"123")
        checksum.update(7, b"89")
        checksum.hexdigest()
