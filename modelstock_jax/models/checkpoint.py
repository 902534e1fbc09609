"""A checkpoint in memory; the interface of a checkpoint format."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.models.config import DualEncoderConfig, ModelConfig, has_prefix
from modelstock_jax.models.model import abstract_params
from modelstock_jax.models.param_mapping import (
    Params,
    Row,
    flatten,
    linear_shapes,
    read_tree,
    write_tree,
)
from modelstock_jax.models.preprocessor import Preprocessor
from modelstock_jax.tensor_files.checksums import checksum_tensors
from modelstock_jax.tensor_files.reader import SINGLE, TensorFiles


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An image model with config, preprocessor, tokenizer directory and head.

    Attributes:
      config: sizes
      params: image_tower; text_tower and logit_scale, if the model has texts; what else the files
        contain. Float32 NumPy arrays when loaded
      preprocessor: preprocessing of images
      directory: directory with its tokenizer files; None if it has no tokenizer
      head: {"kernel" [E, K], "bias" [K]} of a fine-tuned model, or None; a DeiT with two
        classifiers also has "distillation", a second pair
      labels: the K class names of the head, or None
      format: format of the files that it was read from
    """

    config: ModelConfig
    params: Params
    preprocessor: Preprocessor
    directory: Path | None = None
    head: Params | None = None
    labels: tuple[str, ...] | None = None
    format: str = "hugging_face"

    @functools.cached_property
    def checksum(self) -> str:
        """SHA-256 of weights and head as float32, by name; independent of the file format."""
        tree = {**self.params, "head": self.head or {}}
        return checksum_tensors({".".join(p): np.asarray(x, np.float32) for p, x in flatten(tree)})

    def replica(self) -> Params:
        """Return the part that is trained and merged: {"image_tower", "head"}.

        Raises:
          UserError: the checkpoint has no head
        """
        if self.head is None:
            raise UserError("the checkpoint has no head; create one with zero_shot_head")
        return {"image_tower": self.params["image_tower"], "head": self.head}

    @property
    def dual_encoder(self) -> DualEncoderConfig:
        """The config of a model with texts.

        Raises:
          UserError: the model has no text tower
        """
        if not isinstance(self.config, DualEncoderConfig):
            raise UserError(f"a {self.config.model_type} model has no text tower")
        return self.config

    def with_replica(self, replica: Params, labels: tuple[str, ...] | None = None) -> Checkpoint:
        """Return the checkpoint with the weights of a replica, and `labels` if given.

        A replica has an image tower and a head; a text tower and logit scale if those were
        fine-tuned too.
        """
        tuned = {name: part for name, part in replica.items() if name != "head"}
        params = {**self.params, **tuned}
        labels = self.labels if labels is None else tuple(labels)
        return dataclasses.replace(self, params=params, head=replica["head"], labels=labels)


# The classifier of a fine-tuned model is a separate file, in every format.
HEAD_FILE = "head.safetensors"


class CheckpointFormat(abc.ABC):
    """Tensor names and files of a checkpoint format.

    Attributes:
      name: name in options
      column: its column in the table of tensor names
      file: name of the file with the tensors
      weights: patterns of all files that may contain tensors
    """

    name: str
    column: str
    file: str = SINGLE
    weights: tuple[str, ...] = ("*.safetensors",)

    def locate(self, path: Path) -> Path | None:
        """Return the path that `TensorFiles` opens; None if there are no tensors."""
        if path.is_file():
            return path
        found = [file for file in path.glob("*.safetensors") if file.name != HEAD_FILE]
        if path / self.file in found:
            return path / self.file
        return found[0] if len(found) == 1 else None

    def open(self, path: Path) -> TensorFiles:
        """Open the tensors of a path.

        Raises:
          UserError: there are none
        """
        located = self.locate(path)
        found = sorted(file.name for file in path.glob("*.safetensors"))
        if located is None and found:
            raise UserError(
                f"{path}: format {self.name} expects {self.file}, found {', '.join(found)}"
            )
        return TensorFiles(
            located or path
        )  # If there are none, it raises an error that names the missing file.

    def tolerates(self, name: str) -> bool:
        """Whether the files may contain this tensor although it is not in the table."""
        return False

    @abc.abstractmethod
    def read(self, path: Path, base: Checkpoint | None) -> Checkpoint:
        """Read a checkpoint, without separate head, labels and tokenizer.

        Args:
          path: a directory, or one file of tensors if the format needs no more
          base: checkpoint for the parts that the format lacks, or None

        Returns:
          The checkpoint, float32 NumPy arrays

        Raises:
          UserError: missing or corrupt files, another architecture, tensors that do not match (all
            in one list), or a base that is given without need or missing
        """


class CompleteFormat(CheckpointFormat):
    """A format with the complete model, which can also be written."""

    @abc.abstractmethod
    def sizes(self, path: Path, files: TensorFiles) -> tuple[ModelConfig, Preprocessor]:
        """Read config and preprocessor."""

    @abc.abstractmethod
    def describe(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return {file name: JSON} that `sizes` reads.

        Needs no weights, so a run checks before training that its model can be exported.

        Raises:
          UserError: the format cannot represent the model
        """

    @abc.abstractmethod
    def write(
        self, directory: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
    ) -> None:
        """Write the files with tensors."""

    def read(self, path: Path, base: Checkpoint | None) -> Checkpoint:
        """See `CheckpointFormat.read`; there is no base."""
        if base is not None:
            raise UserError(f"{path}: format {self.name} is a complete model; omit the base")
        files = self.open(path)
        config, preprocessor = self.sizes(path, files)
        if preprocessor.image_size != config.image_size and not config.resizes_images:
            raise UserError(
                f"{path}: preprocessor image size {preprocessor.image_size} differs from the "
                f"image tower's {config.image_size}"
            )
        if config.num_blocks > len(files):  # Checked before any module is created.
            raise UserError(
                f"{path}: the config has {config.num_blocks:,} layers, the files only "
                f"{len(files):,} tensors"
            )
        if len(preprocessor.mean) != config.num_channels:
            raise UserError(
                f"{path}: the preprocessor has {len(preprocessor.mean)} means for "
                f"{config.num_channels} channels"
            )
        head, names = config.stored_head(files), list(files)
        classes = next((files.shape(row.name)[:1] for row in head if row.name in names), (0,))
        prefixed = bool(head) or has_prefix(names, config.prefix)
        table = stored_rows(config, self.column, head, prefixed)
        shapes = param_shapes(config) | _head_shapes(config, head, (*classes, 0)[0])
        params = read_tree(files, table, shapes, path, self.tolerates)
        head_params = params.pop("head", None)
        return Checkpoint(config, params, preprocessor, head=head_params, format=self.name)

    def tensors(self, checkpoint: Checkpoint, where: Path) -> dict[str, np.ndarray]:
        """Return {name: tensor} to write.

        Raises:
          UserError: lists all tensors that do not match the config
        """
        config, tree = checkpoint.config, checkpoint.params
        head, shapes = config.head_rows(checkpoint.head), param_shapes(config)
        if checkpoint.head is not None and head:
            shapes |= _head_shapes(config, head, np.shape(checkpoint.head["bias"])[0])
            tree = {**tree, "head": checkpoint.head}
            tree = {name: part for name, part in tree.items() if name not in config.base_only}
        return write_tree(tree, stored_rows(config, self.column, head, bool(head)), shapes, where)


def stored_rows(config: ModelConfig, column: str, head: Sequence[Row], prefixed: bool) -> list[Row]:
    """Return the table of tensor names of a model and its classifier.

    Args:
      config: sizes
      column: a checkpoint format
      head: rows of the classifier; none without one
      prefixed: whether all other names start with the model's prefix
    """
    prefix = config.prefix if prefixed else ""
    rows = config.rows(column)
    return [*(dataclasses.replace(row, name=f"{prefix}{row.name}") for row in rows), *head]


def _head_shapes(
    config: ModelConfig, head: Sequence[Row], classes: int
) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return our shapes of the classifier; both classifiers of a DeiT have the same classes."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for row in head:
        shapes |= linear_shapes(config.feature_size, classes, row.path[0][:-1])
    return shapes


def param_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return {path: shape} of every parameter."""
    return {path: leaf.shape for path, leaf in flatten(abstract_params(config))}
