"""Tokenize texts with a checkpoint's tokenizer; train a small tokenizer on captions."""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    "spiece.model",
    "tokenizer.model",
)
# Every tokenizer has one of these: byte-pair files, or the sentencepiece model of SigLIP or Gemma.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
# Encodings are large objects: tokenize a long list in parts.
_TEXTS_AT_ONCE = 8192
# Texts -> token ids of each text, without padding.
_Encoder = Callable[[list[str]], Iterable[list[int]]]


def tokenize(
    directory: str | os.PathLike[str],
    texts: Sequence[str],
    context_length: int,
    *,
    truncate: bool = False,
    lower_case: bool = False,
) -> np.ndarray:
    """Return token ids of texts: start token, pieces, end token, padding.

    The start and end tokens are those of the tokenizer (SigLIP has no start token). Padding is on
    the right, up to `context_length`, with the tokenizer's padding token.

    Args:
      directory: checkpoint directory with tokenizer files
      texts: M texts
      context_length: L, at most the number of position embeddings
      truncate: truncate longer texts, keeping the end token; otherwise they are an error
      lower_case: lower-case the texts first. Pass True for SigLIP 2: it was trained on lower-case
        texts, but the GemmaTokenizer that its checkpoints name keeps capitals. The tokenizers of
        CLIP and SigLIP 1 lower-case without it.

    Returns:
      [M, L], int32

    Raises:
      UserError: no tokenizer, or a text of more than L tokens

    Example:
      >>> from modelstock_jax.data import glyphs
      >>> tokenize(Path(glyphs.__file__).parent / "clip", ["a", "a a"], 5).tolist()
      [[0, 109, 1, 1, 1], [0, 109, 109, 1, 1]]
    """
    path = Path(directory).resolve()
    encode, pad = _open(path, _stamp(path), context_length if truncate else None, lower_case)
    ids = np.full((len(texts), context_length), pad, np.int32)
    for i, row in enumerate(_encode(encode, texts)):
        if len(row) > context_length:
            raise UserError(
                f"tokenize: {texts[i]!r} has {len(row)} tokens, the context length is "
                f"{context_length}; shorten the text or pass truncate=True"
            )
        ids[i, : len(row)] = row
    return ids


def tokenizer_checksum(directory: str | os.PathLike[str]) -> str:
    """Compute SHA-256 over names and contents of the tokenizer files.

    Args:
      directory: checkpoint directory

    Returns:
      64 hexadecimal digits
    """
    files = [Path(directory) / name for name in TOKENIZER_FILES]
    lines = [f"{file.name} {checksum_file(file)}\n" for file in files if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _encode(encode: _Encoder, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        yield from encode(list(texts[start : start + _TEXTS_AT_ONCE]))


def _stamp(directory: Path) -> tuple[tuple[str, int], ...]:
    """Return names and modification times of the tokenizer files: a cache key."""
    files = (directory / name for name in TOKENIZER_FILES)
    return tuple((file.name, file.stat().st_mtime_ns) for file in files if file.is_file())


@functools.lru_cache(maxsize=8)
def _open(
    directory: Path, stamp: tuple[tuple[str, int], ...], max_length: int | None, lower_case: bool
) -> tuple[_Encoder, int]:
    """Return encoder and padding id of a tokenizer; cached because training calls it often."""
    names = [name for name, _ in stamp]
    if not set(VOCABULARY_FILES) & set(names):
        raise UserError(
            f"{directory}: no tokenizer found (none of {', '.join(VOCABULARY_FILES)}); copy the "
            "tokenizer's files from the model's page on the Hugging Face hub"
        )
    try:
        tokenizer = _from_pretrained(directory)
    except Exception as error:  # The tokenizers library raises plain Exception.
        reason = _reason(directory, names, error)
        raise UserError(f"{directory}: its tokenizer cannot be opened ({reason})") from None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # With the files of another class, transformers opens a vocabulary of special tokens only, or
    # adds the special tokens to the vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_tokens) or (
        not tokenizer.is_fast and int(pad or 0) >= tokenizer.vocab_size
    ):
        raise UserError(
            f"{directory}: its tokenizer cannot be opened ({type(tokenizer).__name__} does not "
            f"fit {', '.join(names)}; copy tokenizer_config.json from the same model)"
        )
    encoder = _fast_encoder if tokenizer.is_fast else _slow_encoder
    return encoder(tokenizer, max_length, lower_case), int(pad or 0)


def _from_pretrained(directory: Path) -> Any:
    # transformers advises to install PyTorch, which is not needed.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # Takes seconds: import only if text is read.
    from transformers.utils import logging

    # It reads config.json too, and warns about start and end ids that SigLIP does not use.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    finally:
        logging.set_verbosity(verbosity)


def _reason(directory: Path, names: Sequence[str], error: Exception) -> str:
    """Say in one line why the tokenizer cannot be opened."""
    text = str(error).strip()
    models = [name for name in names if name.endswith(".model")]
    if importlib.util.find_spec("sentencepiece") is None:
        if models or "sentencepiece" in text.lower():
            return "it needs the sentencepiece library; pip install sentencepiece"
    elif models or "model_file" in text:  # Sentencepiece's words if there is no spiece.model.
        from sentencepiece import SentencePieceProcessor

        for name in models:
            try:
                SentencePieceProcessor(model_file=str(directory / name))
            except Exception:  # RuntimeError or OSError, with lines of its C++ source.
                return f"{name} is not a sentencepiece model; copy it again"
        for name in ("tokenizer_config.json", models[0] if models else "spiece.model"):
            if name not in names:
                return f"{name} is missing; copy it from the model's page on the Hugging Face hub"
    return next(iter(text.splitlines()), type(error).__name__)


def _fast_encoder(tokenizer: Any, max_length: int | None, lower_case: bool) -> _Encoder:
    """Return the encoder of a tokenizer of the tokenizers library."""
    from tokenizers import normalizers

    fast = tokenizer.backend_tokenizer
    fast.no_padding()
    fast.no_truncation()
    if max_length is not None:
        fast.enable_truncation(max_length)
    if lower_case:  # As Siglip2Tokenizer does: special tokens in a text are found first.
        steps = (normalizers.Lowercase(), fast.normalizer)
        fast.normalizer = normalizers.Sequence([step for step in steps if step is not None])
    return lambda texts: (encoding.ids for encoding in fast.encode_batch_fast(texts))


def _slow_encoder(tokenizer: Any, max_length: int | None, lower_case: bool) -> _Encoder:
    """Return the encoder of a tokenizer in Python, such as SigLIP 1's on sentencepiece."""

    def encode(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(
            [text.lower() for text in texts] if lower_case else texts,
            truncation=max_length is not None,
            max_length=max_length,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"]

    return encode


BOS, EOS, UNKNOWN = "<|startoftext|>", "<|endoftext|>", "<|unknown|>"
# The end token is neither id 2, which means 'the highest id' in a config, nor the highest id.
SPECIAL = (BOS, EOS, UNKNOWN)
# Printable ASCII after lower-casing; its byte-level pieces are the characters themselves.
ALPHABET = tuple(chr(c) for c in range(33, 127) if not chr(c).isupper())
_END = "</w>"


def build(
    captions: Iterable[str], directory: str | os.PathLike[str], context_length: int = 26
) -> int:
    """Train a byte-pair tokenizer of CLIP's kind on captions and save it.

    Every word that occurs twice becomes one token. Texts are lower-cased and split as in CLIP;
    characters outside of ASCII become `<|unknown|>`.

    Args:
      captions: texts with all words that need a token
      directory: directory to create, with tokenizer.json, tokenizer_config.json (for
        transformers' AutoTokenizer), vocab.json and merges.txt
      context_length: maximum number of tokens of a text, start and end token included

    Returns:
      The vocabulary size

    Raises:
      UserError: no captions, or the directory exists or cannot be written
    """
    from tokenizers import trainers
    from transformers import CLIPTokenizer

    captions = list(captions)
    if not captions:
        raise UserError("build_tokenizer: no captions")
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
    # The vocabulary has every character, inside and at the end of a word, even unseen ones.
    tokens = [*SPECIAL, *ALPHABET, *(c + _END for c in ALPHABET)]
    known = set(tokens)
    merges = [pair for pair in merges if _keep(pair, known)]
    tokens += dict.fromkeys("".join(pair) for pair in merges if "".join(pair) not in set(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        # pyrefly: ignore [bad-argument-type]  # Pairs are accepted too; files contain pairs.
        merges=merges,
        model_max_length=context_length,
        **names,
    )
    with new_directory(directory) as staging_dir:
        tokenizer.save_pretrained(staging_dir)
        write_text(staging_dir / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        write_text(staging_dir / "merges.txt", "\n".join(lines) + "\n")
    return len(vocabulary)


def _keep(pair: tuple[str, ...], known: set[str]) -> bool:
    """Whether both halves are in `known`; if so, add the joined token to it."""
    if not known.issuperset(pair):
        return False
    known.add("".join(pair))
    return True


def main() -> None:
    """Read captions, one per line, and write a tokenizer."""
    parser = argparse.ArgumentParser(description="Build a small tokenizer of CLIP's kind.")
    parser.add_argument("captions", type=Path, help="text file with one caption per line")
    parser.add_argument("directory", type=Path, help="directory to create")
    parser.add_argument("--context-length", type=int, default=26)
    options = parser.parse_args()
    try:
        lines = options.captions.read_text(encoding="utf-8").splitlines()
        size = build(filter(None, lines), options.directory, options.context_length)
    except OSError as error:
        raise SystemExit(f"{options.captions}: cannot be read ({error.strerror})") from None
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(f"{options.directory}: {size} tokens")


if __name__ == "__main__":
    main()
