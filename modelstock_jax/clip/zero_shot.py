"""A linear head from class names and prompts, through a checkpoint's own tokenizer."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modelstock_jax.clip.checkpoint import Checkpoint
from modelstock_jax.clip.config import LEGACY_EOS_TOKEN_ID, CLIPConfig
from modelstock_jax.clip.model import DEFAULT_COMPUTE, Compute, Params, encode_text, normalise
from modelstock_jax.errors import UserError


def tokenize(
    directory: str | os.PathLike[str],
    texts: Sequence[str],
    context_length: int,
    *,
    truncate: bool = False,
) -> np.ndarray:
    """Token ids of texts: begin, pieces, end, and padding to one length.

    Args:
        directory: A checkpoint's, with its tokenizer's files.
        texts: M texts.
        context_length: L, at most the text tower's number of positions.
        truncate: Cut a longer text, keeping its end mark; without it, such a text is an error.

    Returns:
        [M, L], int32.

    Raises:
        UserError: No tokenizer there, or a text of more than L tokens.
    """
    path = Path(directory).resolve()
    tokenizer, pad = _tokenizer(path, _stamp(path), context_length if truncate else None)
    rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    ids = np.full((len(rows), context_length), pad, np.int32)
    for i, row in enumerate(rows):
        if len(row) > context_length:
            raise UserError(
                f"tokenize: {len(row)} tokens in {texts[i]!r}, the context length is "
                f"{context_length}; shorten the text or pass truncate=True."
            )
        ids[i, : len(row)] = row
    return ids


def zero_shot_head(
    checkpoint: Checkpoint,
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 512,
    compute: Compute = DEFAULT_COMPUTE,
) -> Params:
    """The classifier that the text tower makes from prompts.

    With f(text) the text features, column k is exp(logit_scale) u / |u| with
    u = mean over templates of f(template of class k) / |f(template of class k)|; the bias is zero.

    Args:
        checkpoint: The model, whose directory holds its tokenizer.
        class_names: K names, all different.
        templates: Prompts, each with '{}' where the name goes.
        batch_size: Texts in one pass of the text tower.
        compute: Dtype, attention and remat.

    Returns:
        {"kernel" [E, K], "bias" [K]}, float32.

    Raises:
        UserError: No or duplicated names, no templates or one without '{}', a prompt longer than
            the text tower's context, or a tokenizer that does not fit the model.
    """
    _check(class_names, templates)
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
    params = jax.tree.map(jnp.asarray, checkpoint.params["text_tower"])
    # The last batch is padded, so that there is one compilation.
    size = min(batch_size, len(ids))
    padded = np.concatenate([ids, np.repeat(ids[-1:], -len(ids) % size, axis=0)])
    parts = [
        _embed(checkpoint.config, params, padded[i : i + size], compute)
        for i in range(0, len(padded), size)
    ]
    features = jnp.concatenate(parts)[: len(ids)].reshape(len(class_names), len(templates), -1)
    scale = jnp.exp(jnp.asarray(checkpoint.params["logit_scale"]))
    kernel = (scale * normalise(features.mean(axis=1))).T
    return {"kernel": kernel, "bias": jnp.zeros(len(class_names), kernel.dtype)}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _embed(config: CLIPConfig, params: Params, ids: jax.Array, compute: Compute) -> jax.Array:
    return normalise(encode_text(config, params, ids, compute))


def _check(class_names: Sequence[str], templates: Sequence[str]) -> None:
    for what, given in (("class names", class_names), ("templates", templates)):
        if isinstance(given, str) or not all(isinstance(x, str) for x in given):
            raise UserError(f"zero_shot_head: {what} must be a list of texts.")
        if not given:
            raise UserError(f"zero_shot_head: no {what}.")
    names = list(class_names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"zero_shot_head: class names given more than once: {', '.join(twice)}.")
    if bare := [template for template in templates if "{}" not in template]:
        raise UserError(f"zero_shot_head: templates without '{{}}': {', '.join(map(repr, bare))}.")


def _stamp(directory: Path) -> tuple[tuple[str, int], ...]:
    """What changes when a tokenizer's files do."""
    files = (directory / name for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"))
    return tuple((file.name, file.stat().st_mtime_ns) for file in files if file.is_file())


@functools.lru_cache(maxsize=8)
def _tokenizer(directory: Path, stamp: Any, max_length: int | None) -> tuple[Any, int]:
    """The fast tokenizer of a directory and its padding id; kept, for training calls it often."""
    if not stamp:
        raise UserError(f"{directory}: no tokenizer (tokenizer.json or vocab.json) there.")
    # Without PyTorch, which is not needed, transformers advises to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # Seconds: only where text is read.

    try:
        whole = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        fast = whole.backend_tokenizer
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise UserError(f"{directory}: its tokenizer cannot be opened ({reason}).") from None
    fast.no_padding()
    fast.no_truncation()
    if max_length is not None:
        fast.enable_truncation(max_length)
    pad = whole.pad_token_id if whole.pad_token_id is not None else whole.eos_token_id
    return fast, int(pad or 0)
