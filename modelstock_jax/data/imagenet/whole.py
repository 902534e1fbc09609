"""Is a set of ImageNet's whole: as many classes and images as its authors published?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelstock_jax.data.imagenet.classes import WNIDS
from modelstock_jax.data.imagenet.published import PUBLISHED
from modelstock_jax.data.whole import check_counts


def check_whole(
    name: str, place: str, labels: np.ndarray, classes: Sequence[int] | None = None
) -> None:
    """Compares a set with its published counts.

    Args:
      name: one of `PUBLISHED`.
      place: where it lies, for the message.
      labels: int32 [M].
      classes: labels that should be there; None means 0 to the published number of classes - 1.

    Raises:
      UserError: one line with everything that is too few, too many or missing.
    """
    # ObjectNet's classes are groups of ImageNet's and have no id of WordNet.
    class_name = "class {}".format if name == "objectnet" else WNIDS.__getitem__
    check_counts(name, place, labels, PUBLISHED[name], class_name, classes)
