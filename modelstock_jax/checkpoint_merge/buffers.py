"""Roles of tensors by their names: index-like buffers, masks, counters, and embeddings."""

from __future__ import annotations

import re

# What a model computes from its config and never trains. They are numbers of positions, masks and
# tables of frequencies, in whatever dtype a library stored them. `mask_token` and `freqs` alone are
# weights in some models, so only these endings count.
_INDEX = re.compile(
    r"(?:.*[._])?(?:ids|idx|index|indices|inv_freq|inv_freqs|freqs_cis|cos_cached|sin_cached|"
    r"masked_bias|relative_coords_table)"
)
_MASK = re.compile(r"(?:.*[._])?mask")

# GPT-2's causal mask: a buffer with a weight's name, known by its shape [1, 1, n, n].
_CAUSAL = re.compile(r"(?:.*\.)?attn(?:ention)?\.bias")
_EMBEDDING = re.compile(r"(?:.*[./])?(?:\w*emb\w*|wte|shared|lm_head)(?:\.weight)?")
_NO_EMBEDDING = re.compile(r"pos|type|patch|relative|time|label")
_COUNTER = re.compile(
    r"(?:.*[._])?(?:num_batches_tracked|num_updates|n_averaged|num_steps|global_step|step|steps|"
    r"count|counter|iteration|iterations|epoch)"
)


def is_index(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer of indices, frequencies or a mask: it has no mean.

    Example:
        >>> is_index("text_model.embeddings.position_ids", (1, 77))
        True
        >>> is_index("rotary_emb.inv_freq", (32,)), is_index("vit.embeddings.mask_token", (1, 1, 8))
        (True, False)
    """
    if _CAUSAL.fullmatch(name):
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return _INDEX.fullmatch(name) is not None


def is_counter(name: str, shape: tuple[int, ...], integer: bool) -> bool:
    """Whether a tensor counts batches or updates: the models' numbers differ, the largest is kept.

    A single integer is a counter whatever its name; a single float only by its name.

    Example:
        >>> is_counter("layer1.bn.num_batches_tracked", (), True)
        True
        >>> is_counter("model_ema.num_updates", (1,), False), is_counter("logit_scale", (), False)
        (True, False)
    """
    single = all(length == 1 for length in shape)
    return single and (integer or _COUNTER.fullmatch(name) is not None)


def is_mask(name: str) -> bool:
    """Whether a tensor is a mask by its name; only its numbers tell it from a trained one.

    Example:
        >>> is_mask("text.attn_mask"), is_mask("embeddings.mask_token")
        (True, False)
    """
    return _MASK.fullmatch(name) is not None


def is_embedding(name: str) -> bool:
    """Whether a tensor has a row per token of a vocabulary, by its name.

    Example:
        >>> is_embedding("model.embed_tokens.weight"), is_embedding("position_embeddings.weight")
        (True, False)
    """
    return _EMBEDDING.fullmatch(name) is not None and not _NO_EMBEDDING.search(name)
