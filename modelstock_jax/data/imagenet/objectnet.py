"""ObjectNet's classes in terms of ImageNet's, from the files that come with its images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from modelstock_jax.data.imagenet.classes import WNIDS
from modelstock_jax.data.imagenet.published import PUBLISHED
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_json

FOLDERS = "folder_to_objectnet_label.json"
OVERLAP = "objectnet_to_imagenet_1k.json"
SYNONYMS = "imagenet_to_label_2012_v2"
LINES = "pytorch_to_imagenet_2012_id.json"


def objectnet_classes(mappings: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """The ImageNet labels that each of ObjectNet's 113 shared classes stands for.

    A class's logit is the largest among its labels'. Folders that are not named have no class in
    ImageNet and are left out.

    Args:
      mappings: the directory `mappings` of ObjectNet 1.0 (Barbu et al. 2019), with
        folder_to_objectnet_label.json (folder -> class), objectnet_to_imagenet_1k.json (class ->
        names of ImageNet classes, '; ' between them), imagenet_to_label_2012_v2 (1,000 lines of
        such names) and pytorch_to_imagenet_2012_id.json (label -> line, counted from 0).

    Returns:
      Folder -> labels in ascending order, by folder in alphabetical order; no label has two
      folders.

    Raises:
      UserError: a file is missing or of another format, or the files do not fit one another.
    """
    mappings = Path(mappings)
    names = _synonyms(mappings / SYNONYMS)
    labels = _labels_by_line(mappings / LINES)
    folders = {}
    for folder, name in _texts(mappings / FOLDERS).items():
        if folders.setdefault(name, folder) != folder:
            raise UserError(f"{mappings / FOLDERS}: {name!r} has two folders")
    classes: dict[str, tuple[int, ...]] = {}
    taken: dict[int, str] = {}
    for name, listed in _texts(mappings / OVERLAP).items():
        where = f"{mappings / OVERLAP}: {name!r}"
        if name not in folders:
            raise UserError(f"{where} has no folder in {FOLDERS}")
        found = []
        for synonyms in listed.split("; "):
            lines = [line for line, text in enumerate(names) if text == synonyms]
            if len(lines) != 1:
                raise UserError(f"{where}: {synonyms!r} is on {len(lines)} lines of {SYNONYMS}")
            label = labels[lines[0]]
            if taken.setdefault(label, name) != name:
                raise UserError(f"{where} shares ImageNet's class {label} with {taken[label]!r}")
            found.append(label)
        classes[folders[name]] = tuple(sorted(found))
    if len(classes) != PUBLISHED["objectnet"].classes:
        raise UserError(
            f"{mappings / OVERLAP}: {len(classes)} classes; ObjectNet 1.0 shares "
            f"{PUBLISHED['objectnet'].classes} with ImageNet"
        )
    return dict(sorted(classes.items()))


def _texts(path: Path) -> dict[str, str]:
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(x, str) for x in values.values()):
        raise UserError(f"{path}: not a JSON object of texts")
    return values


def _synonyms(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if len(lines) != len(WNIDS):
        raise UserError(f"{path}: {len(lines):,} lines, not {len(WNIDS):,}")
    return lines


def _labels_by_line(path: Path) -> list[int]:
    lines: Any = read_json(path)
    every = list(range(len(WNIDS)))
    if not isinstance(lines, dict) or sorted(lines) != sorted(map(str, every)):
        raise UserError(f"{path}: not a JSON object with the keys '0' to '999'")
    labels = {line: int(label) for label, line in lines.items() if type(line) is int}
    if sorted(labels) != every:
        raise UserError(f"{path}: its values are not the lines 0 to 999, each once")
    return [labels[line] for line in every]
