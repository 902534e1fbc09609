"""Which files of a directory are read, and the errors for files in other formats."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles, read_json
from modelstock_jax.tensor_files.writer import write_tensors

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
HTML = b"\n <!DOCTYPE html>\n<html><body>404</body></html>"


def put(directory: Path, file: str, value: float, *names: str, **metadata: str) -> None:
    """Write a file with one element, `value`, in each tensor."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / file, {n: np.full(1, value) for n in names or ("w",)}, metadata)


def index(directory: Path, file: str, **weight_map: str) -> None:
    (directory / file).write_text(json.dumps({"weight_map": weight_map}))


def error(path: Path) -> str:
    """Return the error message; it must be one line and name the path."""
    with pytest.raises(UserError) as caught:
        TensorFiles(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and "Error" not in line
    return line


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "open_clip_model", "a.b-c"])
def test_index_with_any_name(tmp_path, stem):
    put(tmp_path, f"{stem}-00001-of-00002.safetensors", 1, "a")
    put(tmp_path, f"{stem}-00002-of-00002.safetensors", 2, "b")
    index(
        tmp_path,
        f"{stem}.safetensors.index.json",
        a=f"{stem}-00001-of-00002.safetensors",
        b=f"{stem}-00002-of-00002.safetensors",
        c="other.safetensors",
    )
    assert re.search(f"{stem}.* files .*: other.safetensors", error(tmp_path))
    put(tmp_path, "other.safetensors", 3, "c")
    files = TensorFiles(tmp_path)
    assert files.stem == stem and (files["a"], files["b"], files["c"]) == (1, 2, 3)
    (tmp_path / f"{stem}.safetensors.index.json").unlink()
    (tmp_path / "other.safetensors").unlink()
    files = TensorFiles(tmp_path)
    assert files.stem == stem and (files["a"], files["b"]) == (1, 2)


@pytest.mark.parametrize(("files", "stem"), [
    (["model", "model.fp16"], "model"),
    (["model", "other", "diffusion_pytorch_model"], "model"),
    (["diffusion_pytorch_model", "diffusion_pytorch_model.fp16",
      "diffusion_pytorch_model.non_ema"], "diffusion_pytorch_model"),
    (["diffusion_pytorch_model", "head"], "diffusion_pytorch_model"),
    (["model.fp16"], "model.fp16"),
    (["head"], "head"),
    (["sd_xl_base_1.0"], "sd_xl_base_1.0"),
    (["x", "._x", ".x"], "x"),  # files of macOS and temporary files
])  # fmt: skip
def test_file_without_a_variant_is_read(tmp_path, files, stem):
    for file in files:
        put(tmp_path, f"{file}.safetensors", float(file == stem))
    tensors = TensorFiles(tmp_path)
    assert tensors.stem == stem and tensors["w"] == 1


def test_variants_of_an_index_are_ignored(tmp_path):
    stem = "diffusion_pytorch_model"
    for value, names in enumerate(
        [
            (f"{stem}.safetensors.index.json", f"{stem}-00001-of-00001.safetensors"),
            (f"{stem}.fp16.safetensors.index.json", f"{stem}.fp16-00001-of-00001.safetensors"),
            (f"{stem}.safetensors.index.bf16.json", f"{stem}-00001-of-00001.bf16.safetensors"),
        ]
    ):
        put(tmp_path, names[1], value)
        index(tmp_path, names[0], w=names[1])
    assert TensorFiles(tmp_path)["w"] == 0 and TensorFiles(tmp_path).stem == stem
    # Without the plain index, two variants remain, which is ambiguous.
    (tmp_path / f"{stem}.safetensors.index.json").unlink()
    (tmp_path / f"{stem}-00001-of-00001.safetensors").unlink()
    assert "indexes" in error(tmp_path)
    (tmp_path / f"{stem}.fp16.safetensors.index.json").unlink()
    assert TensorFiles(tmp_path)["w"] == 2  # the variant that still has an index


def test_index_takes_precedence_over_unrelated_files(tmp_path):
    put(tmp_path, "consolidated.safetensors", 0)
    put(tmp_path, "unet-00001-of-00001.safetensors", 1)
    index(tmp_path, "unet.safetensors.index.json", w="unet-00001-of-00001.safetensors")
    assert TensorFiles(tmp_path)["w"] == 1
    assert TensorFiles(tmp_path / "consolidated.safetensors").stem == "consolidated"


def test_shards_without_an_index_must_be_complete(tmp_path):
    for number in range(1, 6):
        put(tmp_path, f"model-{number:05d}-of-00005.safetensors", number, f"w{number}")
    assert sorted(TensorFiles(tmp_path)) == [f"w{n}" for n in range(1, 6)]
    for number in (2, 5):
        (tmp_path / f"model-{number:05d}-of-00005.safetensors").unlink()
    assert re.search("5 shards .*model.* 2, 5", error(tmp_path))
    put(tmp_path, "model-00001-of-00004.safetensors", 1)
    assert re.search("shards .*4 .*5 .*index", error(tmp_path))


def test_shards_may_be_numbered_from_zero_and_contain_a_tensor_once(tmp_path):
    for number in range(2):
        put(tmp_path, f"model-{number:05d}-of-00002.safetensors", number, f"w{number}")
    assert sorted(TensorFiles(tmp_path)) == ["w0", "w1"]
    put(tmp_path, "model-00001-of-00002.safetensors", 1, "w0")
    assert re.search("'w0', .*model-00000-of-00002.safetensors", error(tmp_path))


def test_error_names_several_candidate_files(tmp_path):
    for letter in "abcde":
        put(tmp_path, f"{letter}.safetensors", 0)
    line = error(tmp_path)
    assert re.search("5 safetensors files .*a.safetensors, b.safetensors, c.safetensors", line)
    assert " 2 more" in line and "path" in line
    index(tmp_path, "a.safetensors.index.json", w="a.safetensors")
    index(tmp_path, "b.safetensors.index.json", w="b.safetensors")
    assert "a.safetensors.index.json, b.saf" in error(tmp_path)


def test_single_file_takes_precedence_over_an_index(tmp_path):
    """Like transformers, unless the index lists the file among its shards."""
    put(tmp_path, "model.safetensors", 7)
    index(tmp_path, "model.safetensors.index.json", w="model-00001-of-00001.safetensors")
    assert {path.name for path in TensorFiles(tmp_path).files.values()} == {"model.safetensors"}
    put(tmp_path, "model-00001-of-00001.safetensors", 1)
    assert {path.name for path in TensorFiles(tmp_path).files.values()} == {"model.safetensors"}
    put(tmp_path, "more.safetensors", 1, "a")
    index(tmp_path, "model.safetensors.index.json", w="model.safetensors", a="more.safetensors")
    assert len(TensorFiles(tmp_path)) == 2


def test_shard_that_is_a_git_lfs_pointer(tmp_path):
    put(tmp_path, "model-00001-of-00002.safetensors", 1, "a")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(LFS)
    for _ in range(2):
        line = error(tmp_path)
        assert re.search("model-00002-of-00002.safetensors: .*Git LFS", line)
        assert "`git lfs pull`" in line
        index(
            tmp_path,
            "model.safetensors.index.json",
            a="model-00001-of-00002.safetensors",
            b="model-00002-of-00002.safetensors",
        )


def test_aliases_are_the_tensors_that_save_model_removed(tmp_path):
    put(
        tmp_path,
        "model-00001-of-00002.safetensors",
        1,
        "shared.weight",
        "format",
        **{"encoder.weight": "shared.weight", "other": "head.weight", "author": "me"},
    )
    put(
        tmp_path,
        "model-00002-of-00002.safetensors",
        2,
        "head.weight",
        "kept",
        **{"lm_head.weight": "head.weight", "kept": "head.weight", "shared.weight": "kept"},
    )
    files = TensorFiles(tmp_path)
    # A tensor of another file and a key that is stored are not aliases.
    assert files.aliases == {"encoder.weight": "shared.weight", "lm_head.weight": "head.weight"}


def _zip(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    return path.read_bytes()


CONTENTS = {
    b"GGUF\x03\x00\x00\x00" + bytes(99): "GGUF",
    LFS: "`git lfs pull`",
    HTML: "HTML",
    b"<HTML lang=en>": "HTML",
    b"\xef\xbb\xbf<!doctype html>": "HTML",
    b"\x80\x02}q\x00.": "PyTorch pickle",
    b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.": "PyTorch pickle",
    b"\x89HDF\r\n\x1a\n" + bytes(9): "from_tf",
    b"\x1f\x8b\x08" + bytes(9): "archive",
}


@pytest.mark.parametrize(("content", "message"), CONTENTS.items(), ids=CONTENTS.values())
def test_other_formats_with_the_safetensors_suffix(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for opened in (path, tmp_path):
        assert re.search(f"{path}: .*{message}", error(opened))


def test_pickle_in_a_zip_archive(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(_zip(tmp_path / "made"))
    assert re.search("model.safetensors: .*PyTorch pickle", error(tmp_path))
    assert "safetensors.torch.save_file" in error(tmp_path)


@pytest.mark.parametrize(("content", "message"), [
    (LFS, "config.json: .*Git LFS"), (HTML, "config.json: .*HTML"),
    (b"{", r"config.json: .*JSON \(Expecting"),
])  # fmt: skip
def test_config_that_was_not_fetched(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("files", "message"), [
    (["m.gguf", "config.json"], "m.gguf: .*GGUF"),
    (["model.onnx", "config.json"], "model.onnx: .*ONNX"),
    (["tf_model.h5"], "tf_model.h5: TensorFlow .*from_tf"),
    (["flax_model.msgpack", "tf_model.h5"], "tf_model.h5: TensorFlow"),
    (["flax_model.msgpack"], "flax_model.msgpack: Flax .*from_flax=True"),
    (["a.parquet"], ": .*dataset"), (["data/train-0.parquet"], ": .*dataset"),
    (["dataset_info.json", "x.arrow"], ": .*dataset"), (["dataset_dict.json"], ": .*dataset"),
    (["state.json", "data-0.arrow"], ": .*dataset"),
    (["pytorch_model.bin", "aaa.bin", "training_args.bin"], "pytorch_model.bin: .*pickle"),
    (["optimizer.pt", "rng_state_0.pth", "training_args.bin", "checkpoint-5/model.safetensors"],
     " model in .*/checkpoint-5"),
    (["unet/diffusion_pytorch_model.safetensors", "vae/x.safetensors.index.json"],
     " model in .*/unet, .*/vae"),
    (["config.json"], "model.safetensors.index.json"),
])  # fmt: skip
def test_directories_without_safetensors(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        TensorFiles(tmp_path)
    assert "\n" not in error(tmp_path)
    if "/" not in files[0] and files[0].endswith((".gguf", ".onnx", ".h5", ".msgpack", ".bin")):
        with pytest.raises(UserError, match=f"{files[0]}: .*safetensors"):
            TensorFiles(tmp_path / files[0])


def test_directory_with_the_suffix_of_a_pickle(tmp_path):
    put(tmp_path / "epoch=1.ckpt", "model.safetensors", 1)
    assert TensorFiles(tmp_path / "epoch=1.ckpt")["w"] == 1


def test_names_with_newlines_do_not_break_the_message(tmp_path):
    directory = tmp_path / "a\nb"
    directory.mkdir()
    for content in (LFS, HTML, b"GGUF" + bytes(20)):
        (directory / "c\nd.safetensors").write_bytes(content)
        with pytest.raises(UserError) as caught:
            TensorFiles(directory)
        assert "\n" not in str(caught.value) and r"c\nd.safetensors" in str(caught.value)
    os.rename(directory / "c\nd.safetensors", directory / "c\nd.gguf")
    with pytest.raises(UserError) as caught:
        TensorFiles(directory)
    assert "\n" not in str(caught.value)
    for content in (None, b"{"):
        if content:
            (directory / "config.json").write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_json(directory / "config.json")
        assert "\n" not in str(caught.value)
