"""Tokenizers: texts to token ids by a checkpoint's own; building a small one from captions."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import new_directory
from modelstock_jax.tensor_files.checksums import checksum_file
from modelstock_jax.tensor_files.writer import write_text

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


def tokenizer_checksum(directory: str | os.PathLike[str]) -> str:
    """SHA-256 over the names and contents of a tokenizer's files.

    Args:
        directory: A checkpoint's.

    Returns:
        64 hexadecimal digits.
    """
    files = [Path(directory) / name for name in TOKENIZER_FILES]
    lines = [f"{file.name} {checksum_file(file)}\n" for file in files if file.is_file()]
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


# Builds a small tokenizer of CLIP's kind from captions.


BOS, EOS, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
# The end of text is neither id 2, which a config takes for 'the highest id', nor the highest id.
SPECIAL = (BOS, EOS, UNKNOWN)
# What is left of printable ASCII after lower-casing; byte-level pieces of it are the characters.
ALPHABET = tuple(chr(c) for c in range(33, 127) if not chr(c).isupper())
_END = "</w>"


def build(
    captions: Iterable[str], directory: str | os.PathLike[str], context_length: int = 26
) -> int:
    """Trains byte pairs until every word that occurs twice is one token, and saves the tokenizer.

    It lower-cases and splits as CLIP's does; a character outside of ASCII is `<|unknown|>`.

    Args:
        captions: Texts that hold every word worth a token.
        directory: Where to write tokenizer.json and tokenizer_config.json, which transformers'
            AutoTokenizer opens, and vocab.json and merges.txt.
        context_length: Tokens a text is cut to, the two marks included.

    Returns:
        The size of the vocabulary.

    Raises:
        UserError: No captions, or a directory that exists or cannot be written.
    """
    from tokenizers import trainers
    from transformers import CLIPTokenizer

    captions = list(captions)
    if not captions:
        raise UserError("build_tokenizer: no captions.")
    names = {"unk_token": UNKNOWN, "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    pieces = CLIPTokenizer(vocab={t: i for i, t in enumerate(SPECIAL)}, **names).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2**15,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=list(ALPHABET),
        end_of_word_suffix=_END,
        show_progress=False,
    )
    pieces.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(pieces.to_str())["model"]["merges"]]
    # Every character stands in the vocabulary, inside and at the end of a word, seen or not.
    tokens = [*SPECIAL, *ALPHABET, *(c + _END for c in ALPHABET)]
    known = set(tokens)
    merges = [pair for pair in merges if _keep(pair, known)]
    tokens += dict.fromkeys("".join(pair) for pair in merges if "".join(pair) not in set(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        # pyrefly: ignore [bad-argument-type]  # Pairs are accepted too, and are what a file has.
        merges=merges,
        model_max_length=context_length,
        **names,
    )
    with new_directory(directory) as beside:
        tokenizer.save_pretrained(beside)
        write_text(beside / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        write_text(beside / "merges.txt", "\n".join(lines) + "\n")
    return len(vocabulary)


def _keep(pair: tuple[str, ...], known: set[str]) -> bool:
    """Whether both halves are known by now; what they make is known from here on."""
    if not known.issuperset(pair):
        return False
    known.add("".join(pair))
    return True


def main() -> None:
    """Reads captions, one a line, and writes the tokenizer."""
    parser = argparse.ArgumentParser(description="Build a small tokenizer of CLIP's kind.")
    parser.add_argument("captions", type=Path, help="a text file, one caption a line")
    parser.add_argument("directory", type=Path, help="where to write the tokenizer's files")
    parser.add_argument("--context-length", type=int, default=26)
    options = parser.parse_args()
    try:
        lines = options.captions.read_text(encoding="utf-8").splitlines()
        size = build(filter(None, lines), options.directory, options.context_length)
    except OSError as error:
        raise SystemExit(f"{options.captions}: cannot be read ({error.strerror}).") from None
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(f"{options.directory}: {size} tokens")


if __name__ == "__main__":
    main()
