"""CIFAR-10 and CIFAR-100 as prepared by TensorFlow Datasets."""

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
    name: read_class_names(CLASS_LISTS / f"{name}.txt", cifar.train.classes)
    for name, cifar in CIFAR.items()
}
"""By `data.name`, in the order of the labels."""

TEMPLATES = read_templates(CLASS_LISTS / "cifar_templates.txt")
"""The 18 prompts of CLIP's authors, the same for both datasets; '{}' is the class name."""


class CifarSets(NamedTuple):
    """The datasets of a CIFAR benchmark.

    Attributes:
      train: training images without the held-out images
      validation: held-out training images, `data.held_out_per_class` per class
      test: the 10,000 test images
      shifts: shifted test sets by name
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]


def missing_sets(config: ConfigDict) -> list[str]:
    """Return one line per missing dataset, with the command that prepares it.

    Args:
      config: the `data` group of `configs/default.py`; `data.root` is the data_dir of TensorFlow
        Datasets

    Raises:
      UserError: there is no such shifted test set, or an option does not apply to CIFAR
    """
    if names := [name for name, path in config.paths.items() if path]:
        raise UserError(
            f"data.paths.{names[0]}={config.paths[names[0]]}: {CIFAR[config.name].title} is "
            "searched in data.root by the names of TensorFlow Datasets; leave data.paths empty"
        )
    return [
        f"no {name} in data.root={config.root}; with TensorFlow installed, "
        f"`tfds build {name} --file_format=array_record --data_dir={config.root}` prepares it"
        + (", or leave it out of data.shifts" if name != config.name else "")
        for name in (config.name, *_shifts(config))
        if find_records(_root(config) / name) is None
    ]


def open_sets(config: ConfigDict) -> CifarSets:
    """Open every dataset of a config without decoding any image.

    Args:
      config: the `data` group of `configs/default.py`; if `data.shifts` is empty, CIFAR-10.1 is
        used if it exists

    Raises:
      UserError: a dataset is missing, is not CIFAR, or is incomplete and `check_counts` is set
    """
    if missing := missing_sets(config):
        raise UserError("; ".join(missing))
    cifar = CIFAR[config.name]
    train = _open(config, config.name, "train", cifar.train)
    train, validation = train.hold_out(
        config.held_out_per_class, class_names=CLASS_NAMES[config.name]
    )
    test = _open(config, config.name, "test", cifar.test, "id")
    shifts = {
        name: _open(config, name, "test", cifar.shifts[name], name) for name in _shifts(config)
    }
    return CifarSets(train, validation, test, shifts)


def _root(config: ConfigDict) -> Path:
    return Path(config.root).expanduser()


def _shifts(config: ConfigDict) -> tuple[str, ...]:
    cifar = CIFAR[config.name]
    if unknown := [name for name in config.shifts if name not in cifar.shifts]:
        close = difflib.get_close_matches(unknown[0], cifar.shifts, 1)
        hint = f"; did you mean {close[0]}" if close else ""
        choices = "it has none"
        if cifar.shifts:
            choices = (
                "it has cifar10_1/v6, cifar10_1/v4, and cifar10_corrupted/NAME_1 to NAME_5 for "
                f"NAME in {', '.join(CORRUPTIONS)}"
            )
        raise UserError(f"data.shifts: no shift {unknown[0]!r} of {cifar.title}{hint}; {choices}")
    if config.shifts:
        return tuple(config.shifts)
    exists = NEW_TEST_SET in cifar.shifts and find_records(_root(config) / NEW_TEST_SET)
    return (NEW_TEST_SET,) if exists else ()


def _open(
    config: ConfigDict, folder: str, split: str, published: Published, name: str = "train"
) -> ImageSet:
    title = CIFAR[config.name].title
    stored = read_records(_root(config) / folder, split)
    shape = tuple(stored.images.features["image"].shape)
    if shape != IMAGE_SHAPE:
        raise UserError(
            f"{stored.source}: images of shape {shape}, not {IMAGE_SHAPE}; this is not "
            f"{title}: give another data.root"
        )
    class_names = CLASS_NAMES[config.name]
    # TensorFlow Datasets names the classes of the training set, and numbers those of the shifts.
    numbers = tuple(str(label) for label in range(len(class_names)))
    names = tuple(name.replace("_", " ") for name in stored.names)
    if names not in (class_names, numbers):
        raise UserError(
            f"{stored.source}: its {len(names)} classes ({listed(names, 5)}) are not the "
            f"{len(numbers)} of {title} ({listed(class_names, 5)}) in their order; "
            "give another data.root"
        )
    if config.check_counts:
        check_counts(name, stored.source, stored.labels, published, class_names.__getitem__)
    return ImageSet(name, stored.images, stored.labels)
