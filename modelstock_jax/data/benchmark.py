"""A benchmark: datasets to train on, to select hyperparameters on, and to evaluate on.

The module of a dataset is imported when the dataset is opened, so that a run imports only its own.
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
    """The data of a run or study.

    Attributes:
      train: training set of the replicas; empty for ImageNet without training
      validation: in-distribution set for selecting hyperparameters, such as the learning rate
      test: in-distribution test set
      shifts: out-of-distribution test sets by name
      class_names: class names in the order of the labels
      templates: prompts of the zero-shot head; {} is the class name
      augment: (key, images uint8) -> images uint8, on the device in the training step
      real_labels: the test images with reassessed labels; None if not requested
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
    """Size of a benchmark, available without opening it.

    Attributes:
      num_train: number of training images
      num_classes: K
      source: source of the two numbers
    """

    num_train: int
    num_classes: int
    source: str


def _no_augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Return `images` unchanged; stored images are augmented on the host."""
    return images


def _glyphs(config: ConfigDict) -> Benchmark:
    from modelstock_jax.data import glyphs
    from modelstock_jax.data.glyphs.sets import SHIFTS

    sets = glyphs.make_sets(shifts=config.shifts or SHIFTS)
    return Benchmark(
        sets.train,
        sets.validation,
        sets.test,
        sets.shifts,
        glyphs.CLASS_NAMES,
        glyphs.TEMPLATES,
        shift_and_jitter,
    )


def _imagenet(config: ConfigDict, training: bool) -> Benchmark:
    from modelstock_jax.data import imagenet

    sets = imagenet.open_sets(config, training=training)
    return Benchmark(
        sets.train,
        sets.validation,
        sets.test,
        sets.shifts,
        imagenet.CLASS_NAMES,
        imagenet.TEMPLATES,
        _no_augment,
        sets.real_labels,
    )


def _cifar(config: ConfigDict, training: bool) -> Benchmark:
    from modelstock_jax.data import cifar

    names = cifar.CLASS_NAMES[config.name]
    return Benchmark(*cifar.open_sets(config), names, cifar.TEMPLATES, _no_augment)


class _Stored(NamedTuple):
    """A dataset of published size that is stored in `data.root`.

    Attributes:
      title: name in messages
      root: what `data.root` must be, for messages
      train: size of the training set
      open: opens the benchmark of a config, for training or only to evaluate
    """

    title: str
    root: str
    train: Published
    open: Callable[[ConfigDict, bool], Benchmark]


_STORED = {
    "imagenet": _Stored(
        "ImageNet-1K", "ImageNet's directory", IMAGENET["train"].published, _imagenet
    ),
    **{
        name: _Stored(cifar.title, "the data_dir of TensorFlow Datasets", cifar.train, _cifar)
        for name, cifar in CIFAR.items()
    },
}

NAMES = ("glyphs", *_STORED, "folder")


def summarize(config: ConfigDict) -> DataSummary:
    """Return the size of a benchmark without opening it; your own folders are listed.

    Args:
      config: the `data` group of `configs/default.py`

    Raises:
      UserError: there is no dataset of that name, or its folders do not exist

    >>> summarize(ConfigDict({"name": "imagenet", "held_out_per_class": 26})).num_train
    1255167
    """
    check_choice("data.name", config.name, NAMES)
    if config.name == "glyphs":
        from modelstock_jax.data.glyphs.captions import CLASS_NAMES
        from modelstock_jax.data.glyphs.sets import TRAIN_SIZE

        return DataSummary(TRAIN_SIZE, len(CLASS_NAMES), "the synthetic benchmark")
    if config.name == "folder":
        from modelstock_jax.data.custom_dataset import open_sets

        sets = open_sets(config)
        return DataSummary(len(sets.train), len(sets.class_names), f"the folders of {config.root}")
    stored = _STORED[config.name]
    classes, images, _ = stored.train
    held_out = classes * config.held_out_per_class
    suffix = f", minus {held_out:,} held out" if held_out else ""
    source = f"the published size of {stored.title}'s training set{suffix}"
    return DataSummary(images - held_out, classes, source)


def missing(config: ConfigDict, *, training: bool = True) -> list[str]:
    """Return one line per missing dataset, with how to fix it; empty if nothing is missing.

    Args:
      config: the `data` group of `configs/default.py`
      training: see `load`

    Raises:
      UserError: there is no dataset or no shifted test set of that name
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
        from modelstock_jax.data import imagenet

        return imagenet.missing_sets(config, training=training)
    from modelstock_jax.data import cifar

    return cifar.missing_sets(config)


def load(config: ConfigDict, *, training: bool = True) -> Benchmark:
    """Open the benchmark `data.name`.

    Args:
      config: the `data` group of `configs/default.py`
      training: False to evaluate only: ImageNet's training images need not exist, and no cache of
        decoded training images is opened or written

    Raises:
      UserError: there is no dataset of that name, or a part of it is missing
    """
    if issues := missing(config, training=training):
        raise UserError("; ".join(issues))
    if config.real_labels and config.name != "imagenet":
        raise UserError(
            f"data.real_labels=True: {config.name!r} has no reassessed labels; set it to False"
        )
    if config.name == "glyphs":
        return _with_lists(config, _glyphs(config))
    if config.name == "folder":
        from modelstock_jax.data.custom_dataset import open_sets

        opened = Benchmark(*open_sets(config), augment=_no_augment)
    else:
        opened = _STORED[config.name].open(config, training)
    return _with_lists(config, _cached(config, opened) if training else opened)


def _cached(config: ConfigDict, data: Benchmark) -> Benchmark:
    """Return the benchmark with cached training images; write the cache if it does not exist."""
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
    """Return the benchmark with the class names and templates of the config's files, if any."""
    names, templates = data.class_names, data.templates
    if config.class_names:
        names = read_class_names(config.class_names, len(names))
    if config.templates:
        templates = read_templates(config.templates)
    return dataclasses.replace(data, class_names=names, templates=templates)
