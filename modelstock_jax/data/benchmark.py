"""A data set as a study sees it: where to train, where to choose, where to measure.

A run imports the modules of its own data set alone: each is imported where it is opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from modelstock_jax.data.augment import shift_and_jitter
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.data.prompts import read_class_names, read_templates
from modelstock_jax.data.published_sets import CIFAR, IMAGENET, Published
from modelstock_jax.errors import UserError, check_choice


@dataclass(frozen=True)
class Benchmark:
    """The data of a study.

    Attributes:
      train: what replicas see.
      validation: what choices (the learning rate) may look at.
      test: the in-distribution test set.
      shifts: the out-of-distribution test sets by name.
      class_names: in the order of the labels.
      templates: prompts for the zero-shot head, {} stands for the class name.
      augment: (key, images uint8) -> images uint8, run on the device in the step.
      real_labels: the test images under reassessed labels; None where they are not asked for.
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    augment: Callable[[jax.Array, jax.Array], jax.Array]
    real_labels: ImageSet | None = None


@dataclass(frozen=True)
class DataSummary:
    """What is known of a benchmark that has not been opened.

    Attributes:
      num_train: training images.
      num_classes: K.
      source: where the two numbers come from.
    """

    num_train: int
    num_classes: int
    source: str


def _as_read(key: jax.Array, images: jax.Array) -> jax.Array:
    """Stored images are cropped and changed where they are read."""
    return images


def _glyphs(config: ConfigDict) -> Benchmark:
    from modelstock_jax.data import glyphs
    from modelstock_jax.data.glyphs.sets import SHIFTS

    world = glyphs.make_sets(shifts=config.shifts or SHIFTS)
    return Benchmark(
        world.train,
        world.validation,
        world.test,
        world.shifts,
        glyphs.CLASS_NAMES,
        glyphs.TEMPLATES,
        shift_and_jitter,
    )


def _imagenet(config: ConfigDict) -> Benchmark:
    from modelstock_jax.data import imagenet

    sets = imagenet.open_sets(config)
    return Benchmark(
        sets.train,
        sets.validation,
        sets.test,
        sets.shifts,
        imagenet.CLASS_NAMES,
        imagenet.TEMPLATES,
        _as_read,
        sets.real,
    )


def _cifar(config: ConfigDict) -> Benchmark:
    from modelstock_jax.data import cifar

    names = cifar.CLASS_NAMES[config.name]
    return Benchmark(*cifar.open_sets(config), names, cifar.TEMPLATES, _as_read)


class _Stored(NamedTuple):
    """A data set of published size that lies in `data.root`."""

    title: str
    root: str
    train: Published
    open: Callable[[ConfigDict], Benchmark]


_STORED = {
    "imagenet": _Stored(
        "ImageNet-1K", "ImageNet's directory", IMAGENET["train"].published, _imagenet
    ),
    **{
        name: _Stored(known.title, "the data_dir of TensorFlow Datasets", known.train, _cifar)
        for name, known in CIFAR.items()
    },
}

NAMES = ("glyphs", *_STORED, "folder")


def summarize(config: ConfigDict) -> DataSummary:
    """What is known without opening anything; of a user's own images, what their folders hold.

    Args:
      config: the `data` group of `configs/default.py`.

    Raises:
      UserError: if there is no data set of that name, or no such folders.

    >>> summarize(ConfigDict({"name": "imagenet", "held_out_per_class": 26})).num_train
    1255167
    """
    check_choice("data.name", config.name, NAMES)
    if config.name == "glyphs":
        from modelstock_jax.data.glyphs.captions import CLASS_NAMES
        from modelstock_jax.data.glyphs.sets import TRAIN_SIZE

        return DataSummary(TRAIN_SIZE, len(CLASS_NAMES), "the glyph world's own sizes")
    if config.name == "folder":
        from modelstock_jax.data.custom_dataset import open_sets

        own = open_sets(config)
        return DataSummary(len(own.train), len(own.class_names), f"the folders of {config.root}")
    stored = _STORED[config.name]
    classes, images, _ = stored.train
    kept = classes * config.held_out_per_class
    less = f", less {kept:,} held out" if kept else ""
    source = f"the published size of {stored.title}'s training set{less}"
    return DataSummary(images - kept, classes, source)


def missing(config: ConfigDict) -> list[str]:
    """What stands between this config and its data, each with the way out; none if all is there.

    Raises:
      UserError: if there is no data set of that name, or no such shift.
    """
    if config.name == "folder":
        try:
            summarize(config)
        except UserError as error:
            return [str(error)]
        return []
    summarize(config)
    if config.name == "glyphs":
        return []
    stored = _STORED[config.name]
    if not config.root:
        return [f"data.root is not set; give {stored.root} as --config.data.root=DIR"]
    if not Path(config.root).expanduser().is_dir():
        return [f"data.root={config.root}: no such directory; give {stored.root}"]
    if config.name == "imagenet":
        from modelstock_jax.data.imagenet import missing_sets
    else:
        from modelstock_jax.data.cifar import missing_sets
    return missing_sets(config)


def load(config: ConfigDict) -> Benchmark:
    """Opens the data set that `data.name` names.

    Args:
      config: the `data` group of `configs/default.py`.

    Raises:
      UserError: if there is none of that name, or something of it is not there.
    """
    if problems := missing(config):
        raise UserError("; ".join(problems))
    if config.real_labels and config.name != "imagenet":
        raise UserError(
            f"data.real_labels=True: {config.name!r} has no reassessed labels; set it to False"
        )
    if config.name == "glyphs":
        return _with_lists(config, _glyphs(config))
    if config.name == "folder":
        from modelstock_jax.data.custom_dataset import open_sets

        opened = Benchmark(*open_sets(config), augment=_as_read)
    else:
        opened = _STORED[config.name].open(config)
    return _with_lists(config, _cached(config, opened))


def _cached(config: ConfigDict, data: Benchmark) -> Benchmark:
    """The benchmark with its training images in the config's cache, written if it is not there."""
    if not config.decoded_cache_dir:
        return data
    from modelstock_jax.data.caches import write_cache

    images = write_cache(
        data.train.encoded,
        Path(config.decoded_cache_dir).expanduser(),
        short_side=config.decoded_cache_short_side,
        threads=config.loader.threads,
        unreadable=config.loader.unreadable,
    )
    return dataclasses.replace(data, train=dataclasses.replace(data.train, images=images))


def _with_lists(config: ConfigDict, data: Benchmark) -> Benchmark:
    """The benchmark under the class names and templates of the config's files, if it gives any."""
    names, templates = data.class_names, data.templates
    if config.class_names:
        names = read_class_names(config.class_names, len(names))
    if config.templates:
        templates = read_templates(config.templates)
    return dataclasses.replace(data, class_names=names, templates=templates)
