"""CIFAR-10 and CIFAR-100 as TensorFlow Datasets prepared them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from modelstock_jax.data.image_set import ImageSet, check_counts
from modelstock_jax.data.prompts import read_class_names, read_templates
from modelstock_jax.data.published_sets import (
    CIFAR,
    CLASS_LISTS,
    CORRUPTIONS,
    NEW_TEST_SET,
    Published,
)
from modelstock_jax.data.records import find_records, read_records
from modelstock_jax.errors import UserError, listed

IMAGE_SHAPE = (32, 32, 3)

CLASS_NAMES = {
    name: read_class_names(CLASS_LISTS / f"{name}.txt", known.train.classes)
    for name, known in CIFAR.items()
}
"""By `data.name`, in the order of the labels."""

TEMPLATES = read_templates(CLASS_LISTS / "cifar_templates.txt")
"""The 18 prompts of CLIP's authors, the same for both sets; '{}' stands for the class name."""


class CifarSets(NamedTuple):
    """What a study needs of CIFAR.

    Attributes:
      train: without the held-out images.
      validation: held out of the training images, `data.held_out_per_class` a class.
      test: the 10,000 test images.
      shifts: by name.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]


def missing_sets(config: ConfigDict) -> list[str]:
    """One line for each set that is asked for and is not there, with the command that prepares it.

    Args:
      config: the `data` group of `configs/default.py`; `data.root` is the data_dir of TensorFlow
        Datasets.

    Raises:
      UserError: a shift that the set has not, or an option that is another data set's.
    """
    if given := [name for name, path in config.paths.items() if path]:
        raise UserError(
            f"data.paths.{given[0]}={config.paths[given[0]]}: {CIFAR[config.name].title} is looked "
            "for in data.root, by the names of TensorFlow Datasets; leave data.paths empty"
        )
    return [
        f"no {name} in data.root={config.root}; with TensorFlow installed, "
        f"`tfds build {name} --file_format=array_record --data_dir={config.root}` prepares it"
        + (", or leave it out of data.shifts" if name != config.name else "")
        for name in (config.name, *_shifts(config))
        if find_records(_root(config) / name) is None
    ]


def open_sets(config: ConfigDict) -> CifarSets:
    """Opens every set that a config asks for; no image is decoded.

    Args:
      config: the `data` group of `configs/default.py`. Without `data.shifts`, CIFAR-10.1 is taken
        where it is there.

    Raises:
      UserError: a set that is not there, is not CIFAR, or is not whole and `check_counts` is on.
    """
    if missing := missing_sets(config):
        raise UserError("; ".join(missing))
    known = CIFAR[config.name]
    train = _open(config, config.name, "train", known.train)
    train, validation = train.hold_out(
        config.held_out_per_class, class_names=CLASS_NAMES[config.name]
    )
    test = _open(config, config.name, "test", known.test, "id")
    shifts = {
        name: _open(config, name, "test", known.shifts[name], name) for name in _shifts(config)
    }
    return CifarSets(train, validation, test, shifts)


def _root(config: ConfigDict) -> Path:
    return Path(config.root).expanduser()


def _shifts(config: ConfigDict) -> tuple[str, ...]:
    known = CIFAR[config.name]
    if unknown := [name for name in config.shifts if name not in known.shifts]:
        close = difflib.get_close_matches(unknown[0], known.shifts, 1)
        meant = f"; did you mean {close[0]}" if close else ""
        has = "it has none"
        if known.shifts:
            has = (
                "it has cifar10_1/v6, cifar10_1/v4, and cifar10_corrupted/NAME_1 to NAME_5 for "
                f"NAME in {', '.join(CORRUPTIONS)}"
            )
        raise UserError(f"data.shifts: no shift {unknown[0]!r} of {known.title}{meant}; {has}")
    if config.shifts:
        return tuple(config.shifts)
    there = NEW_TEST_SET in known.shifts and find_records(_root(config) / NEW_TEST_SET)
    return (NEW_TEST_SET,) if there else ()


def _open(
    config: ConfigDict, place: str, split: str, published: Published, name: str = "train"
) -> ImageSet:
    known = CIFAR[config.name]
    stored = read_records(_root(config) / place, split)
    shape = tuple(stored.images.features["image"].shape)
    if shape != IMAGE_SHAPE:
        raise UserError(
            f"{stored.place}: images of shape {shape}, not {IMAGE_SHAPE}; this is not "
            f"{known.title}: give another data.root"
        )
    class_names = CLASS_NAMES[config.name]
    # TensorFlow Datasets names the classes of the training set, and only counts those of shifts.
    unnamed = tuple(str(label) for label in range(len(class_names)))
    names = tuple(one.replace("_", " ") for one in stored.names)
    if names not in (class_names, unnamed):
        raise UserError(
            f"{stored.place}: its {len(names)} classes ({listed(names, 5)}) are not the "
            f"{len(unnamed)} of {known.title} ({listed(class_names, 5)}) in their order; "
            "give another data.root"
        )
    if config.check_counts:
        check_counts(name, stored.place, stored.labels, published, class_names.__getitem__)
    return ImageSet(name, stored.images, stored.labels)
