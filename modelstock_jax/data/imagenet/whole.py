"""Is a set whole: as many classes and images as its authors published?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelstock_jax.data.imagenet.classes import WNIDS
from modelstock_jax.data.imagenet.published import PUBLISHED
from modelstock_jax.errors import UserError

_EVEN = ("validation", "v2")  # the same number of images in each class
_MOST = 5  # names in a message


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
    published = PUBLISHED[name]
    counts = np.bincount(labels, minlength=published.classes)
    wanted = np.arange(published.classes) if classes is None else np.asarray(classes)
    found = []
    if missing := [label for label in wanted if not counts[label]]:
        found.append(
            f"{len(wanted) - len(missing):,} of {len(wanted):,} classes ({_some(name, missing)} "
            "missing)"
        )
    if extra := np.setdiff1d(np.flatnonzero(counts), wanted).tolist():
        found.append(f"{_some(name, extra)}, none of its {len(wanted)} classes")
    if len(labels) != published.images:
        few = "few" if len(labels) < published.images else "many"
        text = (
            f"{len(labels):,} images of {published.images:,}, "
            f"{abs(len(labels) - published.images):,} too {few}"
        )
        if name in _EVEN:
            each = published.images // published.classes
            odd = [label for label in wanted if counts[label] not in (0, each)]
            if odd:
                text += f" ({_some(name, odd)} should have {each})"
        found.append(text)
    if found:
        raise UserError(
            f"{place}: not the whole set {name!r}: {'; '.join(found)}; complete it, or read it as "
            "it is with --config.data.check_counts=False"
        )


def _some(name: str, labels: Sequence[int]) -> str:
    names = [f"class {n}" if name == "objectnet" else WNIDS[n] for n in labels[:_MOST]]
    more = f" and {len(labels) - _MOST} more" if len(labels) > _MOST else ""
    return ", ".join(names) + more
