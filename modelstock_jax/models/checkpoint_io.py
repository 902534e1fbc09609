"""CLIP checkpoints on disk: read whole and checked, written whole or not at all."""

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
from modelstock_jax.models.clip import Params
from modelstock_jax.models.formats import CONFIG
from modelstock_jax.models.param_mapping import HEAD, read_tree, write_tree
from modelstock_jax.models.tokenizer import TOKENIZER_FILES
from modelstock_jax.tensor_files.hub import resolve
from modelstock_jax.tensor_files.reader import TensorFiles, read_json
from modelstock_jax.tensor_files.writer import write_indented_json, write_tensors, write_text

# Labels of the head, in a layout whose own config has no place for them.
LABELS_FILE = "labels.json"
# Configs, indexes of shards and the tokenizer's files: small, and enough to know the layout.
_DOCUMENTS = ("*.json", "merges.txt")


def load(
    name: str | os.PathLike[str],
    *,
    format: str | None = None,
    base: Checkpoint | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Reads a checkpoint, with its head where it has one.

    ========================= =====================================================================
    layout                    files
    ========================= =====================================================================
    ``hugging_face``          ``config.json``, ``preprocessor_config.json``, ``model.safetensors``
                              (or shards and their index)
    ``open_clip``             ``open_clip_config.json``, ``open_clip_model.safetensors`` (or
                              ``model.safetensors``)
    ``openai``                one file of tensors: sizes are inferred from shapes
    ``model_soups``           one file of a fine-tuned image tower and its head; the text tower is
                              the base's
    ========================= =====================================================================

    Beside them may lie the tokenizer's files, as transformers writes them, and a fine-tuned model's
    classifier in ``head.safetensors``, its labels in ``config.json`` or ``labels.json``. Half
    precision is widened to float32. Nothing is executed, and no pickle is opened or fetched.

    Args:
        name: A directory, a ``.safetensors`` file (``openai`` and ``model_soups`` need no more) or
            a repository of Hugging Face's hub, ``ORG/NAME`` or ``ORG/NAME@REVISION``.
        format: One of the above. By default the first in that order of which the config and the
            tensors are there, and where there is no config the one that the tensors' names tell.
        base: With ``model_soups``, the model that was fine-tuned.
        tokenizer: A directory or repository whose tokenizer is taken instead.

    Returns:
        The checkpoint, with float32 NumPy arrays.

    Raises:
        UserError: No such path or repository, another architecture, broken files, or tensors that
            are missing, unused, misshapen, of a wrong dtype or not finite (all in one list).
    """
    path, chosen = _choose(name, format)
    checkpoint = chosen.read(path, base)
    if path.is_dir():
        if (path / HEAD_FILE).is_file():
            head, labels = _read_head(path, checkpoint.config.projection_dim)
            checkpoint = dataclasses.replace(checkpoint, head=head, labels=labels)
        if checkpoint.directory is None:
            checkpoint = dataclasses.replace(checkpoint, directory=path)
    if tokenizer is not None:
        directory = resolve(tokenizer, TOKENIZER_FILES)
        checkpoint = dataclasses.replace(checkpoint, directory=directory)
        if not has_tokenizer(checkpoint):
            raise UserError(f"{tokenizer}: no tokenizer (tokenizer.json or vocab.json) there.")
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
    """Writes a checkpoint directory that `load` and the layout's own library open.

    All of it is written beside its place and flushed, then takes its name: a reader sees the
    whole directory or none.

    Args:
        directory: Where.
        checkpoint: What; the tokenizer's files are copied from its own directory. Arrays are
            written as float32.
        format: ``hugging_face``, ``open_clip`` or ``openai``, whatever it was read from.
        overwrite: Replace an existing directory.
        texts: More text files, such as {"README.md": a model card}.
        max_shard_bytes: Larger models are written in shards, in Hugging Face's layout.

    Returns:
        The directory.

    Raises:
        UserError: It exists or cannot be written; a model that the layout cannot say; tensors that
            do not fit the config or are not finite (all in one list); labels that do not fit the
            head.
    """
    config, directory, chosen = checkpoint.config, Path(directory), formats.writable(format)
    documents = chosen.describe(checkpoint)
    tensors = chosen.tensors(checkpoint, directory)
    head: dict[str, np.ndarray] = {}
    if checkpoint.head is not None:
        classes = np.shape(checkpoint.head["bias"])[0]
        shapes: dict[tuple[str, ...], tuple[int, ...]] = {
            ("kernel",): (config.projection_dim, classes),
            ("bias",): (classes,),
        }
        head = write_tree(checkpoint.head, HEAD, shapes, directory / HEAD_FILE)
        if checkpoint.labels is not None:
            labels = _check_labels(checkpoint.labels, classes, directory)
            if CONFIG not in documents:  # Where labels lie in Hugging Face's layout.
                documents = {**documents, LABELS_FILE: labels}
    elif checkpoint.labels is not None:
        raise UserError(f"{directory}: labels without a head.")
    with new_directory(directory, overwrite=overwrite) as beside:
        for name, document in documents.items():
            write_indented_json(beside / name, document)
        chosen.write(beside, tensors, max_shard_bytes)
        if head:
            write_tensors(beside / HEAD_FILE, head)
        source = checkpoint.directory
        for name in TOKENIZER_FILES if source else ():
            if source and (source / name).is_file():
                shutil.copyfile(source / name, beside / name)
        for name, text in (texts or {}).items():
            write_text(beside / name, text)
    return directory


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether a tokenizer lies in the checkpoint's directory."""
    names = ("tokenizer.json", "vocab.json")
    directory = checkpoint.directory
    return directory is not None and any((directory / name).is_file() for name in names)


def _choose(name: str | os.PathLike[str], format: str | None) -> tuple[Path, CheckpointFormat]:
    """The path that a name stands for, with what its layout needs, and that layout."""
    path = resolve(name, _DOCUMENTS)
    candidates = formats.described(path) if format is None else [formats.readable(format)]
    if not candidates:
        path = resolve(name, (*_DOCUMENTS, *CheckpointFormat.weights))
        return path, formats.named(path)
    for candidate in candidates:
        # A name that is fetched is asked for again: only now is it known which tensors.
        path = resolve(name, (*_DOCUMENTS, *candidate.weights))
        if candidate.locate(path) is not None:
            return path, candidate
    if path != Path(name):
        raise UserError(
            f"{name}: no {' or '.join(candidates[0].weights)} in that repository; pickle files are "
            "never fetched: convert one once where you trust it, or name a revision that has the "
            "file, such as ORG/NAME@refs/pr/1."
        )
    return path, candidates[0]  # Its own error says what is missing.


def _read_head(directory: Path, features: int) -> tuple[Params, tuple[str, ...] | None]:
    """The head and its labels: those of config.json where it has some, else of labels.json."""
    path = directory / HEAD_FILE
    files = TensorFiles(path)
    classes = files.shape("bias")[0] if "bias" in files and files.shape("bias") else 0
    head = read_tree(files, HEAD, {("kernel",): (features, classes), ("bias",): (classes,)}, path)
    config, beside = directory / CONFIG, directory / LABELS_FILE
    raw = read_json(config) if config.is_file() else {}
    names = raw.get("id2label") if isinstance(raw, dict) else None
    if names is not None:
        try:
            labels = [names[str(i)] for i in range(len(names))]
        except (KeyError, TypeError):
            raise UserError(f'{config}: id2label must count from "0" up.') from None
    elif beside.is_file():
        labels = read_json(beside)
        if not isinstance(labels, list):
            raise UserError(f"{beside}: must be a list of labels.")
    else:
        return head, None
    return head, _check_labels(labels, classes, directory)


def _check_labels(labels: Sequence[str], classes: int, where: Path) -> tuple[str, ...]:
    """Labels may repeat, as two pairs of ImageNet's published names do."""
    if len(labels) != classes:
        raise UserError(f"{where}: the head has {classes} classes, the labels are {len(labels)}.")
    return tuple(labels)
