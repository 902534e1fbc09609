"""CLIP checkpoints on disk: read whole and checked, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.config import CLIPConfig
from modelstock_jax.clip.model import Params, abstract_params
from modelstock_jax.clip.names import HEAD, Row, flatten, hugging_face, unflatten
from modelstock_jax.clip.preprocessor import Preprocessor
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.reader import TensorFiles, read_json
from modelstock_jax.tensor_files.writer import (
    new_directory,
    write_directory_tensors,
    write_json,
    write_tensors,
    write_text,
)

HEAD_FILE = "head.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint directory in Hugging Face's layout.

    ``config.json``, ``preprocessor_config.json``, ``model.safetensors`` (or shards and their
    index), the tokenizer's files, and for a fine-tuned model ``head.safetensors``. Half precision
    is widened to float32. Nothing in it is executed.

    Args:
        path: The directory.

    Returns:
        The checkpoint, with float32 NumPy arrays.

    Raises:
        UserError: No such directory, another architecture, broken files, or tensors that are
            missing, unused, misshapen, of a wrong dtype or not finite (all in one list).
    """
    directory = Path(path)
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "no such directory"
        raise UserError(f"{directory}: {what}; a checkpoint is a directory with config.json.")
    raw = read_json(directory / "config.json")
    try:
        config = CLIPConfig.from_dict(raw)
    except UserError as error:
        raise UserError(f"{directory / 'config.json'}: {error}") from None
    shapes = {ours: leaf.shape for ours, leaf in flatten(abstract_params(config))}
    params = _read(TensorFiles(directory), hugging_face(config), shapes, directory)
    preprocessor = Preprocessor.read(directory)
    size = config.vision.image_size
    if preprocessor.image_size != size:
        raise UserError(
            f"{directory}: the preprocessor makes images of {preprocessor.image_size}, the image "
            f"tower takes {size}."
        )
    head, labels = _read_head(directory, raw, config.projection_dim)
    return Checkpoint(config, params, preprocessor, directory, head, labels)


def save(
    directory: str | os.PathLike[str],
    checkpoint: Checkpoint,
    *,
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes a checkpoint directory that `load` and transformers' ``CLIPModel`` open.

    All of it is written beside its place and flushed, then takes its name: a reader sees the
    whole directory or none.

    Args:
        directory: Where.
        checkpoint: What; the tokenizer's files are copied from its own directory. Arrays are
            written as float32.
        overwrite: Replace an existing directory.
        texts: More text files, such as {"README.md": a model card}.
        max_shard_bytes: Larger models are written in shards.

    Returns:
        The directory.

    Raises:
        UserError: It exists or cannot be written; tensors that do not fit the config or are not
            finite (all in one list); labels that do not fit the head.
    """
    config, directory = checkpoint.config, Path(directory)
    shapes = {ours: leaf.shape for ours, leaf in flatten(abstract_params(config))}
    tensors = _write(checkpoint.params, hugging_face(config), shapes, directory)
    raw = config.to_dict()
    head: dict[str, np.ndarray] = {}
    if checkpoint.head is not None:
        classes = np.shape(checkpoint.head["bias"])[0]
        shapes = {("kernel",): (config.projection_dim, classes), ("bias",): (classes,)}
        head = _write(checkpoint.head, HEAD, shapes, directory / HEAD_FILE)
        if checkpoint.labels is not None:
            labels = _check_labels(checkpoint.labels, classes, directory)
            raw["id2label"] = {str(i): label for i, label in enumerate(labels)}
            raw["label2id"] = {label: i for i, label in enumerate(labels)}
    elif checkpoint.labels is not None:
        raise UserError(f"{directory}: labels without a head.")
    with new_directory(directory, overwrite=overwrite) as beside:
        write_json(beside / "config.json", raw)
        write_json(beside / "preprocessor_config.json", checkpoint.preprocessor.to_dict())
        write_directory_tensors(beside, tensors, max_shard_bytes)
        if head:
            write_tensors(beside / HEAD_FILE, head)
        for name in TOKENIZER_FILES if checkpoint.directory else ():
            if (checkpoint.directory / name).is_file():
                shutil.copyfile(checkpoint.directory / name, beside / name)
        for name, text in (texts or {}).items():
            write_text(beside / name, text)
    return directory


def _read(
    files: TensorFiles,
    rows: list[Row],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    where: Path,
) -> Params:
    """Our tree from their tensors, or one error that lists all that is wrong."""
    problems, leaves = [], {}
    for row in rows:
        expected = row.transform.shape(shapes[row.ours])
        if row.theirs not in files:
            problems.append(f"missing: {row.theirs} {_show(expected)}")
        elif files.shape(row.theirs) != expected:
            found = _show(files.shape(row.theirs))
            problems.append(f"misshapen: {row.theirs} is {found}, not {_show(expected)}")
        elif files.dtype(row.theirs).name not in ("float16", "bfloat16", "float32", "float64"):
            problems.append(f"not floating-point: {row.theirs} is {files.dtype(row.theirs)}")
        else:
            array = row.transform.read(files[row.theirs])
            leaves[row.ours] = np.asarray(array, np.float32, order="C")
            if not np.isfinite(leaves[row.ours]).all():
                problems.append(f"not finite: {row.theirs}")
    known = {row.theirs for row in rows}
    # Older checkpoints keep a count 0, 1, 2, ... beside the position embeddings.
    problems += [
        f"unused: {name} {_show(files.shape(name))}"
        for name in files
        if name not in known and not name.endswith(".position_ids")
    ]
    _raise(where, problems)
    return unflatten(leaves)


def _write(
    tree: Params,
    rows: list[Row],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    where: Path,
) -> dict[str, np.ndarray]:
    """Their tensors from our tree, or one error that lists all that is wrong."""
    leaves = dict(flatten(tree))
    problems = [f"unused: {'.'.join(path)}" for path in sorted(leaves.keys() - shapes.keys())]
    tensors = {}
    for row in rows:
        name = ".".join(row.ours)
        if row.ours not in leaves:
            problems.append(f"missing: {name} {_show(shapes[row.ours])}")
            continue
        array = np.asarray(leaves[row.ours], np.float32)
        if array.shape != shapes[row.ours]:
            expected = _show(shapes[row.ours])
            problems.append(f"misshapen: {name} is {_show(array.shape)}, not {expected}")
        elif not np.isfinite(array).all():
            problems.append(f"not finite: {name}")
        else:
            tensors[row.theirs] = row.transform.write(array)
    _raise(where, problems)
    return tensors


def _read_head(
    directory: Path, raw: dict[str, Any], features: int
) -> tuple[Params | None, tuple[str, ...] | None]:
    path = directory / HEAD_FILE
    if not path.is_file():
        return None, None
    files = TensorFiles(path)
    classes = files.shape("bias")[0] if "bias" in files and files.shape("bias") else 0
    head = _read(files, HEAD, {("kernel",): (features, classes), ("bias",): (classes,)}, path)
    names = raw.get("id2label")
    if names is None:
        return head, None
    try:
        labels = [names[str(i)] for i in range(len(names))]
    except (KeyError, TypeError):
        raise UserError(f'{directory / "config.json"}: id2label must count from "0" up.') from None
    return head, _check_labels(labels, classes, directory)


def _check_labels(labels: Any, classes: int, where: Path) -> tuple[str, ...]:
    if len(labels) != classes or len(set(labels)) != classes:
        raise UserError(
            f"{where}: the head has {classes} classes, the labels are {len(labels)} with "
            f"{len(set(labels))} different ones."
        )
    return tuple(labels)


def _show(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _raise(where: Path, problems: list[str]) -> None:
    if problems:
        raise UserError(f"{where}: tensors that do not fit: {'; '.join(problems)}.")
