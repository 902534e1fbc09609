"""Model Soups' layout: a fine-tuned image tower and its head, in OpenAI's names under a prefix.

Model Stock's authors released their fine-tuned models so. The text transformer was deleted before
training, so the model that was fine-tuned gives the text tower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.layouts.layout import Layout, param_shapes
from modelstock_jax.clip.names import HEAD, Row, rows
from modelstock_jax.clip.trees import flatten, read_tree
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles

_HEAD = "classification_head."
# CLIP was released in half precision, which rounds by at most 2**-11 of a number.
_ROUNDING = 1e-3


class ModelSoups(Layout):
    """One file: ``model.visual.*`` and ``classification_head.*``, both after ``module.`` or not."""

    name = "model_soups"
    column = "openai"

    def read(self, path: Path, base: Checkpoint | None) -> Checkpoint:
        """The base with the file's image tower and head.

        What lies there of the text tower must be the base's: it was not trained.
        """
        if base is None:
            raise UserError(
                f"{path}: a fine-tuned image tower and head (model_soups) without a text tower; "
                "name the model that was fine-tuned as its base."
            )
        files = self.open(path)
        prefix = _prefix(files)
        table = [
            dataclasses.replace(row, theirs=f"{prefix}model.{row.theirs}")
            for row in rows(base.config, self.column)
        ]
        image = [row for row in table if row.ours[0][0] == "image_tower"]
        others = [row for row in table if row.ours[0][0] != "image_tower" and row.theirs in files]
        head = [
            Row((("head", *row.ours[0]),), f"{prefix}{_HEAD}{row.theirs}", row.transform)
            for row in HEAD
        ]
        classes = next(iter(files.shape(head[1].theirs)), 0) if head[1].theirs in files else 0
        shapes: dict[tuple[str, ...], tuple[int, ...]] = {
            **param_shapes(base.config),
            ("head", "kernel"): (base.config.projection_dim, classes),
            ("head", "bias"): (classes,),
        }
        tree = read_tree(files, [*image, *head, *others], shapes, path)
        _check_base(path, tree, base, {p for row in others for p in row.ours})
        # The head of a base that has one is the anchor of the file's: the same classes.
        labels = base.labels if base.labels is not None and len(base.labels) == classes else None
        replica = {name: tree[name] for name in ("image_tower", "head")}
        return dataclasses.replace(base.with_replica(replica), labels=labels, layout=self.name)


def is_fine_tuned(names: Iterable[str]) -> bool:
    """Whether tensors of these names are in this layout."""
    return any(name.endswith(f"{_HEAD}weight") for name in names)


def _prefix(files: TensorFiles) -> str:
    """What stands before every name, such as ``module.`` of a model trained on several GPUs."""
    found = (name for name in files if name.endswith(f"{_HEAD}weight"))
    return next(found, f"{_HEAD}weight").removesuffix(f"{_HEAD}weight")


def _check_base(path: Path, tree: dict, base: Checkpoint, untrained: set[tuple[str, ...]]) -> None:
    theirs, ours = dict(flatten(tree)), dict(flatten(base.params))
    other = [
        ".".join(name)
        for name in sorted(untrained)
        if np.linalg.norm(theirs[name] - ours[name]) > _ROUNDING * np.linalg.norm(ours[name])
    ]
    if other:
        raise UserError(
            f"{path}: was not fine-tuned from this base, whose {', '.join(other)} are others."
        )
