"""ImageNet-1K and its shifted test sets, from class folders or prepared records."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.image_folder import FileImages, LabeledImages, list_files, read_folders
from modelstock_jax.data.image_set import ImageSet, check_counts
from modelstock_jax.data.published_sets import CLASS_LISTS, IMAGENET, IMAGENET_SHIFTS
from modelstock_jax.data.records import (
    find_records,
    read_label_sets,
    read_metadata,
    read_records,
)
from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import read_json


def _lines(name: str) -> tuple[str, ...]:
    text = (CLASS_LISTS / name).read_text(encoding="utf-8")
    return tuple(text.removesuffix("\n").split("\n"))


WNIDS = _lines("imagenet_wnids.txt")
"""WordNet ids in ascending order; the label of a class is its index."""

CLASS_NAMES = _lines("imagenet.txt")
"""Names for prompts, by label; 'missile' and 'sunglasses' occur twice, as published."""

TEMPLATES = _lines("imagenet_templates.txt")
"""The 80 prompts of CLIP's authors; '{}' is the class name."""

_INDEX = {wnid: index for index, wnid in enumerate(WNIDS)}


def class_indices(wnids: Iterable[str]) -> tuple[int, ...]:
    """Return the labels of WordNet ids, in their order.

    Args:
      wnids: WordNet ids, for example the names of class folders

    Raises:
      UserError: an id is not in ImageNet-1K; the message names it

    Example:
      >>> class_indices(["n01443537", "n01440764"])
      (1, 0)
    """
    wnids = list(wnids)
    if unknown := [wnid for wnid in wnids if wnid not in _INDEX]:
        raise UserError(
            f"not among ImageNet's 1,000 classes: {listed(unknown, 5)}; name a class by its "
            "WordNet id, such as n01440764"
        )
    return tuple(_INDEX[wnid] for wnid in wnids)


CLASSES = {name: class_indices(_lines(info.wnids)) for name, info in IMAGENET.items() if info.wnids}
"""Labels of the classes of each dataset that has a subset of the 1,000, in ascending order. Its
logits are restricted to them."""

OBJECTNET_BORDER = 2  # Each ObjectNet image has a red frame of this many pixels.

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class ImageNetSets(NamedTuple):
    """The datasets of ImageNet.

    Attributes:
      train: training images without the held-out images; empty if the sets are only evaluated
      validation: held-out training images, `data.held_out_per_class` per class
      test: the 50,000 validation images of ImageNet, which papers use as the test set
      shifts: shifted test sets by name
      real_labels: the test images with ReaL's labels; None if not requested
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]
    real_labels: ImageSet | None


def open_sets(config: ConfigDict, *, training: bool = True) -> ImageNetSets:
    """Open every dataset of a config without reading any image.

    Args:
      config: the `data` group of `configs/default.py`
      training: False leaves the training images out, which need not exist then

    Raises:
      UserError: a dataset is missing, or is incomplete and `check_counts` is set
    """
    if missing := missing_sets(config, training=training):
        raise UserError("; ".join(missing))
    paths = {name: path for name, path in find_paths(config).items() if path is not None}
    check = config.check_counts
    if training:
        train = open_set("train", paths["train"], check_counts=check)
    else:
        train = ImageSet("train", np.zeros((0, 1, 1, 3), np.uint8), np.zeros(0, np.int32))
    train, validation = train.hold_out(config.held_out_per_class)
    test = open_set("validation", paths["validation"], check_counts=check)
    return ImageNetSets(
        train,
        validation,
        test,
        {n: open_set(n, paths[n], check_counts=check) for n in config.shifts or IMAGENET_SHIFTS},
        open_real(paths["real"], test) if config.real_labels else None,
    )


def open_set(name: str, path: str | Path, *, check_counts: bool = True) -> ImageSet:
    """Open one dataset, as distributed by its authors or as prepared records.

    Args:
      name: 'train', 'validation' (named 'id', as in the tables) or one of `IMAGENET_SHIFTS`
      path: class folders (WordNet ids; 0 to 999 for V2; ObjectNet's own, next to its `mappings`),
        the flat folder of ILSVRC2012_val_*.JPEG, or a directory with dataset_info.json
      check_counts: whether the number of classes and images must equal the published number

    Returns:
      The dataset; folders are read in the order of labels, then of file names.

    Raises:
      UserError: a folder is not a class of the dataset, or the dataset is incomplete
    """
    path = Path(path).expanduser()
    info, groups = IMAGENET[name], None
    if info.groups:
        stored, labels, groups = _objectnet(path)
    else:
        stored = _open(path, info.split)
        table = _labels_of(stored.names, stored.source)
        labels = np.asarray(table, np.int32)[stored.labels]
    if check_counts:
        check_complete(name, stored.source, labels)
    image_set = ImageSet(
        "id" if name == "validation" else name,
        stored.images,
        labels,
        classes=CLASSES.get(name),
        groups=groups,
        crop_border=0 if groups is None else _border(path),
    )
    # Only V2's folders are not in the order of their labels: '10' is before '2'.
    in_order = not isinstance(stored.images, FileImages) or (np.diff(labels) >= 0).all()
    return image_set if in_order else image_set.select(np.argsort(labels, kind="stable"))


def open_real(path: str | Path, test: ImageSet) -> ImageSet:
    """Open the validation images with ReaL's reassessed labels.

    Args:
      path: real.json, or the records of imagenet2012_real
      test: the validation set, whose images are used if `path` is real.json

    Raises:
      UserError: `path` is neither, or the name of a validation image does not contain its number
    """
    path = Path(path).expanduser()
    if find_records(path) is not None:
        stored = read_records(path, IMAGENET["real"].split, "original_label")
        sets = read_label_sets(stored.images, "real_label")
        table = np.asarray(_labels_of(stored.names, stored.source), np.int32)
        sets = tuple(tuple(int(table[label]) for label in labels) for labels in sets)
        return ImageSet("real", stored.images, table[stored.labels], label_sets=sets)
    sets_by_number, sets = real_labels(path), []
    for index in range(len(test)):
        file = test.encoded.name(index)
        number = _NUMBER.search(file)
        if number is None or not 1 <= int(number[1]) <= len(sets_by_number):
            raise UserError(
                f"{file}: {path} needs file names such as ILSVRC2012_val_00000001.JPEG; keep the "
                "original file names, or set data.real_labels=False"
            )
        sets.append(sets_by_number[int(number[1]) - 1])
    return ImageSet("real", test.images, test.labels, label_sets=tuple(sets))


def _open(path: Path, split: str) -> LabeledImages:
    if find_records(path) is not None:
        return read_records(path, split)
    if any(path.glob("ILSVRC2012_val_*")):
        return _flat_validation(path)
    return read_folders(path)


def _flat_validation(path: Path) -> LabeledImages:
    """Open the images of one folder; TensorFlow Datasets contains the labels by file number."""
    listing = list_files(path)
    text = resources.files("tensorflow_datasets").joinpath(
        "datasets/imagenet2012/validation_labels.txt"
    )
    label_by_number = class_indices(text.read_text().split())
    numbers = []
    for name in (encoded_name.decode() for encoded_name in listing.names):
        number = _NUMBER.match(name)
        if number is None or not 1 <= int(number[1]) <= len(label_by_number):
            raise UserError(
                f"{path / name}: not an image of ImageNet's validation set, which has names such "
                "as ILSVRC2012_val_00000001.JPEG; remove it"
            )
        numbers.append(int(number[1]))
    labels = np.array([label_by_number[number - 1] for number in numbers], np.int32)
    return LabeledImages(FileImages(listing), labels, WNIDS, str(path))


def _labels_of(names: Sequence[str], source: str) -> tuple[int, ...]:
    """Return the labels of class names that are WordNet ids or numbers."""
    if all(name.isdecimal() for name in names):
        if outside := [name for name in names if int(name) >= len(WNIDS)]:
            raise UserError(f"{source}: class {outside[0]} is not one of 0 to {len(WNIDS) - 1}")
        return tuple(int(name) for name in names)
    try:
        return class_indices(names)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _objectnet(path: Path) -> tuple[LabeledImages, np.ndarray, tuple[tuple[int, ...], ...]]:
    records = find_records(path)
    if records is not None:
        stored = read_records(records, "test")
        groups = read_metadata(records).get("groups")
        if groups is None:
            raise UserError(
                f"{records}: has no mapping to ImageNet's classes; prepare it from ObjectNet's "
                "folders: python -m modelstock_jax.data prepare DIR --set objectnet --out OUT"
            )
        return stored, stored.labels, tuple(map(tuple, groups))
    folders = objectnet_classes(path / "mappings")
    stored = read_folders(path / "images", folders)
    label_of = {folder: label for label, folder in enumerate(folders)}
    table = np.array([label_of[folder] for folder in stored.names], np.int32)
    return stored, table[stored.labels], tuple(folders.values())


def _border(path: Path) -> int:
    records = find_records(path)
    return OBJECTNET_BORDER if records is None else read_metadata(records)["crop_border"]


def find_paths(config: ConfigDict) -> dict[str, Path | None]:
    """Return the path of each dataset of a config, or None if it was not found.

    Args:
      config: the `data` group of `configs/default.py`

    Raises:
      UserError: there is no shifted test set of that name
    """
    if unknown := [name for name in config.shifts if name not in IMAGENET_SHIFTS]:
        choices = ", ".join(IMAGENET_SHIFTS)
        raise UserError(f"data.shifts: no shift {unknown[0]!r}; choose from {choices}")
    shifts = config.shifts or IMAGENET_SHIFTS
    names = ["train", "validation", *shifts, *["real"] * bool(config.real_labels)]
    return {name: _find_path(config, name) for name in names}


def _find_path(config: ConfigDict, name: str) -> Path | None:
    root = Path(config.root).expanduser()
    path = config.paths.get(name)
    candidates = (root / location for location in ([path] if path else IMAGENET[name].locations))
    return next((path for path in candidates if path.exists()), None)


# Dataset -> how to run without it.
_LEAVE_OUT = dict.fromkeys(IMAGENET_SHIFTS, ", or leave it out of data.shifts") | {
    "real": ", or set --config.data.real_labels=False"
}


def missing_sets(config: ConfigDict, *, training: bool = True) -> list[str]:
    """Return one line per missing dataset of a config; see `open_sets`."""
    return [
        f"data.paths.{name}={config.paths[name]}: no such file or directory"
        if config.paths.get(name)
        else f"no {' or '.join(IMAGENET[name].locations)} in data.root={config.root}; "
        f"give --config.data.paths.{name}=PATH" + _LEAVE_OUT.get(name, "")
        for name, path in find_paths(config).items()
        if path is None and (training or name != "train")
    ]


def check_complete(name: str, source: str, labels: np.ndarray) -> None:
    """Check that a dataset has its published number of classes and images.

    Args:
      name: one of `IMAGENET`
      source: path of the dataset, for the message
      labels: int32 [M]

    Raises:
      UserError: one line that lists all missing classes and wrong counts
    """
    info = IMAGENET[name]
    class_name = "class {}".format if info.groups else WNIDS.__getitem__
    check_counts(name, source, labels, info.published, class_name, CLASSES.get(name))


def real_labels(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], ...]:
    """Read the reassessed labels of each validation image: ReaL (Beyer et al. 2020).

    A prediction is correct if it is among an image's labels; an image without labels is not
    counted.

    Args:
      path: `real.json` of github.com/google-research/reassessed-imagenet: a list of 50,000 lists
        of labels, in which item i belongs to ILSVRC2012_val_{i + 1:08}.JPEG

    Returns:
      50,000 tuples of labels from 0 to 999, some of them empty.

    Raises:
      UserError: there is no such file, or its content is wrong; the message names the first wrong
        item
    """
    path, num_images = Path(path), IMAGENET["real"].published.images
    items = read_json(path)
    if not isinstance(items, list) or len(items) != num_images:
        content = f"{len(items):,} items" if isinstance(items, list) else type(items).__name__
        raise UserError(
            f"{path}: {content}, not a list of {num_images:,} lists of labels; give real.json"
        )
    for index, labels in enumerate(items):
        # `type(...) is`, because bool is a subclass of int.
        if not isinstance(labels, list) or any(
            type(label) is not int or not 0 <= label < len(WNIDS) for label in labels
        ):
            raise UserError(f"{path}: item {index} is {labels!r}, not a list of labels 0 to 999")
    return tuple(map(tuple, items))


# Files in ObjectNet's directory `mappings`.
FOLDERS = "folder_to_objectnet_label.json"
OVERLAP = "objectnet_to_imagenet_1k.json"
SYNONYMS = "imagenet_to_label_2012_v2"
LINES = "pytorch_to_imagenet_2012_id.json"


def objectnet_classes(mappings: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the ImageNet labels of each of the 113 classes that ObjectNet shares with ImageNet.

    The logit of a class is the largest logit of its labels. Folders without an ImageNet class are
    left out.

    Args:
      mappings: the directory `mappings` of ObjectNet 1.0 (Barbu et al. 2019), with
        folder_to_objectnet_label.json (folder -> class), objectnet_to_imagenet_1k.json (class ->
        names of ImageNet classes, separated by '; '), imagenet_to_label_2012_v2 (1,000 lines of
        such names) and pytorch_to_imagenet_2012_id.json (label -> line number from 0)

    Returns:
      {folder: labels in ascending order}, in alphabetical order of the folders; each label has
      at most one folder.

    Raises:
      UserError: a file is missing or has another format, or the files are inconsistent
    """
    mappings = Path(mappings)
    names = _synonyms(mappings / SYNONYMS)
    labels = _labels_by_line(mappings / LINES)
    folders = {}
    for folder, name in _texts(mappings / FOLDERS).items():
        if folders.setdefault(name, folder) != folder:
            raise UserError(f"{mappings / FOLDERS}: {name!r} has two folders")
    classes: dict[str, tuple[int, ...]] = {}
    class_of: dict[int, str] = {}
    for name, synonym_lists in _texts(mappings / OVERLAP).items():
        prefix = f"{mappings / OVERLAP}: {name!r}"
        if name not in folders:
            raise UserError(f"{prefix} has no folder in {FOLDERS}")
        class_labels = []
        for synonyms in synonym_lists.split("; "):
            lines = [line for line, text in enumerate(names) if text == synonyms]
            if len(lines) != 1:
                raise UserError(f"{prefix}: {synonyms!r} is on {len(lines)} lines of {SYNONYMS}")
            label = labels[lines[0]]
            if class_of.setdefault(label, name) != name:
                raise UserError(
                    f"{prefix} shares ImageNet's class {label} with {class_of[label]!r}"
                )
            class_labels.append(label)
        classes[folders[name]] = tuple(sorted(class_labels))
    num_shared = IMAGENET["objectnet"].published.classes
    if len(classes) != num_shared:
        raise UserError(
            f"{mappings / OVERLAP}: {len(classes)} classes; ObjectNet 1.0 shares {num_shared} with "
            "ImageNet"
        )
    return dict(sorted(classes.items()))


def _texts(path: Path) -> dict[str, str]:
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(x, str) for x in values.values()):
        raise UserError(f"{path}: not a JSON object of strings")
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
    all_lines = list(range(len(WNIDS)))
    if not isinstance(lines, dict) or sorted(lines) != sorted(map(str, all_lines)):
        raise UserError(f"{path}: not a JSON object with the keys '0' to '999'")
    labels = {line: int(label) for label, line in lines.items() if type(line) is int}
    if sorted(labels) != all_lines:
        raise UserError(f"{path}: its values are not the lines 0 to 999, each once")
    return [labels[line] for line in all_lines]
