"""ImageNet-1K and its shifts, from class folders or from prepared records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from modelstock_jax.data.folders import FileImages, Labelled, read_folders
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.imagenet.classes import A_CLASSES, R_CLASSES, WNIDS, class_indices
from modelstock_jax.data.imagenet.objectnet import objectnet_classes
from modelstock_jax.data.imagenet.places import SHIFTS, missing_sets, places
from modelstock_jax.data.imagenet.real import real_labels
from modelstock_jax.data.imagenet.whole import check_whole
from modelstock_jax.data.listing import list_files
from modelstock_jax.data.records import facts, find_records, read_label_sets, read_records
from modelstock_jax.errors import UserError

SPLITS = {"train": "train", "validation": "validation", "real": "validation"}
"""Names of splits in prepared records; the other sets have 'test' alone."""
OBJECTNET_BORDER = 2  # pixels of red frame around each of its images

_CLASSES = {"r": R_CLASSES, "a": A_CLASSES}
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class ImageNetSets(NamedTuple):
    """What a study needs of ImageNet.

    Attributes:
      train: without the held-out images.
      validation: held out of the training images, `data.held_out` a class.
      test: the 50,000 validation images of ImageNet, which papers test on.
      shifts: by name.
      real: the test images under ReaL's labels; None where it was not asked for.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]
    real: ImageSet | None


def open_sets(config: ConfigDict) -> ImageNetSets:
    """Opens every set that a config asks for; no image is read.

    Args:
      config: the `data` group of `configs/default.py`.

    Raises:
      UserError: a set that is not there, or is not whole and `check_counts` is on.
    """
    if missing := missing_sets(config):
        raise UserError("; ".join(missing))
    found = {name: place for name, place in places(config).items() if place is not None}
    check = config.check_counts
    train = open_set("train", found["train"], check_counts=check)
    train, validation = train.hold_out(config.held_out)
    test = open_set("validation", found["validation"], check_counts=check)
    return ImageNetSets(
        train,
        validation,
        test,
        {n: open_set(n, found[n], check_counts=check) for n in config.shifts or SHIFTS},
        open_real(found["real"], test) if config.real else None,
    )


def open_set(name: str, path: str | Path, *, check_counts: bool = True) -> ImageSet:
    """One set, as its authors distribute it or as records.

    Args:
      name: 'train', 'validation' (named 'id', as in the tables) or one of `SHIFTS`.
      path: class folders (ids of WordNet; V2's 0 to 999; ObjectNet's own beside its `mappings`),
        the flat folder of ILSVRC2012_val_*.JPEG, or a directory with dataset_info.json.
      check_counts: whether classes and images must be as many as were published.

    Returns:
      The set; folders are read in the order of labels, then of file names.

    Raises:
      UserError: a folder that is none of the set's classes, or a set that is not whole.
    """
    path = Path(path).expanduser()
    groups = None
    if name == "objectnet":
        stored, labels, groups = _objectnet(path)
    else:
        stored = _stored(path, SPLITS.get(name, "test"))
        table = _labels_of(stored.names, stored.place)
        labels = np.asarray(table, np.int32)[stored.labels]
    classes = _CLASSES.get(name)
    if check_counts:
        check_whole(name, stored.place, labels, classes)
    whole = ImageSet(
        "id" if name == "validation" else name,
        stored.images,
        labels,
        classes=classes,
        groups=groups,
        crop_border=0 if groups is None else _border(path),
    )
    # Only V2's folders lie in another order than their labels, '10' before '2'.
    in_order = not isinstance(stored.images, FileImages) or (np.diff(labels) >= 0).all()
    return whole if in_order else whole.select(np.argsort(labels, kind="stable"))


def open_real(path: str | Path, test: ImageSet) -> ImageSet:
    """The validation images under ReaL's reassessed labels.

    Args:
      path: real.json, or the records of imagenet2012_real.
      test: the validation set, whose images serve where `path` is real.json.

    Raises:
      UserError: neither, or a validation image whose number cannot be told from its name.
    """
    path = Path(path).expanduser()
    if find_records(path) is not None:
        stored = read_records(path, SPLITS["real"], "original_label")
        sets = read_label_sets(stored.images, "real_label")
        table = np.asarray(_labels_of(stored.names, stored.place), np.int32)
        sets = tuple(tuple(int(table[label]) for label in one) for one in sets)
        return ImageSet("real", stored.images, table[stored.labels], label_sets=sets)
    of_number, sets = real_labels(path), []
    for index in range(len(test)):
        file = test.encoded.name(index)
        number = _NUMBER.search(file)
        if number is None or not 1 <= int(number[1]) <= len(of_number):
            raise UserError(
                f"{file}: {path} needs file names such as ILSVRC2012_val_00000001.JPEG; keep the "
                "names that the images came with, or set data.real=False"
            )
        sets.append(of_number[int(number[1]) - 1])
    return ImageSet("real", test.images, test.labels, label_sets=tuple(sets))


def _stored(path: Path, split: str) -> Labelled:
    if find_records(path) is not None:
        return read_records(path, split)
    if any(path.glob("ILSVRC2012_val_*")):
        return _flat_validation(path)
    return read_folders(path)


def _flat_validation(path: Path) -> Labelled:
    """The images of one folder; their labels come with TensorFlow Datasets, by file number."""
    listing = list_files(path)
    text = resources.files("tensorflow_datasets").joinpath(
        "datasets/imagenet2012/validation_labels.txt"
    )
    of_number = class_indices(text.read_text().split())
    numbers = []
    for name in (one.decode() for one in listing.names):
        number = _NUMBER.match(name)
        if number is None or not 1 <= int(number[1]) <= len(of_number):
            raise UserError(
                f"{path / name}: no image of ImageNet's validation set, which lie here by names "
                "such as ILSVRC2012_val_00000001.JPEG; take it away"
            )
        numbers.append(int(number[1]))
    labels = np.array([of_number[number - 1] for number in numbers], np.int32)
    return Labelled(FileImages(listing), labels, WNIDS, str(path))


def _labels_of(names: Sequence[str], place: str) -> tuple[int, ...]:
    """Labels of the classes that a stored set names: ids of WordNet, or numbers."""
    if all(name.isdecimal() for name in names):
        if outside := [name for name in names if int(name) >= len(WNIDS)]:
            raise UserError(f"{place}: class {outside[0]} is not one of 0 to {len(WNIDS) - 1}")
        return tuple(int(name) for name in names)
    try:
        return class_indices(names)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def _objectnet(path: Path) -> tuple[Labelled, np.ndarray, tuple[tuple[int, ...], ...]]:
    records = find_records(path)
    if records is not None:
        stored = read_records(records, "test")
        groups = facts(records).get("groups")
        if groups is None:
            raise UserError(
                f"{records}: says nothing of ImageNet's classes; prepare it from ObjectNet's own "
                "folders: python -m modelstock_jax.data prepare DIR --set objectnet --out OUT"
            )
        return stored, stored.labels, tuple(map(tuple, groups))
    folders = objectnet_classes(path / "mappings")
    stored = read_folders(path / "images", folders)
    place = {folder: label for label, folder in enumerate(folders)}
    table = np.array([place[folder] for folder in stored.names], np.int32)
    return stored, table[stored.labels], tuple(folders.values())


def _border(path: Path) -> int:
    records = find_records(path)
    return OBJECTNET_BORDER if records is None else facts(records)["crop_border"]
