"""Files and directories in other formats than safetensors, named so that a user can act on it.

Nothing is opened beyond its first bytes, and nothing is unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from modelstock_jax.errors import listed

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HEAD = 512  # Bytes that identify a format.

# Pickles that a trainer saves next to the weights; they hold no weights.
_TRAINING = ("optimizer", "rng_state", "scaler", "scheduler", "training_args", "trainer_state")

_FROM_SOURCE = "give the model that it was made from, in safetensors"
_LOAD = "load it with transformers 4 (from_pretrained(DIR, {0}=True)) and save_pretrained(OUT)"
# Suffix -> what such a file is, and how to get safetensors.
_SUFFIXES = {
    ".gguf": f"a GGUF file of llama.cpp, not safetensors; {_FROM_SOURCE}",
    ".onnx": f"an ONNX file, not safetensors; {_FROM_SOURCE}",
    ".tflite": f"a TensorFlow Lite file, not safetensors; {_FROM_SOURCE}",
    ".h5": f"TensorFlow weights, not safetensors; {_LOAD.format('from_tf')}",
    ".msgpack": f"Flax weights, not safetensors; {_LOAD.format('from_flax')}",
    ".npz": "a NumPy archive, not safetensors; save its arrays with safetensors.numpy.save_file",
    ".distcp": "a part of a PyTorch distributed checkpoint, not safetensors; convert it once with "
    "torch.distributed.checkpoint.format_utils, then save safetensors",
    ".zip": "an archive, not safetensors; unpack it and give the directory",
    ".tar": "an archive, not safetensors; unpack it and give the directory",
    ".gz": "an archive, not safetensors; unpack it and give the directory",
    ".parquet": "a table of a dataset, not a model; give a model in safetensors",
    ".arrow": "a table of a dataset, not a model; give a model in safetensors",
}
_CONVERT = (
    "convert it once where you trust it: "
    "safetensors.torch.save_file(torch.load(PATH, weights_only=True), OUT)"
)
_PICKLE = (
    "a PyTorch pickle, not safetensors; a pickle can run code when it is opened, so it is never "
    f"opened; {_CONVERT}"
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
    r"""A path for an error message: control characters are escaped.

    Example:
        >>> shown("model.safetensors"), shown("a\nb")
        ('model.safetensors', "'a\\nb'")
    """
    return listed([os.fspath(path)])


def pickled(path: str | os.PathLike[str]) -> str:
    """The error message for a pickle file."""
    why = "a pickle file can run code when it is opened, so it is refused"
    return f"{shown(path)}: {why}; {_CONVERT}."


def by_content(path: Path, head: bytes) -> str | None:
    """The error message for a file that begins with bytes of another format.

    Args:
        path: The file; the message names it.
        head: Its first bytes.

    Returns:
        One line, or None where the bytes are of no format that is listed here.

    Example:
        >>> by_content(Path("w.safetensors"), b"<!DOCTYPE html><html>").split(";")[0]
        'w.safetensors: an HTML page, not the file itself (a download that failed?)'
    """
    if head.startswith(_LFS):
        return (
            f"{shown(path)}: a Git LFS pointer, not the file itself; run `git lfs pull` in its "
            "repository."
        )
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
        return (
            f"{shown(path)}: an HTML page, not the file itself (a download that failed?); download "
            "the file again."
        )
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return f"{shown(path)}: {what}."
    return None


def by_name(path: Path) -> str | None:
    """The error message for a file whose name has the suffix of another format, or None."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        return pickled(path)
    return f"{shown(path)}: {_SUFFIXES[suffix]}." if suffix in _SUFFIXES else None


def head_of(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def directory_without_safetensors(path: Path) -> str | None:
    """The error message for a directory that contains a model in another format, or a dataset.

    Args:
        path: The directory; it has no safetensors file.

    Returns:
        One line, or None where nothing in it is of a format that is listed here.
    """
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    weights = [file for file in files if not file.name.startswith(_TRAINING)]
    if found := [file for file in weights if file.suffix.lower() in PICKLES]:
        # The one that transformers reads, where there are several.
        return pickled(min(found, key=lambda f: (not f.name.startswith("pytorch_model"), f.name)))
    names = {file.name for file in files}
    arrow = any(file.suffix == ".arrow" for file in files)
    tables = [*path.glob("*.parquet"), *path.glob("data/*.parquet")]
    described = names & {"dataset_info.json", "dataset_dict.json"}
    if described or tables or (arrow and "state.json" in names):
        return f"{shown(path)}: a dataset, not a model; give a directory with safetensors."
    kinds = list(_SUFFIXES)
    if found := [file for file in weights if file.suffix.lower() in _SUFFIXES]:
        return by_name(min(found, key=lambda f: (kinds.index(f.suffix.lower()), f.name)))
    return None


def models_below(path: Path) -> Iterable[Path]:
    """Directories one level down that contain safetensors."""
    return sorted({file.parent for file in path.glob("[!.]*/[!.]*.safetensors*")})
