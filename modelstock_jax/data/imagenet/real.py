"""Reassessed labels of ImageNet's validation images: ReaL (Beyer et al. 2020)."""

from __future__ import annotations

import os
from pathlib import Path

from modelstock_jax.data.imagenet.classes import WNIDS
from modelstock_jax.data.imagenet.published import PUBLISHED
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import read_json


def real_labels(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], ...]:
    """The labels that ReaL gives each validation image.

    A prediction is right where it is among an image's labels; an image without any is left out.

    Args:
      path: `real.json` as github.com/google-research/reassessed-imagenet has it: a list of 50,000
        lists of labels; item i belongs to ILSVRC2012_val_{i + 1:08}.JPEG.

    Returns:
      50,000 tuples of labels 0 to 999, some of them empty.

    Raises:
      UserError: no such file, or it is something else; it names the first wrong item.
    """
    path, images = Path(path), PUBLISHED["validation"].images
    items = read_json(path)
    if not isinstance(items, list) or len(items) != images:
        found = f"{len(items):,} items" if isinstance(items, list) else type(items).__name__
        raise UserError(f"{path}: {found}, not a list of {images:,} lists of labels; not real.json")
    for place, labels in enumerate(items):
        # bool is an int, and a label.
        if not isinstance(labels, list) or any(
            type(label) is not int or not 0 <= label < len(WNIDS) for label in labels
        ):
            raise UserError(f"{path}: item {place} is {labels!r}, not a list of labels 0 to 999")
    return tuple(map(tuple, items))
