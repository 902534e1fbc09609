"""Heads from the text tower, kept on disk by what they are made of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.model import Params
from modelstock_jax.clip.tokenizer import tokenizer_digest
from modelstock_jax.clip.transformer import DEFAULT_COMPUTE, Compute
from modelstock_jax.clip.trees import flatten
from modelstock_jax.clip.zero_shot import context_head, zero_shot_head
from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.digests import digest_tensors
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors

# A part of every key: a change of the arithmetic makes all heads anew.
_VERSION = "1"


def cached_zero_shot_head(
    directory: str | os.PathLike[str],
    checkpoint: Checkpoint,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    compute: Compute = DEFAULT_COMPUTE,
    **options: Any,
) -> Params:
    """`zero_shot_head`, read where the same head was made before.

    The file's name and header say the digest of everything that the head depends on (`head_key`),
    and its header that of the head. A file that is cut short, changed or of another head is not
    trusted: the head is made anew and takes its place.

    Args:
        directory: Where heads are kept, one file each; made where missing.
        checkpoint: As this and the others are for `zero_shot_head`.
        class_names: K names.
        templates: Prompts.
        compute: Dtype and attention, which enter the key.
        **options: Of `zero_shot_head`, where the head is made: batch_size, allow_repeats and
            progress, which is not called where it is read.

    Returns:
        {"kernel" [E, K], "bias" [K]}, float32.

    Raises:
        UserError: As `zero_shot_head`, or the directory cannot be written.
    """
    make = partial(zero_shot_head, **options)
    start = Path(directory, "zero_shot_head")
    return _cached(make, start, len(class_names), checkpoint, class_names, templates, compute)


def cached_context_head(
    directory: str | os.PathLike[str],
    checkpoint: Checkpoint,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    compute: Compute = DEFAULT_COMPUTE,
    **options: Any,
) -> Params:
    """`context_head`, kept as `cached_zero_shot_head` keeps its own.

    Args, returns and errors are those of the two.
    """
    make = partial(context_head, **options)
    start = Path(directory, "context_head")
    return _cached(make, start, len(templates), checkpoint, class_names, templates, compute)


def _cached(
    make: Callable[..., Params],
    start: Path,
    columns: int,
    checkpoint: Checkpoint,
    class_names: Sequence[str],
    templates: Sequence[str],
    compute: Compute,
) -> Params:
    key = head_key(checkpoint, class_names, templates, compute)
    # The key tells what a head is made of, the file's name which of the two it is.
    path = start.with_name(f"{start.name}_{key[:16]}.safetensors")
    shapes: dict[str, tuple[int, ...]] = {
        "kernel": (checkpoint.config.projection_dim, columns),
        "bias": (columns,),
    }
    head = _read(path, key, shapes)
    if head is None:
        head = make(checkpoint, class_names, templates, compute=compute)
        if jax.process_index() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{path.parent}: cannot be made ({error.strerror}).") from None
            write_tensors(path, head, {"key": key, "digest": digest_tensors(head)})
    return head


def head_key(
    checkpoint: Checkpoint,
    class_names: Sequence[str],
    templates: Sequence[str],
    compute: Compute = DEFAULT_COMPUTE,
) -> str:
    """SHA-256 over all that a head depends on.

    That is the text tower's sizes and weights, logit_scale, the tokenizer's files, class names,
    templates, and the dtype and attention that it is computed with.

    Args:
        checkpoint: As for `zero_shot_head`.
        class_names: In the order of the columns.
        templates: In any order, which counts.
        compute: Of the text tower.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: A checkpoint without a directory: none with a tokenizer.
    """
    if checkpoint.directory is None:
        raise UserError("head_key: the checkpoint has no directory, so no tokenizer.")
    text = {name: checkpoint.params[name] for name in ("text_tower", "logit_scale")}
    parts = {
        "version": _VERSION,
        "config": dataclasses.asdict(checkpoint.config.text),
        "weights": digest_tensors({".".join(p): np.asarray(x) for p, x in flatten(text)}),
        "tokenizer": tokenizer_digest(checkpoint.directory),
        "class_names": list(class_names),
        "templates": list(templates),
        "dtype": compute.dtype.name,
        "attention": compute.attention,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str, shapes: dict[str, tuple[int, ...]]) -> Params | None:
    """The head of a file that is whole and says the key; else None."""
    if not path.is_file():
        return None
    try:
        files = TensorFiles(path)
        said = files.metadata()
        if {name: files.shape(name) for name in files} != shapes or said.get("key") != key:
            return None
        head = {name: files[name] for name in files}
    except UserError:
        return None
    return head if said.get("digest") == digest_tensors(head) else None
