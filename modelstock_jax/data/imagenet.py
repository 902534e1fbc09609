"""ImageNet-1K and its shifts, from class folders or from prepared records."""

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
from modelstock_jax.data.records import facts, find_records, read_label_sets, read_records
from modelstock_jax.errors import UserError, listed
from modelstock_jax.tensor_files.reader import read_json

# The 1,000 classes of ImageNet-1K, and those of them that its shifts hold.


def _lines(name: str) -> tuple[str, ...]:
    text = (CLASS_LISTS / name).read_text(encoding="utf-8")
    return tuple(text.removesuffix("\n").split("\n"))


WNIDS = _lines("imagenet_wnids.txt")
"""WordNet ids in ascending order: a class's label is its place here."""

CLASS_NAMES = _lines("imagenet.txt")
"""Names for prompts, by label; 'missile' and 'sunglasses' stand twice, as published."""

TEMPLATES = _lines("imagenet_templates.txt")
"""The 80 prompts of CLIP's authors; '{}' stands for the class name."""

_INDEX = {wnid: index for index, wnid in enumerate(WNIDS)}


def class_indices(wnids: Iterable[str]) -> tuple[int, ...]:
    """Labels of WordNet ids, in the order given.

    Args:
      wnids: such as the names of a data set's class folders.

    Raises:
      UserError: ids that ImageNet-1K does not have; it names them.

    Example:
      >>> class_indices(["n01443537", "n01440764"])
      (1, 0)
    """
    wnids = list(wnids)
    if unknown := [wnid for wnid in wnids if wnid not in _INDEX]:
        raise UserError(
            f"not among ImageNet's 1,000 classes: {listed(unknown, 5)}; a class is "
            "named by its WordNet id, such as n01440764"
        )
    return tuple(_INDEX[wnid] for wnid in wnids)


CLASSES = {name: class_indices(_lines(one.wnids)) for name, one in IMAGENET.items() if one.wnids}
"""By set, where it has not all of the 1,000: the labels of its classes, ascending, to which its
logits are restricted."""


# Its sets, opened.

OBJECTNET_BORDER = 2  # pixels of red frame around each of its images

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


class ImageNetSets(NamedTuple):
    """What a study needs of ImageNet.

    Attributes:
      train: without the held-out images.
      validation: held out of the training images, `data.held_out_per_class` a class.
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
    train, validation = train.hold_out(config.held_out_per_class)
    test = open_set("validation", found["validation"], check_counts=check)
    return ImageNetSets(
        train,
        validation,
        test,
        {n: open_set(n, found[n], check_counts=check) for n in config.shifts or IMAGENET_SHIFTS},
        open_real(found["real"], test) if config.real_labels else None,
    )


def open_set(name: str, path: str | Path, *, check_counts: bool = True) -> ImageSet:
    """One set, as its authors distribute it or as records.

    Args:
      name: 'train', 'validation' (named 'id', as in the tables) or one of `IMAGENET_SHIFTS`.
      path: class folders (ids of WordNet; V2's 0 to 999; ObjectNet's own beside its `mappings`),
        the flat folder of ILSVRC2012_val_*.JPEG, or a directory with dataset_info.json.
      check_counts: whether classes and images must be as many as were published.

    Returns:
      The set; folders are read in the order of labels, then of file names.

    Raises:
      UserError: a folder that is none of the set's classes, or a set that is not whole.
    """
    path = Path(path).expanduser()
    known, groups = IMAGENET[name], None
    if known.groups:
        stored, labels, groups = _objectnet(path)
    else:
        stored = _stored(path, known.split)
        table = _labels_of(stored.names, stored.place)
        labels = np.asarray(table, np.int32)[stored.labels]
    if check_counts:
        check_complete(name, stored.place, labels)
    whole = ImageSet(
        "id" if name == "validation" else name,
        stored.images,
        labels,
        classes=CLASSES.get(name),
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
        stored = read_records(path, IMAGENET["real"].split, "original_label")
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
                "names that the images came with, or set data.real_labels=False"
            )
        sets.append(of_number[int(number[1]) - 1])
    return ImageSet("real", test.images, test.labels, label_sets=tuple(sets))


def _stored(path: Path, split: str) -> LabeledImages:
    if find_records(path) is not None:
        return read_records(path, split)
    if any(path.glob("ILSVRC2012_val_*")):
        return _flat_validation(path)
    return read_folders(path)


def _flat_validation(path: Path) -> LabeledImages:
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
    return LabeledImages(FileImages(listing), labels, WNIDS, str(path))


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


def _objectnet(path: Path) -> tuple[LabeledImages, np.ndarray, tuple[tuple[int, ...], ...]]:
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


# Where ImageNet and its shifts lie on a disk.


def places(config: ConfigDict) -> dict[str, Path | None]:
    """Where each set that a config asks for lies, None where it was not found.

    Args:
      config: the `data` group of `configs/default.py`.

    Raises:
      UserError: a name that is no set's.
    """
    if unknown := [name for name in config.shifts if name not in IMAGENET_SHIFTS]:
        known = ", ".join(IMAGENET_SHIFTS)
        raise UserError(f"data.shifts: no shift {unknown[0]!r}; ImageNet's are {known}")
    shifts = config.shifts or IMAGENET_SHIFTS
    names = ["train", "validation", *shifts, *["real"] * bool(config.real_labels)]
    return {name: _place(config, name) for name in names}


def _place(config: ConfigDict, name: str) -> Path | None:
    root = Path(config.root).expanduser()
    named = config.paths.get(name)
    found = (root / place for place in ([named] if named else IMAGENET[name].places))
    return next((path for path in found if path.exists()), None)


def missing_sets(config: ConfigDict) -> list[str]:
    """One line for each set that is asked for and is not there."""
    return [
        f"data.paths.{name}={config.paths[name]}: nothing there"
        if config.paths.get(name)
        else f"no {' or '.join(IMAGENET[name].places)} in data.root={config.root}; "
        f"give --config.data.paths.{name}=PATH"
        + (", or leave it out of data.shifts" if name in IMAGENET_SHIFTS else "")
        for name, place in places(config).items()
        if place is None
    ]


# Is a set of ImageNet's whole: as many classes and images as its authors published?


def check_complete(name: str, place: str, labels: np.ndarray) -> None:
    """Compares a set with its published counts.

    Args:
      name: one of `IMAGENET`.
      place: where it lies, for the message.
      labels: int32 [M].

    Raises:
      UserError: one line with everything that is too few, too many or missing.
    """
    known = IMAGENET[name]
    class_name = "class {}".format if known.groups else WNIDS.__getitem__
    check_counts(name, place, labels, known.published, class_name, CLASSES.get(name))


# Reassessed labels of ImageNet's validation images: ReaL (Beyer et al. 2020).


def real_labels(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], ...]:
    """The labels that ReaL gives each validation image.

    A prediction is right where it is among an image's labels; an image without any is left out.

    Args:
      path: `real.json` as github.com/google-research/reassessed-imagenet has it: a list of 50,000
        lists of labels; item i belongs to ILSVRC2012_val_{i + 1:08}.JPEG.

    Returns:
      50,000 tuples of labels 0 to 999, some of them empty.

    Raises:
      UserError: no such file, or it is something else; it names the first wrong item.
    """
    path, images = Path(path), IMAGENET["real"].published.images
    items = read_json(path)
    if not isinstance(items, list) or len(items) != images:
        found = f"{len(items):,} items" if isinstance(items, list) else type(items).__name__
        raise UserError(f"{path}: {found}, not a list of {images:,} lists of labels; not real.json")
    for place, labels in enumerate(items):
        # bool is an int, and a label.
        if not isinstance(labels, list) or any(
            type(label) is not int or not 0 <= label < len(WNIDS) for label in labels
        ):
            raise UserError(f"{path}: item {place} is {labels!r}, not a list of labels 0 to 999")
    return tuple(map(tuple, items))


# ObjectNet's classes in terms of ImageNet's, from the files that come with its images.

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
    for name, synonym_lists in _texts(mappings / OVERLAP).items():
        where = f"{mappings / OVERLAP}: {name!r}"
        if name not in folders:
            raise UserError(f"{where} has no folder in {FOLDERS}")
        found = []
        for synonyms in synonym_lists.split("; "):
            lines = [line for line, text in enumerate(names) if text == synonyms]
            if len(lines) != 1:
                raise UserError(f"{where}: {synonyms!r} is on {len(lines)} lines of {SYNONYMS}")
            label = labels[lines[0]]
            if taken.setdefault(label, name) != name:
                raise UserError(f"{where} shares ImageNet's class {label} with {taken[label]!r}")
            found.append(label)
        classes[folders[name]] = tuple(sorted(found))
    shared = IMAGENET["objectnet"].published.classes
    if len(classes) != shared:
        raise UserError(
            f"{mappings / OVERLAP}: {len(classes)} classes; ObjectNet 1.0 shares {shared} with "
            "ImageNet"
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
