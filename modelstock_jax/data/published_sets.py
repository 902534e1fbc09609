"""Published properties of the ImageNet and CIFAR datasets, available without opening them.

To add a shifted test set, add an entry here. This module imports only the standard library:
configs/default.py uses it for the keys of `data.paths`, and `--help` must not wait for NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

CLASS_LISTS = Path(__file__).with_name("class_lists")
"""Class names, WordNet ids and prompts, one per line; SOURCES.txt lists their sources."""


class Published(NamedTuple):
    """Published size of a dataset.

    Attributes:
      classes: number of classes
      images: number of images
      even: whether all classes have the same number of images
    """

    classes: int
    images: int
    even: bool = False


@dataclass(frozen=True, kw_only=True)
class ImageNetSet:
    """One of ImageNet's datasets.

    Attributes:
      locations: paths below `data.root` that are searched; the first that exists is used
      published: size, as published by its authors
      prepared: name of the prepared dataset, one of `locations`; "" if it cannot be prepared
      split: name of the split in prepared records
      wnids: file in `CLASS_LISTS` with the WordNet ids of its classes, to which its logits are
        restricted; "" for all ImageNet classes
      groups: whether its classes are groups of ImageNet classes, without WordNet ids
    """

    locations: tuple[str, ...]
    published: Published
    prepared: str = ""
    split: str = "test"
    wnids: str = ""
    groups: bool = False


IMAGENET_SHIFTS = {
    "v2": ImageNetSet(
        locations=(
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2-matched-frequency",
            "imagenet_v2/matched-frequency",
            "imagenet_v2",
        ),
        published=Published(1000, 10_000, even=True),
        prepared="imagenet_v2",
    ),
    "r": ImageNetSet(
        locations=("imagenet-r", "imagenet_r"),
        published=Published(200, 30_000),
        prepared="imagenet_r",
        wnids="imagenet_r_wnids.txt",
    ),
    "sketch": ImageNetSet(
        locations=("imagenet-sketch", "sketch", "imagenet_sketch"),
        published=Published(1000, 50_889),
        prepared="imagenet_sketch",
    ),
    "objectnet": ImageNetSet(
        locations=("objectnet-1.0", "objectnet"),
        published=Published(113, 18_574),
        prepared="objectnet",
        groups=True,
    ),
    "a": ImageNetSet(
        locations=("imagenet-a", "imagenet_a"),
        published=Published(200, 7_500),
        prepared="imagenet_a",
        wnids="imagenet_a_wnids.txt",
    ),
}
"""By name, in the order of the tables: V2 matched-frequency (Recht et al. 2019), R (Hendrycks et
al. 2021a), Sketch (Wang et al. 2019), the classes of ObjectNet (Barbu et al. 2019) that are also in
ImageNet, and A (Hendrycks et al. 2021b)."""

IMAGENET = {
    "train": ImageNetSet(
        locations=("train", "imagenet/train", "imagenet2012_train", "imagenet2012"),
        published=Published(1000, 1_281_167),
        prepared="imagenet2012_train",
        split="train",
    ),
    "validation": ImageNetSet(
        locations=("val", "imagenet/val", "imagenet2012_validation", "imagenet2012"),
        published=Published(1000, 50_000, even=True),
        prepared="imagenet2012_validation",
        split="validation",
    ),
    **IMAGENET_SHIFTS,
    "real": ImageNetSet(
        locations=("real.json", "imagenet2012_real"),
        published=Published(1000, 50_000),
        split="validation",
    ),
}
"""By name in `data.paths`: ImageNet-1K (Russakovsky et al. 2015), its shifted test sets, and the
reassessed labels of its validation images, ReaL (Beyer et al. 2020)."""


class Cifar(NamedTuple):
    """CIFAR-10 or CIFAR-100.

    Attributes:
      title: name in papers
      train: size of the training set
      test: size of the test set
      shifts: shifted test sets with its labels, by their names in TensorFlow Datasets
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
"""By `data.name` (Krizhevsky 2009). The shifted test sets of CIFAR-10 are CIFAR-10.1 (Recht et al.
2018), which was collected like ImageNet-V2, and CIFAR-10-C (Hendrycks and Dietterich 2019) by
corruption and severity."""
