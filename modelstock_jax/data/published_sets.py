"""The published data sets: what is known of ImageNet's and CIFAR's before any is opened.

A new shift is an entry here. The standard library is all that this module imports:
configs/default.py takes the keys of `data.paths` from it, and `--help` need not wait for NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CLASS_LISTS = Path(__file__).with_name("class_lists")
"""Class names, WordNet ids and prompts, one a line; its SOURCES.txt says where they come from."""


class Published(NamedTuple):
    """Published sizes of a set: classes, images in all, and whether all classes have as many."""

    classes: int
    images: int
    even: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageNetSet:
    """One of ImageNet's sets.

    Attributes:
      places: where it is looked for below `data.root`; the first that is there is taken.
      published: how large it is, as its authors published it.
      prepared: what it is called when prepared, one of `places`; "" where it cannot be.
      split: its name in prepared records.
      wnids: the file of `CLASS_LISTS` with the ids of its classes, to which its logits are
        restricted; "" for all of ImageNet's.
      groups: whether its classes are groups of ImageNet's and have no id of WordNet.
    """

    places: tuple[str, ...]
    published: Published
    prepared: str = ""
    split: str = "test"
    wnids: str = ""
    groups: bool = False


IMAGENET_SHIFTS = {
    "v2": ImageNetSet(
        places=(
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2-matched-frequency",
            "imagenet_v2/matched-frequency",
            "imagenet_v2",
        ),
        published=Published(1000, 10_000, even=True),
        prepared="imagenet_v2",
    ),
    "r": ImageNetSet(
        places=("imagenet-r", "imagenet_r"),
        published=Published(200, 30_000),
        prepared="imagenet_r",
        wnids="imagenet_r_wnids.txt",
    ),
    "sketch": ImageNetSet(
        places=("imagenet-sketch", "sketch", "imagenet_sketch"),
        published=Published(1000, 50_889),
        prepared="imagenet_sketch",
    ),
    "objectnet": ImageNetSet(
        places=("objectnet-1.0", "objectnet"),
        published=Published(113, 18_574),
        prepared="objectnet",
        groups=True,
    ),
    "a": ImageNetSet(
        places=("imagenet-a", "imagenet_a"),
        published=Published(200, 7_500),
        prepared="imagenet_a",
        wnids="imagenet_a_wnids.txt",
    ),
}
"""By name, in the tables' order: V2 matched-frequency (Recht et al. 2019), R (Hendrycks et al.
2021a), Sketch (Wang et al. 2019), the part of ObjectNet (Barbu et al. 2019) whose classes ImageNet
has, and A (Hendrycks et al. 2021b)."""

IMAGENET = {
    "train": ImageNetSet(
        places=("train", "imagenet/train", "imagenet2012_train", "imagenet2012"),
        published=Published(1000, 1_281_167),
        prepared="imagenet2012_train",
        split="train",
    ),
    "validation": ImageNetSet(
        places=("val", "imagenet/val", "imagenet2012_validation", "imagenet2012"),
        published=Published(1000, 50_000, even=True),
        prepared="imagenet2012_validation",
        split="validation",
    ),
    **IMAGENET_SHIFTS,
    "real": ImageNetSet(
        places=("real.json", "imagenet2012_real"),
        published=Published(1000, 50_000),
        split="validation",
    ),
}
"""By name in `data.paths`: ImageNet-1K (Russakovsky et al. 2015), its shifts, and the reassessed
labels of its validation images, ReaL (Beyer et al. 2020)."""


class Cifar(NamedTuple):
    """CIFAR-10 or CIFAR-100.

    Attributes:
      title: as papers call it.
      train: size of the training set.
      test: size of the test set.
      shifts: other test sets with its labels, by their names in TensorFlow Datasets.
    """

    title: str
    train: Published
    test: Published
    shifts: dict[str, Published]


CORRUPTIONS = (
    "brightness",
    "contrast",
    "defocus_blur",
    "elastic",
    "fog",
    "frost",
    "frosted_glass_blur",
    "gaussian_blur",
    "gaussian_noise",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "saturate",
    "shot_noise",
    "snow",
    "spatter",
    "speckle_noise",
    "zoom_blur",
)

NEW_TEST_SET = "cifar10_1/v6"

CIFAR = {
    "cifar10": Cifar(
        "CIFAR-10",
        Published(10, 50_000, even=True),
        Published(10, 10_000, even=True),
        {
            NEW_TEST_SET: Published(10, 2_000, even=True),
            "cifar10_1/v4": Published(10, 2_021),
            **{
                f"cifar10_corrupted/{corruption}_{severity}": Published(10, 10_000, even=True)
                for corruption in CORRUPTIONS
                for severity in range(1, 6)
            },
        },
    ),
    "cifar100": Cifar(
        "CIFAR-100",
        Published(100, 50_000, even=True),
        Published(100, 10_000, even=True),
        {},
    ),
}
"""By `data.name` (Krizhevsky 2009). Shifts of CIFAR-10: CIFAR-10.1 (Recht et al. 2018), which was
collected as ImageNet-V2 was, and CIFAR-10-C (Hendrycks and Dietterich 2019) by corruption and
severity."""
