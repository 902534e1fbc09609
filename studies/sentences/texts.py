"""Snippets of text with human ratings from four domains: movie and product reviews, news, tweets.

They are the data of Hutto and Gilbert, VADER (ICWSM 2014). A snippet is positive or negative by its
mean rating from -4 to 4. Ratings between -0.5 and 0.5 are left out.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

LENGTH = 32  # Longer snippets are cut off, as in training.
PADDING = 0  # Id of BERT's padding token.
MIN_RATING = 0.5
# Name of a domain -> prefix of its file in the archive.
DOMAINS = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
# Domain -> sizes of its test, validation and training set if it is the in-distribution domain.
SIZES = {"movie": (2000, 1000, 2048), "tweets": (1000, 500, 1920)}
SHIFT_SIZE = 1000


@dataclass(frozen=True)
class Texts:
    """Tokenized texts with binary labels.

    Attributes:
      name: of the set.
      tokens: ids, [n, LENGTH] int32, padded with `PADDING`.
      labels: 1 is positive, [n] int32.
    """

    name: str
    tokens: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SentenceBenchmark:
    """The sets of one in-distribution domain; the other domains are its shifts.

    Attributes:
      name: of the in-distribution domain.
      train: to fine-tune on.
      validation: of the same domain.
      test: of the same domain.
      shifts: name of each other domain -> its test set.
    """

    name: str
    train: Texts
    validation: Texts
    test: Texts
    shifts: dict[str, Texts]


def read_domains(archive: Path) -> dict[str, list[tuple[str, int]]]:
    """Return the snippets of every domain with their labels, in the order of their SHA-256.

    This order is random but the same everywhere. A snippet that occurs twice is used once, so that
    no training text is a test text.

    Args:
      archive: source archive of the package `vaderSentiment`.

    Returns:
      Name of a domain -> (text, label) of each snippet with a clear rating.
    """
    with tarfile.open(archive) as package:
        (inner,) = (m for m in package.getnames() if m.endswith("hutto_ICWSM_2014.tar.gz"))
        contents = _read(package, inner)
    with tarfile.open(fileobj=io.BytesIO(contents)) as data:
        paths = {Path(path).name: path for path in data.getnames()}
        return {
            name: _snippets(_read(data, paths[f"{prefix}_GroundTruth.txt"]).decode())
            for name, prefix in DOMAINS.items()
        }


def _read(archive: tarfile.TarFile, path: str) -> bytes:
    file = archive.extractfile(path)
    assert file is not None, f"{path} is not a file"
    return file.read()


def _snippets(lines: str) -> list[tuple[str, int]]:
    labels: dict[str, int] = {}
    for line in lines.split("\n"):
        if line.strip():
            _, rating, text = line.rstrip("\r").split("\t", 2)
            if abs(float(rating)) >= MIN_RATING:
                labels.setdefault(text, int(float(rating) > 0))
    return sorted(labels.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Return token ids, [n, LENGTH] int32."""
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=PADDING)
    encodings = tokenizer.encode_batch(list(texts))
    return np.array([encoding.ids for encoding in encodings], np.int32)


def open_benchmark(name: str, domains: dict, tokenizer: Tokenizer) -> SentenceBenchmark:
    """Return the benchmark with domain `name` in distribution.

    Args:
      name: a key of `SIZES`.
      domains: result of `read_domains`.
      tokenizer: of the encoder.
    """

    def part(domain: str, set_name: str, start: int, size: int) -> Texts:
        chosen = domains[domain][start : start + size]
        assert len(chosen) == size, f"{domain} has only {len(domains[domain])} texts"
        texts, labels = zip(*chosen, strict=True)
        return Texts(set_name, tokenize(tokenizer, texts), np.array(labels, np.int32))

    test, validation, train = SIZES[name]
    return SentenceBenchmark(
        name,
        part(name, f"{name}_train", test + validation, train),
        part(name, f"{name}_validation", test, validation),
        part(name, name, 0, test),
        {other: part(other, other, 0, SHIFT_SIZE) for other in DOMAINS if other != name},
    )
