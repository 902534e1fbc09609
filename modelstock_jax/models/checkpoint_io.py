"""Load and save checkpoints; every tensor is checked, writes are atomic."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import new_directory
from modelstock_jax.models import formats
from modelstock_jax.models.checkpoint import HEAD_FILE, Checkpoint, CheckpointFormat
from modelstock_jax.models.formats import CONFIG
from modelstock_jax.models.param_mapping import HEAD, Params, Shapes, read_tree, write_tree
from modelstock_jax.models.tokenizer import TOKENIZER_FILES, VOCABULARY_FILES
from modelstock_jax.tensor_files.hub import resolve
from modelstock_jax.tensor_files.reader import TensorFiles, read_json
from modelstock_jax.tensor_files.writer import write_indented_json, write_tensors, write_text

# Labels of the head, for formats whose config cannot store them.
LABELS_FILE = "labels.json"
# Configs, shard indexes and tokenizer files: small, and enough to detect the format.
_DOCUMENTS = ("*.json", "merges.txt", "*.model")


def load(
    name: str | os.PathLike[str],
    *,
    format: str | None = None,
    base: Checkpoint | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Read a checkpoint, with its head if it has one.

    ========================= =====================================================================
    format                    files
    ========================= =====================================================================
    `hugging_face`          `config.json`, `preprocessor_config.json`, `model.safetensors`
                              (or shards and their index); every model of `model.MODELS`
    `open_clip`             `open_clip_config.json`, `open_clip_model.safetensors` (or
                              `model.safetensors`)
    `openai`                one file of tensors: sizes are inferred from shapes
    `model_soups`           one file of a fine-tuned image tower and its head; the text tower is
                              that of the base
    ========================= =====================================================================

    The formats besides `hugging_face` are of CLIP alone. The directory may also contain tokenizer
    files, as transformers writes them, and the classifier of a fine-tuned CLIP or SigLIP,
    `head.safetensors` with labels in `config.json` or `labels.json`. The classifier of other models
    is one of the tensors of the model, as in transformers' `ViTForImageClassification`. Half
    precision is converted to float32. No code is executed; no pickle is opened or downloaded.

    Args:
      name: a directory, a `.safetensors` file (`openai` and `model_soups` need no more) or
        a repository of the Hugging Face hub, `ORG/NAME` or `ORG/NAME@REVISION`.
      format: one of the above. Default: the first in this order whose config and tensors exist;
        without a config, detected from the tensor names.
      base: for `model_soups`, the model that was fine-tuned
      tokenizer: directory or repository to read the tokenizer from instead

    Returns:
      The checkpoint, with float32 NumPy arrays

    Raises:
      UserError: no such path or repository, another architecture, corrupt files, or tensors that
        are missing, unused, of wrong shape or dtype, or not finite (all in one list)
    """
    path, chosen = _choose(name, format)
    checkpoint = chosen.read(path, base)
    if path.is_dir():
        if (path / HEAD_FILE).is_file():
            head = _read_head(path, checkpoint)
            checkpoint = dataclasses.replace(checkpoint, head=head)
        if checkpoint.head is not None and checkpoint.labels is None:
            labels = _read_labels(path, len(checkpoint.head["bias"]))
            checkpoint = dataclasses.replace(checkpoint, labels=labels)
        if checkpoint.directory is None:
            checkpoint = dataclasses.replace(checkpoint, directory=path)
    if tokenizer is not None:
        directory = resolve(tokenizer, TOKENIZER_FILES)
        checkpoint = dataclasses.replace(checkpoint, directory=directory)
        if not has_tokenizer(checkpoint):
            raise UserError(f"{tokenizer}: no tokenizer found ({' or '.join(VOCABULARY_FILES)})")
    return checkpoint


def save(
    directory: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    format: str = "hugging_face",
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a checkpoint directory for `load` and the library of the format.

    The directory is written under a temporary name, flushed and renamed: a reader sees either the
    complete directory or none.

    Args:
      directory: directory to create
      checkpoint: checkpoint to write, as float32; its tokenizer files are copied.
      format: `hugging_face`, `open_clip` or `openai`; may differ from the input format
      overwrite: replace an existing directory
      texts: further text files, such as {"README.md": model card}
      max_shard_bytes: maximum size of a shard; only `hugging_face` writes shards

    Returns:
      The directory

    Raises:
      UserError: the directory exists or cannot be written; the format cannot represent the model;
        tensors do not match the config or are not finite (all in one list); labels do not match
        the head
    """
    config, directory, chosen = checkpoint.config, Path(directory), formats.writable(format)
    documents = chosen.describe(checkpoint)
    tensors = chosen.tensors(checkpoint, directory)
    head: dict[str, np.ndarray] = {}
    if checkpoint.head is not None:
        classes = np.shape(checkpoint.head["bias"])[0]
        if not config.head_rows(checkpoint.head):
            shapes = _head_shapes(config.feature_size, classes)
            head = write_tree(checkpoint.head, HEAD, shapes, directory / HEAD_FILE)
        if checkpoint.labels is not None:
            labels = _check_labels(checkpoint.labels, classes, directory)
            if CONFIG not in documents:  # Which stores the labels of Hugging Face's format.
                documents = {**documents, LABELS_FILE: labels}
    elif checkpoint.labels is not None:
        raise UserError(f"{directory}: labels need a head")
    with new_directory(directory, overwrite=overwrite) as staging_dir:
        for name, document in documents.items():
            write_indented_json(staging_dir / name, document)
        chosen.write(staging_dir, tensors, max_shard_bytes)
        if head:
            write_tensors(staging_dir / HEAD_FILE, head)
        source = checkpoint.directory
        for name in TOKENIZER_FILES if source else ():
            if source and (source / name).is_file():
                shutil.copyfile(source / name, staging_dir / name)
        for name, text in (texts or {}).items():
            write_text(staging_dir / name, text)
    return directory


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint directory contains a tokenizer."""
    directory = checkpoint.directory
    return directory is not None and any((directory / name).is_file() for name in VOCABULARY_FILES)


def _choose(name: str | os.PathLike[str], format: str | None) -> tuple[Path, CheckpointFormat]:
    """Resolve a name to a local path with the needed files, and detect its format."""
    path = resolve(name, _DOCUMENTS)
    candidates = formats.described(path) if format is None else [formats.readable(format)]
    if not candidates:
        path = resolve(name, (*_DOCUMENTS, *CheckpointFormat.weights))
        return path, formats.named(path)
    for candidate in candidates:
        # Resolve again: only now it is known which tensors to download.
        path = resolve(name, (*_DOCUMENTS, *candidate.weights))
        if candidate.locate(path) is not None:
            return path, candidate
    if path != Path(name):
        raise UserError(
            f"{name}: the repository has no {' or '.join(candidates[0].weights)}; pickle files are "
            "never downloaded: convert one that you trust, or name a revision that has the "
            "file, such as ORG/NAME@refs/pr/1"
        )
    return path, candidates[0]  # Reading it raises an error that names the missing file.


def _read_head(directory: Path, checkpoint: Checkpoint) -> Params:
    """Read the head of a model whose classifier is a separate file."""
    path = directory / HEAD_FILE
    if checkpoint.head is not None:
        raise UserError(
            f"{path}: the model has a classifier among its tensors; delete one of the two"
        )
    files = TensorFiles(path)
    classes = files.shape("bias")[0] if "bias" in files and files.shape("bias") else 0
    return read_tree(files, HEAD, _head_shapes(checkpoint.config.feature_size, classes), path)


def _head_shapes(features: int, classes: int) -> Shapes:
    return {("kernel",): (features, classes), ("bias",): (classes,)}


def _read_labels(directory: Path, classes: int) -> tuple[str, ...] | None:
    """Read the labels of a head from config.json or, without them there, labels.json."""
    config, labels_file = directory / CONFIG, directory / LABELS_FILE
    raw = read_json(config) if config.is_file() else {}
    names = raw.get("id2label") if isinstance(raw, dict) else None
    if names is not None:
        try:
            labels = [names[str(i)] for i in range(len(names))]
        except (KeyError, TypeError):
            raise UserError(f'{config}: the keys of id2label must be "0", "1", ...') from None
    elif labels_file.is_file():
        labels = read_json(labels_file)
        if not isinstance(labels, list):
            raise UserError(f"{labels_file}: must be a list of labels")
    else:
        return None
    named = _check_labels(labels, classes, directory)
    return None if named == formats.unnamed_labels(classes) else named


def _check_labels(labels: Sequence[str], classes: int, where: Path) -> tuple[str, ...]:
    """Check the number of labels; they may repeat, as two pairs of ImageNet's names do."""
    if len(labels) != classes:
        raise UserError(
            f"{where}: the head has {classes} classes, but there are {len(labels)} labels"
        )
    return tuple(labels)
