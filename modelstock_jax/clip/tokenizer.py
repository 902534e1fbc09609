"""A checkpoint's own tokenizer: texts to token ids."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.digests import digest_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Encodings of the library are large objects: not all texts of a long list at once.
_TEXTS_AT_ONCE = 8192


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
    tokenizer, pad = _open(path, _stamp(path), context_length if truncate else None)
    ids = np.full((len(texts), context_length), pad, np.int32)
    for i, row in enumerate(_encode(tokenizer, texts)):
        if len(row) > context_length:
            raise UserError(
                f"tokenize: {len(row)} tokens in {texts[i]!r}, the context length is "
                f"{context_length}; shorten the text or pass truncate=True."
            )
        ids[i, : len(row)] = row
    return ids


def tokenizer_digest(directory: str | os.PathLike[str]) -> str:
    """SHA-256 over the names and contents of a tokenizer's files.

    Args:
        directory: A checkpoint's.

    Returns:
        64 hexadecimal digits.
    """
    files = [Path(directory) / name for name in TOKENIZER_FILES]
    lines = [f"{file.name} {digest_file(file)}\n" for file in files if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _encode(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + _TEXTS_AT_ONCE])):
            yield encoding.ids


def _stamp(directory: Path) -> tuple[tuple[str, int], ...]:
    """What changes when a tokenizer's files do."""
    files = (directory / name for name in TOKENIZER_FILES)
    return tuple((file.name, file.stat().st_mtime_ns) for file in files if file.is_file())


@functools.lru_cache(maxsize=8)
def _open(
    directory: Path, stamp: tuple[tuple[str, int], ...], max_length: int | None
) -> tuple[Any, int]:
    """The fast tokenizer of a directory and its padding id; kept, for training calls it often."""
    if not {"tokenizer.json", "vocab.json"} & {name for name, _ in stamp}:
        raise UserError(
            f"{directory}: no tokenizer (tokenizer.json or vocab.json) there; copy those of the "
            "model's page on the Hugging Face hub beside its weights."
        )
    # Without PyTorch, which is not needed, transformers advises to install it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # Seconds: only where text is read.

    try:
        whole: Any = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        fast = whole.backend_tokenizer
    except Exception as error:  # The tokenizers library raises this very class.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{directory}: its tokenizer cannot be opened ({reason}).") from None
    fast.no_padding()
    fast.no_truncation()
    if max_length is not None:
        fast.enable_truncation(max_length)
    pad = whole.pad_token_id if whole.pad_token_id is not None else whole.eos_token_id
    return fast, int(pad or 0)
