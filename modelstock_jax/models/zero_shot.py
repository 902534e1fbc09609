"""Zero-shot heads: a linear head from class names and prompts, and its cache on disk."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.models.checkpoint import Checkpoint
from modelstock_jax.models.clip import Params, encode_text, l2_normalize
from modelstock_jax.models.config import LEGACY_EOS_TOKEN_ID, CLIPConfig
from modelstock_jax.models.param_mapping import flatten
from modelstock_jax.models.tokenizer import tokenize, tokenizer_checksum
from modelstock_jax.models.transformer import DEFAULT_COMPUTE, Compute, end_of_text
from modelstock_jax.tensor_files.checksums import checksum_tensors
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors

# A text tower runs over positions in steps of this many: few programs, little padding.
_LENGTH_STEP = 8


def zero_shot_head(
    checkpoint: Checkpoint,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 512,
    compute: Compute = DEFAULT_COMPUTE,
    allow_repeats: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """The classifier that the text tower makes from prompts.

    With f(text) the text features, column k is exp(logit_scale) u / |u| with
    u = mean over templates of f(template of class k) / |f(template of class k)|; the bias is zero.

    A text is pooled at its end, which sees nothing of what follows: prompts are run in the order
    of their ends, each batch cut behind its last one.

    Args:
        checkpoint: The model, whose directory holds its tokenizer.
        class_names: K names, all different.
        templates: Prompts, each with '{}' where the name goes.
        batch_size: Texts in one pass of the text tower.
        compute: Dtype, attention and remat. Products of float32 are taken in full float32,
            whatever an accelerator's default: a head is made once.
        allow_repeats: Take names that stand twice, as ImageNet's published list has them; such
            classes get equal columns.
        progress: Called with (prompts done, prompts in all) after each batch.

    Returns:
        {"kernel" [E, K], "bias" [K]}, float32.

    Raises:
        UserError: No names or repeated ones, no templates or one without '{}', a prompt longer
            than the text tower's context, or a tokenizer that does not fit the model.
    """
    _check(class_names, templates, allow_repeats)
    ids = prompt_ids(checkpoint, class_names, templates)
    of_class = np.repeat(np.arange(len(class_names)), len(templates))
    return _head(checkpoint, ids, of_class, batch_size, compute, progress)


def context_head(
    checkpoint: Checkpoint,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 512,
    compute: Compute = DEFAULT_COMPUTE,
    allow_repeats: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Params:
    """The classifier of contexts: what a prompt says beside its class (CAR-FT, Mao et al. 2022).

    As `zero_shot_head`, with the other mean: column c is exp(logit_scale) u / |u| with
    u = mean over classes k of f(template c of class k) / |f(template c of class k)|.

    Args and errors are those of `zero_shot_head`.

    Returns:
        {"kernel" [E, C], "bias" [C]}, float32, C the number of templates.
    """
    _check(class_names, templates, allow_repeats)
    ids = prompt_ids(checkpoint, class_names, templates)
    of_context = np.tile(np.arange(len(templates)), len(class_names))
    return _head(checkpoint, ids, of_context, batch_size, compute, progress)


def _head(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    column: np.ndarray,
    batch_size: int,
    compute: Compute,
    progress: Callable[[int, int], None] | None,
) -> Params:
    """A head whose columns are the mean features of the texts that `column` gives them."""
    used = 1 + np.asarray(end_of_text(jnp.asarray(ids), checkpoint.config.text.eos_token_id))
    count, size = len(ids), min(batch_size, len(ids))
    params = jax.tree.map(jnp.asarray, checkpoint.params["text_tower"])
    # Sums on the host: their order, and so the last bit, is the same on every machine, and K E
    # numbers is all that is kept of the features.
    sums = np.zeros((column.max() + 1, checkpoint.config.projection_dim))
    order = np.argsort(used, kind="stable")
    for start in range(0, count, size):
        chosen = order[start : start + size]
        longest = -(-int(used[chosen].max()) // _LENGTH_STEP) * _LENGTH_STEP
        # The last batch is padded by its own last text: no other program for it.
        rows = np.pad(chosen, (0, size - len(chosen)), mode="edge")
        features = np.asarray(_embed(checkpoint.config, params, ids[rows, :longest], compute))
        np.add.at(sums, column[chosen], features[: len(chosen)])
        if progress is not None:
            progress(start + len(chosen), count)
    # The direction of a sum is that of the mean.
    columns = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    kernel = np.exp(np.float64(checkpoint.params["logit_scale"])) * columns.T
    return {
        "kernel": np.ascontiguousarray(kernel, np.float32),
        "bias": np.zeros(len(sums), np.float32),
    }


def prompt_ids(
    checkpoint: Checkpoint, class_names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Token ids int32 [K T, L] of every prompt, a class's templates in a row.

    Raises:
        UserError: As `zero_shot_head`.
    """
    if checkpoint.directory is None:
        raise UserError("zero_shot_head: the checkpoint has no directory, so no tokenizer.")
    text = checkpoint.config.text
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    ids = tokenize(checkpoint.directory, prompts, text.max_position_embeddings)
    if ids.max() >= text.vocab_size:
        raise UserError(
            f"{checkpoint.directory}: the tokenizer gives id {ids.max()}, the text tower has "
            f"{text.vocab_size} tokens."
        )
    if text.eos_token_id != LEGACY_EOS_TOKEN_ID and not (ids == text.eos_token_id).any(1).all():
        raise UserError(
            f"{checkpoint.directory}: the tokenizer never gives eos_token_id {text.eos_token_id} "
            "of the config, at which a text is pooled."
        )
    return ids


def _embed(config: CLIPConfig, params: Params, ids: np.ndarray, compute: Compute) -> jax.Array:
    # On a GPU or TPU the default is TF32 or bfloat16, an error of 1e-3.
    with jax.default_matmul_precision("highest"):
        return _unit_features(config, params, ids, compute)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _unit_features(
    config: CLIPConfig, params: Params, ids: jax.Array, compute: Compute
) -> jax.Array:
    return l2_normalize(encode_text(config, params, ids, compute))


def _check(class_names: Sequence[str], templates: Sequence[str], allow_repeats: bool) -> None:
    for what, given in (("class names", class_names), ("templates", templates)):
        if isinstance(given, str) or not all(isinstance(x, str) for x in given):
            raise UserError(f"zero_shot_head: {what} must be a list of texts.")
        if not given:
            raise UserError(f"zero_shot_head: no {what}.")
    twice = sorted(name for name, count in Counter(class_names).items() if count > 1)
    if twice and not allow_repeats:
        raise UserError(f"zero_shot_head: class names given more than once: {', '.join(twice)}.")
    if bare := [template for template in templates if "{}" not in template]:
        raise UserError(f"zero_shot_head: templates without '{{}}': {', '.join(map(repr, bare))}.")


# Heads from the text tower, kept on disk by what they are made of.


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
            write_tensors(path, head, {"key": key, "digest": checksum_tensors(head)})
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
        "weights": checksum_tensors({".".join(p): np.asarray(x) for p, x in flatten(text)}),
        "tokenizer": tokenizer_checksum(checkpoint.directory),
        "class_names": list(class_names),
        "templates": list(templates),
        "dtype": compute.dtype.name,
        "attention": compute.attention_impl,
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
    return head if said.get("digest") == checksum_tensors(head) else None
