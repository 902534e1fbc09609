"""Anyone's own images: class folders to train on, and folders of shifts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.image_folder import LabeledImages, read_folders
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.records import find_records, read_records
from modelstock_jax.errors import UserError

PLACES = {
    "train": ("train",),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
"""Where each set is looked for below `data.root`; the first that is there is taken."""

SHIFTS = "shifts"
"""The folder of the shifts' folders."""

TEMPLATE = "a photo of a {}."


class CustomSets(NamedTuple):
    """What a study needs of a user's own images."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


def open_sets(config: ConfigDict) -> CustomSets:
    """Opens ROOT/{train,val,test,shifts/NAME}/CLASS/*.jpg; no image is read.

    A label is the place of a folder's name among those of the training set, sorted as text. A set
    may also be prepared records. Where there is no folder for validation or test, a share of each
    class is drawn for it, always the same; where there is no `train`, ROOT holds the class folders
    themselves. A shift with some of the classes only is scored among those.

    Args:
      config: the `data` group of `configs/default.py`.

    Raises:
      UserError: nothing there, a folder that is no class of the training set, or a class with too
        few images to draw from.
    """
    if not config.root:
        raise UserError("data.root is not set; give your images' directory: --config.data.root=DIR")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={config.root}: no such directory; give that of your images")
    found = {name: _place(config, root, name) for name in PLACES}
    place = found["train"]
    stored = read_folders(root, _classes(root)) if place is None else _stored(place)
    train = ImageSet("train", stored.images, stored.labels)
    sets = {}
    for key, name, share in (
        ("test", "id", config.test_fraction),
        ("validation", "validation", config.validation_fraction),
    ):
        if (place := found[key]) is not None:
            sets[key] = _aligned(name, _stored(place), stored.names)
        else:
            train, sets[key] = train.hold_out(float(share), name, class_names=stored.names)
    shifts = {
        name: _aligned(name, _stored(path), stored.names)
        for name, path in _shifts(config, root).items()
    }
    class_names = tuple(name.replace("_", " ") for name in stored.names)
    return CustomSets(train, sets["validation"], sets["test"], shifts, class_names, (TEMPLATE,))


def _place(config: ConfigDict, root: Path, name: str) -> Path | None:
    if named := config.paths[name]:
        if not (root / named).is_dir():
            raise UserError(f"data.paths.{name}={named}: no such directory in {root}")
        return root / named
    return next((root / place for place in PLACES[name] if (root / place).is_dir()), None)


def _classes(root: Path) -> set[str]:
    """The folders of ROOT that are classes, where there is no folder of the training set."""
    others = {SHIFTS, *(place for places in PLACES.values() for place in places)}
    return {path.name for path in root.iterdir()} - others


def _shifts(config: ConfigDict, root: Path) -> dict[str, Path]:
    """Folders of the shifts by name: those that `data.shifts` names, else all that are there."""
    parent = root / SHIFTS
    there = sorted(path.name for path in parent.glob("[!.]*") if path.is_dir())
    if unknown := [name for name in config.shifts if name not in there]:
        raise UserError(
            f"data.shifts: no {parent / unknown[0]}; there are {', '.join(there) or 'none'}"
        )
    return {name: parent / name for name in config.shifts or there}


def _stored(path: Path) -> LabeledImages:
    return read_folders(path) if find_records(path) is None else read_records(path)


def _aligned(name: str, stored: LabeledImages, names: tuple[str, ...]) -> ImageSet:
    """A set under the labels of the training set's classes, scored among the classes it has."""
    place = {one: label for label, one in enumerate(names)}
    if unknown := [one for one in stored.names if one not in place]:
        raise UserError(
            f"{stored.place}: {unknown[0]!r} is no class of the training set; its "
            f"{len(names)} classes are {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
        )
    labels = np.array([place[one] for one in stored.names], np.int32)[stored.labels]
    present = tuple(np.unique(labels).tolist())
    classes = None if len(present) == len(names) else present
    return ImageSet(name, stored.images, labels, classes)
