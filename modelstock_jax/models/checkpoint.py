"""A CLIP with its config, tokenizer and head in memory; what a checkpoint format provides."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.models.clip import Params, abstract_params
from modelstock_jax.models.config import CLIPConfig, Preprocessor
from modelstock_jax.models.param_mapping import Shapes, flatten, read_tree, rows, write_tree
from modelstock_jax.tensor_files.checksums import checksum_tensors
from modelstock_jax.tensor_files.reader import SINGLE, TensorFiles


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A CLIP model with all that is needed to use it.

    Attributes:
        config: Sizes.
        params: image_tower, text_tower, logit_scale; float32 NumPy arrays when loaded.
        preprocessor: How pixels become the tower's input.
        directory: Where its tokenizer's files lie; None where it has none.
        head: {"kernel" [E, K], "bias" [K]} of a fine-tuned model, or None.
        labels: The K class names of the head, or None.
        layout: That of the files it was read from.
    """

    config: CLIPConfig
    params: Params
    preprocessor: Preprocessor
    directory: Path | None = None
    head: Params | None = None
    labels: tuple[str, ...] | None = None
    format: str = "hugging_face"

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and the head as float32, by name, whatever the files' layout."""
        tree = {**self.params, "head": self.head or {}}
        return checksum_tensors({".".join(p): np.asarray(x, np.float32) for p, x in flatten(tree)})

    def replica(self) -> Params:
        """What is trained and merged: {"image_tower", "head"}; a UserError without a head."""
        if self.head is None:
            raise UserError("This checkpoint has no head; make one with zero_shot_head.")
        return {"image_tower": self.params["image_tower"], "head": self.head}

    def with_replica(self, replica: Params, labels: tuple[str, ...] | None = None) -> Checkpoint:
        """The checkpoint with all that a replica has, and `labels` where given.

        That is an image tower and a head, and a text tower and scale where they were tuned too.
        """
        tuned = {name: part for name, part in replica.items() if name != "head"}
        params = {**self.params, **tuned}
        labels = self.labels if labels is None else tuple(labels)
        return dataclasses.replace(self, params=params, head=replica["head"], labels=labels)


# What a layout of a CLIP checkpoint on disk can do.


# The classifier of a fine-tuned model lies beside the model, in every layout.
HEAD_FILE = "head.safetensors"


class CheckpointFormat(abc.ABC):
    """Names of tensors, and the files that say the rest.

    Attributes:
        name: As a user types it.
        column: Its column in the table of names.
        file: Name of the file that holds the tensors.
        weights: Patterns of all files that may.
    """

    name: str
    column: str
    file: str = SINGLE
    weights: tuple[str, ...] = ("*.safetensors",)

    def locate(self, path: Path) -> Path | None:
        """What `TensorFiles` is to open of a path: None where its tensors are not there."""
        if path.is_file():
            return path
        found = [file for file in path.glob("*.safetensors") if file.name != HEAD_FILE]
        if path / self.file in found:
            return path / self.file
        return found[0] if len(found) == 1 else None

    def open(self, path: Path) -> TensorFiles:
        """The tensors of a path; a UserError where there are none."""
        located = self.locate(path)
        found = sorted(file.name for file in path.glob("*.safetensors"))
        if located is None and found:
            raise UserError(
                f"{path}: {self.name} reads {self.file} there, and finds {', '.join(found)}."
            )
        return TensorFiles(located or path)  # Without any, its own error says what is missing.

    def tolerates(self, name: str) -> bool:
        """Whether a tensor outside the table may lie in the files; it is left there."""
        return False

    @abc.abstractmethod
    def read(self, path: Path, base: Checkpoint | None) -> Checkpoint:
        """Reads a checkpoint; a head beside it, labels and the tokenizer are not its business.

        Args:
            path: A directory, or one file of tensors where the layout needs no more.
            base: The checkpoint that gives what the layout lacks, or None.

        Returns:
            The checkpoint, float32 NumPy arrays.

        Raises:
            UserError: Files that are missing or broken, another architecture, tensors that do not
                fit (all in one list), a base where none is needed or none where one is.
        """


class CompleteFormat(CheckpointFormat):
    """A layout that holds both towers, and so can be written."""

    @abc.abstractmethod
    def sizes(self, path: Path, files: TensorFiles) -> tuple[CLIPConfig, Preprocessor]:
        """What the files say beside the tensors."""

    @abc.abstractmethod
    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """File name -> JSON, from which `sizes` reads; a UserError where the layout cannot say it.

        It needs no weights: whether a model can be exported is known before it is trained.
        """

    @abc.abstractmethod
    def write(
        self, directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
    ) -> None:
        """Writes the tensors' files."""

    def read(self, path: Path, base: Checkpoint | None) -> Checkpoint:
        """See `Layout.read`; there is no base here."""
        if base is not None:
            raise UserError(f"{path}: {self.name} has a text tower of its own; leave the base out.")
        files = self.open(path)
        config, preprocessor = self.sizes(path, files)
        size = config.vision.image_size
        if preprocessor.image_size != size:
            raise UserError(
                f"{path}: the preprocessor makes images of {preprocessor.image_size}, the image "
                f"tower takes {size}."
            )
        layers = config.vision.num_hidden_layers + config.text.num_hidden_layers
        if layers > len(files):  # Known before a module is made for each.
            raise UserError(
                f"{path}: the config says {layers:,} layers, the files hold {len(files):,} tensors."
            )
        table = rows(config, self.column)
        params = read_tree(files, table, param_shapes(config), path, self.tolerates)
        return Checkpoint(config, params, preprocessor, format=self.name)

    def tensors(self, checkpoint: Checkpoint, where: Path) -> dict[str, np.ndarray]:
        """Name -> tensor to write; a UserError that lists all that do not fit the config."""
        config = checkpoint.config
        table = rows(config, self.column)
        return write_tree(checkpoint.params, table, param_shapes(config), where)


def param_shapes(config: CLIPConfig) -> Shapes:
    """Path -> shape of every parameter of ours."""
    return {path: leaf.shape for path, leaf in flatten(abstract_params(config))}
