"""The 1,000 classes of ImageNet-1K, and the 200 of them that ImageNet-A and ImageNet-R hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from modelstock_jax.errors import UserError, listed


def _lines(name: str) -> tuple[str, ...]:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return tuple(text.removesuffix("\n").split("\n"))


WNIDS = _lines("wnids.txt")
"""WordNet ids in ascending order: a class's label is its place here."""

CLASS_NAMES = _lines("class_names.txt")
"""Names for prompts, by label; 'missile' and 'sunglasses' stand twice, as published."""

TEMPLATES = _lines("templates.txt")
"""The 80 prompts of CLIP's authors; '{}' stands for the class name."""

_INDEX = {wnid: index for index, wnid in enumerate(WNIDS)}


def class_indices(wnids: Iterable[str]) -> tuple[int, ...]:
    """Labels of WordNet ids, in the order given.

    Args:
      wnids: such as the names of a data set's class folders.

    Raises:
      UserError: ids that ImageNet-1K does not have; it names them.

    Example:
      >>> class_indices(["n01443537", "n01440764"])
      (1, 0)
    """
    wnids = list(wnids)
    if unknown := [wnid for wnid in wnids if wnid not in _INDEX]:
        raise UserError(
            f"not among ImageNet's 1,000 classes: {listed(unknown, 5)}; a class is "
            "named by its WordNet id, such as n01440764"
        )
    return tuple(_INDEX[wnid] for wnid in wnids)


A_CLASSES = class_indices(_lines("wnids_a.txt"))
"""Labels of ImageNet-A's 200 classes, ascending; its logits are restricted to them."""

R_CLASSES = class_indices(_lines("wnids_r.txt"))
"""Labels of ImageNet-R's 200 classes, ascending; its logits are restricted to them."""
