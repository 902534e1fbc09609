"""Builds a small tokenizer of CLIP's kind from captions.

    python -m modelstock_jax.clip.build_tokenizer CAPTIONS.txt OUT [--context-length=26]

Training byte pairs is not deterministic across processes (ties between pairs), so a tokenizer is a
file that is kept, not a step of training.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.writer import new_directory, write_text

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
        # pyrefly: ignore [bad-argument-type]  # Pairs are taken too, and are what a file has.
        vocab=vocabulary, merges=merges, model_max_length=context_length, **names
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
