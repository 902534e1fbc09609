"""Inputs of a merge: what each kind of text opens, and one-line errors."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import pytest

from modelstock_jax.checkpoint_merge.sources import open_source
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.writer import write_tensors
from tests.checkpoint_merge.small import adapter, factors, llama_shapes, save, weights

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("m") / "base", weights(llama_shapes()), {"a": 1})


@pytest.mark.parametrize("max_shard_bytes", [10**9, 2000])
def test_directory_with_one_file_or_shards(tmp_path, max_shard_bytes):
    tensors = weights(llama_shapes())
    path = save(tmp_path / "m", tensors, max_shard_bytes=max_shard_bytes)
    source = open_source(str(path))
    assert {n: i.shape for n, i in source.tensors.items()} == llama_shapes()
    for name, array in tensors.items():
        np.testing.assert_array_equal(source.read(name, 0, array.size), array.reshape(-1))
        np.testing.assert_array_equal(source.read(name, 3, 9), array.reshape(-1)[3:9])
    files = sorted(path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes == 2000)
    assert list(source.files) == files
    assert source.num_bytes == sum(file.stat().st_size for file in files)
    assert source.checksums("sha256") == {
        file.name: f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files
    }
    crcs = {file.name: f"crc32:{zlib.crc32(file.read_bytes()):08x}" for file in files}
    assert source.checksums() == crcs
    # Ranges are noted in any order and more than once; the rest is read from the file.
    source.watch()
    for name in sorted(tensors, reverse=True)[2:]:
        for start, stop in ((5, 9), (2, 5), (5, 9), (0, 7)):
            source.note(name, start, source.read(name, start, stop))
    assert source.checksums() == crcs


def test_checksum_of_a_file_in_the_hub_cache_is_its_blob_name(model, tmp_path):
    # The layout of the cache of huggingface_hub: a snapshot of links to blobs.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    sha256 = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    blob = tmp_path / "blobs" / sha256
    blob.write_bytes((model / "model.safetensors").read_bytes())
    link = tmp_path / "snapshots" / "model.safetensors"
    link.symlink_to(blob)
    source = open_source(str(tmp_path / "snapshots"))
    source.watch()
    assert source.checksums() == {"model.safetensors": f"sha256:{sha256}"}
    link.unlink()
    link.symlink_to(blob.rename(tmp_path / sha256))  # A link outside `blobs` is not used.
    assert open_source(str(tmp_path / "snapshots")).checksums()["model.safetensors"][:6] == "crc32:"


def test_single_file_has_no_directory(model):
    source = open_source(str(model / "model.safetensors"))
    assert source.directory is None and source.tensors.keys() == llama_shapes().keys()


def test_model_plus_adapter(model, tmp_path):
    lora = adapter(tmp_path / "lora", factors(Q, 16, 16))
    base = open_source(str(model))
    bare, joined = open_source(str(lora), base), open_source(f"{model}+{lora}", base)
    np.testing.assert_array_equal(*(s.read(f"{Q}.weight", 0, 256) for s in (bare, joined)))
    assert bare.label == str(lora) and joined.label == f"{model}+{lora}"
    # An adapter of BASE adds only its files; an adapter of another model also adds that model's.
    assert set(bare.checksums()) == {"adapter_config.json", "adapter_model.safetensors"}
    other = open_source(f"{model}+{lora}")
    assert set(other.checksums()) == {*bare.checksums(), "model.safetensors"}
    # The config counts: resuming with another alpha would mix two merges.
    assert set(other.files) == {
        *base.files,
        lora / "adapter_model.safetensors",
        lora / "adapter_config.json",
    }


def test_existing_path_with_a_plus(model, tmp_path):
    path = save(tmp_path / "a+b", weights({"w": (2, 3)}))
    assert open_source(str(path)).tensors["w"].shape == (2, 3)


def test_model_next_to_its_adapter_is_opened_without_it(tmp_path):
    path = save(tmp_path / "m", weights({"w": (2, 3)}))
    adapter(path, factors(Q, 16, 16))
    assert "w" in open_source(str(path)).tensors


@pytest.mark.parametrize(("text", "message"), [
    ("{tmp}/none", "none: "),
    ("{tmp}/empty", "model.safetensors.index.json"),
    ("{tmp}/pickled", "safetensors.torch.save_file"),
    ("{tmp}/pickled/pytorch_model.bin", "pickle"),
    ("{tmp}/lora", "BASE"),
    ("{model}+{tmp}/empty", "adapter_config.json"),
    ("{model}+", "'model+adapter'"),
    ("{tmp}/none+{tmp}/lora", "none: "),
    ("no-such-org/no-such-model", "no-such-org/no-such-model"),
])  # fmt: skip
def test_error_is_one_line(model, tmp_path, text, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    adapter(tmp_path / "lora", factors(Q, 16, 16))
    with pytest.raises(UserError) as error:
        open_source(text.format(tmp=tmp_path, model=model))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_error_for_a_shard_outside_of_the_directory(tmp_path):
    write_tensors(tmp_path / "secret.safetensors", {"w": np.ones(2, np.float32)})
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "../secret.safetensors"}}'
    )
    with pytest.raises(UserError, match="model.safetensors.index.json: '../secret.safetensors'"):
        open_source(str(tmp_path / "m"))
