"""Zero-shot heads: a linear head from class names and prompts, with a cache on disk."""

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
from modelstock_jax.models.compute import DEFAULT_COMPUTE, Compute
from modelstock_jax.models.config import DualEncoderConfig
from modelstock_jax.models.model import encode_text, l2_normalize
from modelstock_jax.models.param_mapping import Params, flatten
from modelstock_jax.models.tokenizer import tokenize, tokenizer_checksum
from modelstock_jax.tensor_files.checksums import checksum_tensors
from modelstock_jax.tensor_files.reader import TensorFiles
from modelstock_jax.tensor_files.writer import write_tensors

# Text lengths are rounded up to a multiple of this: few compiled programs, little padding.
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
    """Create a classifier from prompts with the text tower.

    With f(text) the text features, column k is exp(logit_scale) u / |u| with
    u = mean over templates of f(template of class k) / |f(template of class k)|. The bias is zero,
    and for SigLIP logit_bias, so that sigmoid(logits) are its probabilities.

    CLIP's attention is causal and a text is pooled at its end, so prompts are sorted by length and
    each batch is truncated to its longest prompt. SigLIP's are padded to the context length.

    Args:
      checkpoint: the model; its directory contains the tokenizer
      class_names: K different names
      templates: prompts with '{}' in place of the name
      batch_size: texts per batch
      compute: dtype, attention implementation and remat. Float32 products use full float32
        precision on every accelerator: a head is computed only once.
      allow_repeats: accept repeated names, as in ImageNet's published list; their classes get
        equal columns
      progress: called with (prompts done, total prompts) after each batch

    Returns:
      {"kernel" [E, K], "bias" [K]}, float32

    Raises:
      UserError: no names or repeated names, no templates or one without '{}', a prompt longer than
        the context length, or a tokenizer that does not match the model
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
    """Create a classifier of contexts, i.e. of templates (CAR-FT, Mao et al. 2022).

    As `zero_shot_head`, but averaged over classes: column c is exp(logit_scale) u / |u| with
    u = mean over classes k of f(template c of class k) / |f(template c of class k)|.

    Arguments and errors are those of `zero_shot_head`.

    Returns:
      {"kernel" [E, C], "bias" [C]}, float32, C the number of templates
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
    """Return a head; text i contributes to the mean of column `column[i]`."""
    config = checkpoint.dual_encoder
    used = config.text_lengths(ids)
    count, size = len(ids), min(batch_size, len(ids))
    params = jax.tree.map(jnp.asarray, checkpoint.params["text_tower"])
    # Sums on the host: their order, and so the last bit, is the same on every machine, and only K E
    # values are stored.
    sums = np.zeros((column.max() + 1, config.feature_size))
    order = np.argsort(used, kind="stable")
    for start in range(0, count, size):
        chosen = order[start : start + size]
        longest = -(-int(used[chosen].max()) // _LENGTH_STEP) * _LENGTH_STEP
        # Repeat the last text to fill the last batch: no second compiled program.
        rows = np.pad(chosen, (0, size - len(chosen)), mode="edge")
        features = np.asarray(_embed(config, params, ids[rows, :longest], compute))
        np.add.at(sums, column[chosen], features[: len(chosen)])
        if progress is not None:
            progress(start + len(chosen), count)
    # The sum has the same direction as the mean.
    columns = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    kernel = np.exp(np.float64(checkpoint.params["logit_scale"])) * columns.T
    return {
        "kernel": np.ascontiguousarray(kernel, np.float32),
        "bias": np.full(len(sums), checkpoint.params.get("logit_bias", 0), np.float32),
    }


def prompt_ids(
    checkpoint: Checkpoint, class_names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Return token ids, int32 [K T, L], of all prompts; the T templates of a class are adjacent.

    Raises:
      UserError: as `zero_shot_head`
    """
    if checkpoint.directory is None:
        raise UserError("zero_shot_head: the checkpoint has no tokenizer directory")
    config = checkpoint.dual_encoder
    text = config.text
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    ids = tokenize(
        checkpoint.directory,
        prompts,
        text.max_position_embeddings,
        lower_case=config.lower_case,
    )
    if ids.max() >= text.vocab_size:
        raise UserError(
            f"{checkpoint.directory}: the tokenizer returned id {ids.max()}, but the text tower "
            f"has only {text.vocab_size} tokens"
        )
    config.check_ids(ids, checkpoint.directory)
    return ids


def _embed(
    config: DualEncoderConfig, params: Params, ids: np.ndarray, compute: Compute
) -> jax.Array:
    # The default on a GPU or TPU is TF32 or bfloat16, with an error of 1e-3.
    with jax.default_matmul_precision("highest"):
        return _unit_features(config, params, ids, compute)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _unit_features(
    config: DualEncoderConfig, params: Params, ids: jax.Array, compute: Compute
) -> jax.Array:
    return l2_normalize(encode_text(config, params, ids, compute))


def _check(class_names: Sequence[str], templates: Sequence[str], allow_repeats: bool) -> None:
    for noun, texts in (("class names", class_names), ("templates", templates)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"zero_shot_head: {noun} must be a list of texts")
        if not texts:
            raise UserError(f"zero_shot_head: no {noun}")
    repeated = sorted(name for name, count in Counter(class_names).items() if count > 1)
    if repeated and not allow_repeats:
        raise UserError(f"zero_shot_head: repeated class names: {', '.join(repeated)}")
    if bare := [template for template in templates if "{}" not in template]:
        raise UserError(f"zero_shot_head: templates without '{{}}': {', '.join(map(repr, bare))}")


# Part of every key: increase it when the computation changes, so that all heads are recomputed.
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
    """Return `zero_shot_head`, from the cache if the same head was computed before.

    File name and header contain the checksum of everything that the head depends on (`head_key`);
    the header also has the checksum of the head. A truncated, modified or different file is
    replaced by a newly computed head.

    Args:
      directory: directory of the cache, one file per head; created if missing
      checkpoint: as in `zero_shot_head`
      class_names: K names
      templates: prompts
      compute: its dtype and attention implementation are part of the key
      **options: further arguments of `zero_shot_head`: batch_size, allow_repeats, progress (not
        called if the head is read from the cache)

    Returns:
      {"kernel" [E, K], "bias" [K]}, float32

    Raises:
      UserError: as `zero_shot_head`; or the directory cannot be written
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
    """Return `context_head`, cached as in `cached_zero_shot_head`.

    Arguments, return value and errors are those of the two functions.
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
    # The key identifies the inputs; the file name tells which of the two heads it is.
    path = start.with_name(f"{start.name}_{key[:16]}.safetensors")
    shapes: dict[str, tuple[int, ...]] = {
        "kernel": (checkpoint.config.feature_size, columns),
        "bias": (columns,),
    }
    head = _read(path, key, shapes)
    if head is None:
        head = make(checkpoint, class_names, templates, compute=compute)
        if jax.process_index() == 0:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{path.parent}: cannot be created ({error.strerror})") from None
            write_tensors(path, head, {"key": key, "digest": checksum_tensors(head)})
    return head


def head_key(
    checkpoint: Checkpoint,
    class_names: Sequence[str],
    templates: Sequence[str],
    compute: Compute = DEFAULT_COMPUTE,
) -> str:
    """Compute SHA-256 over everything that a head depends on.

    Sizes and weights of the text tower, logit_scale, tokenizer files, class names, templates,
    dtype and attention implementation.

    Args:
      checkpoint: as in `zero_shot_head`
      class_names: in the order of the columns
      templates: in order; another order gives another key
      compute: dtype and attention implementation of the text tower

    Returns:
      64 hexadecimal digits

    Raises:
      UserError: the checkpoint has no tokenizer directory
    """
    if checkpoint.directory is None:
        raise UserError("head_key: the checkpoint has no tokenizer directory")
    config = checkpoint.dual_encoder
    text = {name: checkpoint.params[name] for name in config.text_params}
    parts = {
        "version": _VERSION,
        "config": dataclasses.asdict(config.text),
        "weights": checksum_tensors({".".join(p): np.asarray(x) for p, x in flatten(text)}),
        "tokenizer": tokenizer_checksum(checkpoint.directory),
        "class_names": list(class_names),
        "templates": list(templates),
        "dtype": compute.dtype.name,
        "attention": compute.attention_impl,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str, shapes: dict[str, tuple[int, ...]]) -> Params | None:
    """Return the head of an intact file with this key; else None."""
    if not path.is_file():
        return None
    try:
        files = TensorFiles(path)
        metadata = files.metadata()
        if {name: files.shape(name) for name in files} != shapes or metadata.get("key") != key:
            return None
        head = {name: files[name] for name in files}
    except UserError:
        return None
    return head if metadata.get("digest") == checksum_tensors(head) else None
