"""Is a set whole: as many classes and images as its authors published?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from modelstock_jax.errors import UserError, listed

_MOST = 5  # names in a message


class Published(NamedTuple):
    """Published sizes of a set: classes, images in all, and whether all classes have as many."""

    classes: int
    images: int
    even: bool = False


def check_counts(
    name: str,
    place: str,
    labels: np.ndarray,
    published: Published,
    class_name: Callable[[int], str],
    classes: Sequence[int] | None = None,
) -> None:
    """Compares a set with its published counts.

    Args:
      name: of the set, for the message.
      place: where it lies, for the message.
      labels: int32 [M].
      published: what should be there.
      class_name: label -> what a message calls the class.
      classes: labels that should be there; None means 0 to the published number of classes - 1.

    Raises:
      UserError: one line with everything that is too few, too many or missing.

    Example:
      >>> labels = np.array([0, 0, 1], np.int32)
      >>> check_counts("pets", "DIR", labels, Published(2, 3), "class {}".format)
      >>> check_counts("pets", "DIR", labels, Published(2, 4, even=True), "class {}".format)
      Traceback (most recent call last):
      ...
      modelstock_jax.errors.UserError: DIR: not the whole set 'pets': 3 images of 4, 1 too few
      (class 1 should have 2); complete it, or read it as it is with
      --config.data.check_counts=False
    """
    counts = np.bincount(labels, minlength=published.classes)
    wanted = list(range(published.classes) if classes is None else classes)

    def some(labels: Sequence[int]) -> str:
        return listed(map(class_name, labels), _MOST)

    found = []
    if missing := [label for label in wanted if not counts[label]]:
        found.append(
            f"{len(wanted) - len(missing):,} of {len(wanted):,} classes ({some(missing)} missing)"
        )
    if extra := np.setdiff1d(np.flatnonzero(counts), wanted).tolist():
        found.append(f"{some(extra)}, none of its {len(wanted)} classes")
    if len(labels) != published.images:
        few = "few" if len(labels) < published.images else "many"
        text = (
            f"{len(labels):,} images of {published.images:,}, "
            f"{abs(len(labels) - published.images):,} too {few}"
        )
        each = published.images // published.classes
        if published.even and (odd := [k for k in wanted if counts[k] not in (0, each)]):
            text += f" ({some(odd)} should have {each})"
        found.append(text)
    if found:
        raise UserError(
            f"{place}: not the whole set {name!r}: {'; '.join(found)}; complete it, or read it as "
            "it is with --config.data.check_counts=False"
        )
