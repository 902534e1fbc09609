"""Error messages for files and directories in formats other than safetensors.

Only the first bytes of a file are read. Nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from modelstock_jax.errors import listed

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HEAD = 512  # bytes that identify a format

# Pickles that a trainer saves next to the weights; they contain no weights.
_TRAINING = ("optimizer", "rng_state", "scaler", "scheduler", "training_args", "trainer_state")

_FROM_SOURCE = "pass the safetensors model that it was converted from"
_LOAD = "load it with transformers 4 (from_pretrained(DIR, {0}=True)) and save_pretrained(OUT)"
# Suffix -> what such a file is and how to get safetensors.
_SUFFIXES = {
    ".gguf": f"a GGUF file of llama.cpp, not safetensors; {_FROM_SOURCE}",
    ".onnx": f"an ONNX file, not safetensors; {_FROM_SOURCE}",
    ".tflite": f"a TensorFlow Lite file, not safetensors; {_FROM_SOURCE}",
    ".h5": f"TensorFlow weights, not safetensors; {_LOAD.format('from_tf')}",
    ".msgpack": f"Flax weights, not safetensors; {_LOAD.format('from_flax')}",
    ".npz": "a NumPy archive, not safetensors; save its arrays with safetensors.numpy.save_file",
    ".distcp": "part of a PyTorch distributed checkpoint, not safetensors; convert it with "
    "torch.distributed.checkpoint.format_utils, then save safetensors",
    ".zip": "an archive, not safetensors; unpack it and pass the directory",
    ".tar": "an archive, not safetensors; unpack it and pass the directory",
    ".gz": "an archive, not safetensors; unpack it and pass the directory",
    ".parquet": "a table of a dataset, not a model; pass a model in safetensors",
    ".arrow": "a table of a dataset, not a model; pass a model in safetensors",
}
_CONVERT = (
    "if you trust it, convert it once: "
    "safetensors.torch.save_file(torch.load(PATH, weights_only=True), OUT)"
)
_PICKLE = (
    "a PyTorch pickle, not safetensors; opening a pickle can run code, so it is never opened; "
    f"{_CONVERT}"
)
# First bytes -> what such a file is.
_MAGIC = {
    b"GGUF": _SUFFIXES[".gguf"],
    b"PK\x03\x04": _PICKLE,  # torch.save writes a zip archive that contains a pickle.
    b"\x80\x02": _PICKLE,
    b"\x80\x03": _PICKLE,
    b"\x80\x04": _PICKLE,
    b"\x80\x05": _PICKLE,
    b"\x89HDF\r\n\x1a\n": _SUFFIXES[".h5"],
    b"\x1f\x8b": _SUFFIXES[".gz"],
    b"PAR1": _SUFFIXES[".parquet"],
    b"ARROW1": _SUFFIXES[".arrow"],
}
_LFS = b"version https://git-lfs.github.com/spec"
_HTML = (b"<!doctype html", b"<html")


def shown(path: str | os.PathLike[str]) -> str:
    r"""Return a path for an error message, with control characters escaped.

    Example:
      >>> shown("model.safetensors"), shown("a\nb")
      ('model.safetensors', "'a\\nb'")
    """
    return listed([os.fspath(path)])


def pickle_error(path: str | os.PathLike[str]) -> str:
    """Return the error message for a pickle file."""
    return f"{shown(path)}: opening a pickle file can run code, so it is never opened; {_CONVERT}"


def content_error(path: Path, head: bytes) -> str | None:
    """Return the error message for a file that begins with the bytes of another format.

    Args:
      path: the file; the message names it
      head: its first bytes

    Returns:
      one line, or None if this module does not list the format

    Example:
      >>> content_error(Path("w.safetensors"), b"<!DOCTYPE html><html>").split(";")[0]
      'w.safetensors: an HTML page, not the file itself (did a download fail?)'
    """
    if head.startswith(_LFS):
        return (
            f"{shown(path)}: a Git LFS pointer, not the file itself; run `git lfs pull` in its "
            "repository"
        )
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
        return (
            f"{shown(path)}: an HTML page, not the file itself (did a download fail?); download "
            "the file again"
        )
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return f"{shown(path)}: {what}"
    return None


def suffix_error(path: Path) -> str | None:
    """Return the error message for a file name with the suffix of another format, or None."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        return pickle_error(path)
    return f"{shown(path)}: {_SUFFIXES[suffix]}" if suffix in _SUFFIXES else None


def read_head(path: Path) -> bytes:
    """Return the first bytes of a file; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def directory_without_safetensors(path: Path) -> str | None:
    """Return the error message for a directory with a model in another format, or a dataset.

    Args:
      path: the directory; it contains no safetensors file

    Returns:
      one line, or None if the directory contains no format that this module lists
    """
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    weights = [file for file in files if not file.name.startswith(_TRAINING)]
    if other_weights := [file for file in weights if file.suffix.lower() in PICKLES]:
        # If there are several, the one that transformers reads.
        return pickle_error(
            min(other_weights, key=lambda f: (not f.name.startswith("pytorch_model"), f.name))
        )
    names = {file.name for file in files}
    has_arrow = any(file.suffix == ".arrow" for file in files)
    tables = [*path.glob("*.parquet"), *path.glob("data/*.parquet")]
    dataset_files = names & {"dataset_info.json", "dataset_dict.json"}
    if dataset_files or tables or (has_arrow and "state.json" in names):
        return f"{shown(path)}: a dataset, not a model; pass a directory with safetensors"
    suffixes = list(_SUFFIXES)
    if other_weights := [file for file in weights if file.suffix.lower() in _SUFFIXES]:
        return suffix_error(
            min(other_weights, key=lambda f: (suffixes.index(f.suffix.lower()), f.name))
        )
    return None


def find_models(path: Path) -> Iterable[Path]:
    """Return the direct subdirectories that contain safetensors."""
    return sorted({file.parent for file in path.glob("[!.]*/[!.]*.safetensors*")})
