"""Checkpoints of several weight files with a folder or a role each: pipelines, modules, a head.

A diffusers pipeline (`model_index.json`) and a sentence-transformers model (`modules.json`) keep
weights in folders; a fine-tuned CLIP keeps its classifier in `head.safetensors`. Plan, report and
patterns name their tensors with the component in front: `unet/conv_in.weight`,
`head.safetensors:weight`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import HEAD, PICKLES, TensorFiles, read_json

PIPELINE, MODULES = "model_index.json", "modules.json"
ROUTER = "router_config.json"
# One of these is in the directory of every tokenizer.
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model",
              "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt")
# Weights in other formats: opened, so that the error names them.
_OTHER_WEIGHTS = (*PICKLES, ".h5", ".msgpack", ".onnx", ".gguf")
HEAD_PREFIX = f"{HEAD}:"


def folders(directory: Path) -> list[str]:
    """Folders of a directory that belong to its model; `''` is the directory itself.

    Raises:
        UserError: An index that is broken, or names a folder outside of the directory.
    """
    return [name for name in named_folders(directory)
            if not name or os.path.isdir(directory / name)]


def named_folders(directory: Path) -> list[str]:
    """The folders that a model's index names, whether they exist or not.

    Raises:
        UserError: As `folders`.
    """
    if (directory / PIPELINE).is_file():
        index = read_json(directory / PIPELINE)
        found = [""]
        found += [key for key, value in index.items() if isinstance(value, list)] \
            if isinstance(index, dict) else []
    elif (directory / MODULES).is_file():
        index = read_json(directory / MODULES)
        modules = index if isinstance(index, list) else []
        found = [entry["path"] for entry in modules
                 if isinstance(entry, dict) and isinstance(entry.get("path"), str)]
        found = ["", *found, *(f"{name}/{inner}" if name else inner for name in found
                               for inner in _routed(directory / name))]
    else:
        return [""]
    found = ["" if name == "." else name.rstrip("/") for name in found]
    if outside := [n for n in found if Path(n).is_absolute() or ".." in Path(n).parts]:
        raise UserError(f"{directory}: {outside[0]!r} is no folder of this model")
    return list(dict.fromkeys(found))


def _routed(module: Path) -> list[str]:
    """Folders in the folder of a sentence-transformers router."""
    if not (module / ROUTER).is_file():
        return []
    config = read_json(module / ROUTER)
    types = config.get("types") if isinstance(config, dict) else None
    return list(types) if isinstance(types, dict) else []


def tokenizer_folders(directory: Path) -> list[str]:
    """Folders of a model with a tokenizer; the directory itself where none has one.

    Example:
        >>> tokenizer_folders(Path("/nowhere"))
        ['']
    """
    found = [name for name in folders(directory) if any(
        (directory / name / file).is_file() for file in TOKENIZERS)]
    return found or [""]


def is_pipeline(directory: Path | None) -> bool:
    """Whether a directory is a diffusers pipeline."""
    return directory is not None and (directory / PIPELINE).is_file()


def open_all(path: Path) -> dict[str, tuple[str, TensorFiles]]:
    """The weight files of a checkpoint: prefix of a tensor's name -> output stem, and the files.

    Args:
        path: A directory, or a `.safetensors` file.

    Raises:
        UserError: No weights, or a file that cannot be read.
    """
    if not path.is_dir():
        return {"": ("model", TensorFiles(path))}
    found: dict[str, tuple[str, TensorFiles]] = {}
    for folder in _weight_folders(path):
        place = path / folder
        files = TensorFiles(place)
        prefix = f"{folder}/" if folder else ""
        found[prefix] = (prefix + files.stem, files)
    if not found:
        return {"": ("model", TensorFiles(path))}
    beside = path / HEAD
    model = found.get("")
    if model and beside.is_file() and beside not in model[1].files.values():
        found[HEAD_PREFIX] = (HEAD.removesuffix(".safetensors"), TensorFiles(beside))
    return found


def stored_name(name: str, components: Mapping[str, str]) -> str:
    """A tensor's name in its own file.

    Example:
        >>> stored_name("unet/conv.weight", {"unet/": "unet/model"})
        'conv.weight'
    """
    return name[len(prefix_of(name, components)):]


def prefix_of(name: str, components: Mapping[str, str]) -> str:
    """The component that a planned name belongs to, by its prefix."""
    return max((prefix for prefix in components if name.startswith(prefix)), key=len, default="")


def _weight_folders(directory: Path) -> list[str]:
    """Folders with weights; the top folder of a pipeline may hold them in another layout."""
    parts = folders(directory)
    if len(parts) == 1:
        return parts
    if (directory / PIPELINE).is_file() or not _is_module(directory, ""):
        parts = [name for name in parts if name]
    return [name for name in parts if _has_weights(directory / name)]


def _is_module(directory: Path, folder: str) -> bool:
    """Whether `modules.json` names a folder as a module of its own."""
    index = read_json(directory / MODULES)
    return any(isinstance(entry, dict) and entry.get("path") in (folder, folder or ".")
               for entry in (index if isinstance(index, list) else []))


def _has_weights(folder: Path) -> bool:
    return any(path.suffix == ".safetensors" or path.suffix in _OTHER_WEIGHTS
               or ".safetensors.index." in path.name for path in folder.iterdir()
               if not path.name.startswith("."))
