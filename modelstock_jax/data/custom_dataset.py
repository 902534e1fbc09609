"""Your own images: class folders to train on, and folders of shifted test sets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.image_folder import LabeledImages, read_folders
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.records import find_records, read_records
from modelstock_jax.errors import UserError

LOCATIONS = {
    "train": ("train",),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
"""Folders below `data.root` that are searched for each dataset; the first that exists is used."""

SHIFTS = "shifts"
"""The folder that contains the folders of the shifted test sets."""

TEMPLATE = "a photo of a {}."


class CustomSets(NamedTuple):
    """The datasets, class names and templates of your own images."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def open_sets(config: ConfigDict) -> CustomSets:
    """Open ROOT/{train,val,test,shifts/NAME}/CLASS/*.jpg without reading any image.

    The label of a class is the index of its folder name among the sorted folder names of the
    training set. A dataset may also be prepared records. If there is no folder for validation or
    test, a fixed random fraction of each class is held out. If there is no `train`, ROOT contains
    the class folders directly. A shifted test set with a subset of the classes is scored among
    those.

    Args:
      config: the `data` group of `configs/default.py`

    Raises:
      UserError: a directory does not exist, a folder is not a class of the training set, or a class
        has too few images to hold out
    """
    if not config.root:
        raise UserError("data.root is not set; give your images' directory: --config.data.root=DIR")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise UserError(
            f"data.root={config.root}: no such directory; give the directory of your images"
        )
    paths = {name: _find_path(config, root, name) for name in LOCATIONS}
    path = paths["train"]
    stored = read_folders(root, _classes(root)) if path is None else _open(path)
    train = ImageSet("train", stored.images, stored.labels)
    sets = {}
    for key, name, fraction in (
        ("test", "id", config.test_fraction),
        ("validation", "validation", config.validation_fraction),
    ):
        if (path := paths[key]) is not None:
            sets[key] = _align_labels(name, _open(path), stored.names)
        else:
            train, sets[key] = train.hold_out(float(fraction), name, class_names=stored.names)
    shifts = {
        name: _align_labels(name, _open(path), stored.names)
        for name, path in _shifts(config, root).items()
    }
    class_names = tuple(name.replace("_", " ") for name in stored.names)
    return CustomSets(train, sets["validation"], sets["test"], shifts, class_names, (TEMPLATE,))


def _find_path(config: ConfigDict, root: Path, name: str) -> Path | None:
    if path := config.paths[name]:
        if not (root / path).is_dir():
            raise UserError(f"data.paths.{name}={path}: no such directory in {root}")
        return root / path
    return next((root / folder for folder in LOCATIONS[name] if (root / folder).is_dir()), None)


def _classes(root: Path) -> set[str]:
    """Return the class folders in ROOT, for the case that there is no `train` folder."""
    reserved = {SHIFTS, *(folder for folders in LOCATIONS.values() for folder in folders)}
    return {path.name for path in root.iterdir()} - reserved


def _shifts(config: ConfigDict, root: Path) -> dict[str, Path]:
    """Return the folders of the shifted test sets: those in `data.shifts`, or all."""
    parent = root / SHIFTS
    available = sorted(path.name for path in parent.glob("[!.]*") if path.is_dir())
    if unknown := [name for name in config.shifts if name not in available]:
        raise UserError(
            f"data.shifts: no {parent / unknown[0]}; choose from {', '.join(available) or 'none'}"
        )
    return {name: parent / name for name in config.shifts or available}


def _open(path: Path) -> LabeledImages:
    return read_folders(path) if find_records(path) is None else read_records(path)


def _align_labels(name: str, stored: LabeledImages, names: tuple[str, ...]) -> ImageSet:
    """Return a dataset with the labels of the training set, scored among the classes it has."""
    label_of = {class_name: label for label, class_name in enumerate(names)}
    if unknown := [class_name for class_name in stored.names if class_name not in label_of]:
        raise UserError(
            f"{stored.source}: {unknown[0]!r} is not a class of the training set; its "
            f"{len(names)} classes are {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
        )
    table = np.array([label_of[class_name] for class_name in stored.names], np.int32)
    labels = table[stored.labels]
    present = tuple(np.unique(labels).tolist())
    classes = None if len(present) == len(names) else present
    return ImageSet(name, stored.images, labels, classes)
