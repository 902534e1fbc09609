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
HEAD_PREFIX = f"{HEAD}:"


def folders(directory: Path) -> list[str]:
    """Folders of a directory that belong to its model; `''` is the directory itself.

    Raises:
        UserError: An index that is broken, or names a folder outside of the directory.
    """
    if (directory / PIPELINE).is_file():
        index = read_json(directory / PIPELINE)
        named = [key for key, value in index.items() if isinstance(value, list)] \
            if isinstance(index, dict) else []
    elif (directory / MODULES).is_file():
        index = read_json(directory / MODULES)
        modules = index if isinstance(index, list) else []
        named = [entry["path"] for entry in modules
                 if isinstance(entry, dict) and isinstance(entry.get("path"), str)]
    else:
        return [""]
    if outside := [n for n in named if Path(n).is_absolute() or ".." in Path(n).parts]:
        raise UserError(f"{directory}: {outside[0]!r} is no folder of this model")
    return [name for name in dict.fromkeys(named) if os.path.isdir(directory / name)]


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
    for folder in folders(path):
        place = path / folder
        if folder and not _has_weights(place):
            continue
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


def _has_weights(folder: Path) -> bool:
    return any(path.suffix == ".safetensors" or path.suffix in PICKLES
               or path.name.endswith(".safetensors.index.json") for path in folder.iterdir())
