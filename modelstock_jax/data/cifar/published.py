"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): what is known of them before they are opened."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from modelstock_jax.data.prompts import read_class_names, read_templates
from modelstock_jax.data.whole import Published

_HERE = Path(__file__).parent

IMAGE_SHAPE = (32, 32, 3)

TEMPLATES = read_templates(_HERE / "templates.txt")
"""The 18 prompts of CLIP's authors, the same for both sets; '{}' stands for the class name."""


class Cifar(NamedTuple):
    """One of the two sets.

    Attributes:
      title: as papers call it.
      class_names: by label.
      train: size of the training set.
      test: size of the test set.
      shifts: other test sets with its labels, by their names in TensorFlow Datasets.
    """

    title: str
    class_names: tuple[str, ...]
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
        read_class_names(_HERE / "cifar10_names.txt", 10),
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
        read_class_names(_HERE / "cifar100_names.txt", 100),
        Published(100, 50_000, even=True),
        Published(100, 10_000, even=True),
        {},
    ),
}
"""By `data.name`. Shifts of CIFAR-10: CIFAR-10.1 (Recht et al. 2018), which was collected as
ImageNet-V2 was, and CIFAR-10-C (Hendrycks and Dietterich 2019) by corruption and severity."""
