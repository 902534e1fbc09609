"""A data set as a study sees it: where to train, where to choose, where to measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from ml_collections import ConfigDict

from modelstock_jax.data import glyphs
from modelstock_jax.data.augment import shift_and_jitter
from modelstock_jax.data.glyphs.sets import TRAIN_SIZE
from modelstock_jax.data.image_set import ImageSet
from modelstock_jax.errors import UserError


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
    """

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    shifts: dict[str, ImageSet]
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    augment: Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Outline:
    """What is known of a benchmark that has not been opened.

    Attributes:
      num_train: training images.
      num_classes: K.
      source: where the two numbers come from.
    """

    num_train: int
    num_classes: int
    source: str


_OUTLINES = {
    "glyphs": Outline(TRAIN_SIZE, len(glyphs.CLASS_NAMES), "the glyph world's own sizes"),
    "imagenet": Outline(1_281_167, 1000, "the published size of ImageNet-1K's training set"),
}
_GLYPH_SHIFTS = ("v2", "r", "sketch", "objectnet", "a", "digits")


def outline(config: ConfigDict) -> Outline:
    """What is known without opening anything.

    Args:
      config: the `data` group of `configs/default.py`.

    Raises:
      UserError: if there is no data set of that name.

    >>> outline(ConfigDict({"name": "imagenet"})).num_train
    1281167
    """
    if config.name not in _OUTLINES:
        raise UserError(
            f"data.name={config.name!r}: the data sets are: {', '.join(sorted(_OUTLINES))}"
        )
    return _OUTLINES[config.name]


def missing(config: ConfigDict) -> list[str]:
    """What stands between this config and its data, each with the way out; none if all is there.

    Raises:
      UserError: if there is no data set of that name.
    """
    outline(config)
    if config.name == "glyphs":
        return []
    found = []
    if not config.root:
        found.append("data.root is not set; give ImageNet's directory as --config.data.root=DIR")
    elif not Path(config.root).is_dir():
        found.append(f"data.root={config.root}: no such directory; give ImageNet's")
    found.append(
        "data.name='imagenet' cannot be read yet: this version has no reader of ImageNet's "
        "images; only data.name='glyphs' can be trained on"
    )
    return found


def load(config: ConfigDict) -> Benchmark:
    """Opens the data set that `data.name` names.

    Args:
      config: the `data` group of `configs/default.py`.

    Raises:
      UserError: if there is none of that name, or something of it is not there.
    """
    if problems := missing(config):
        raise UserError("; ".join(problems))
    if config.real:
        raise UserError("data.real=True: the glyphs have no reassessed labels; set it to False")
    if unknown := [name for name in config.shifts if name not in _GLYPH_SHIFTS]:
        raise UserError(
            f"data.shifts: no shift {unknown[0]!r}; the glyphs have {', '.join(_GLYPH_SHIFTS)}"
        )
    world = glyphs.world()
    return Benchmark(
        world.train,
        world.validation,
        world.test,
        {name: world.shifts[name] for name in config.shifts or world.shifts},
        glyphs.CLASS_NAMES,
        glyphs.TEMPLATES,
        shift_and_jitter,
    )
