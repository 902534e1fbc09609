"""What a misspelt word was probably meant to be, and what options of other tools are here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import Any

_SIMILAR = 0.7  # --device and --recipe are 0.5, --exlude and --exclude 0.92.
_JOINED = 0.85  # Of names of different numbers of words: --dryrun and --dry-run are 1.
_PART = 0.6  # Of other names than options: "ties" of "dare_ties" is another method.
_LEAST = 3  # Characters of an option that say which one it is.

# Options of mergekit, PyTorch and transformers -> the option here, or what to do.
_NEEDLESS = {
    "no accelerator is needed or used; leave it out": (
        "device", "devices", "cuda", "gpu", "gpus", "gpu-rich", "multi-gpu", "device-map", "cpu",
        "read-to-gpu"),
    "code of a checkpoint is never run; leave it out": ("trust-remote-code",),
    "tensors are always read in pieces; leave it out": (
        "lazy-unpickle", "lazy-loader", "low-cpu-memory", "low-cpu-mem-usage", "low-memory"),
    "tokenizer files are always copied; leave it out": ("copy-tokenizer",),
    "a model card is always written; leave it out": ("write-model-card",),
    "safetensors are always written; leave it out": ("safe-serialization",),
    "models that do not fit each other are an error; leave it out": ("allow-crimes",),
    "adapters are applied while they are read; leave it out": (
        "lora-merge-cache", "lora-merge-dtype"),
    "models of the hub are in Hugging Face's cache; set HF_HOME to move it": (
        "transformers-cache", "cache-dir"),
    "BASE is the first model given; give it before the others": ("base-model", "base"),
    "give the models one after the other: BASE FT1 FT2": ("models", "model", "finetuned"),
    "nothing is random in a merge; leave it out": ("random-seed", "seed"),
}  # fmt: skip
_RENAMED = {
    "--out": ("output", "o", "output-dir", "output-path", "out-path", "out-dir", "outdir",
              "save-path", "save-dir"),
    "--max-shard-size": ("out-shard-size", "shard-size"),
    "--threads": ("num-threads", "workers", "num-workers", "jobs", "j"),
    "--weights": ("weight",),
    "--scale": ("lambda", "lambd", "scaling"),
    "--method": ("merge-method",),
    "--recipe": ("yaml",),
}  # fmt: skip


def near(word: Any, known: Iterable[str]) -> str:
    """A hint to put behind an error, or nothing.

    Names are near each other if all their words (between dots, dashes or underscores) are equal or
    differ in few letters, or if one name is a part of the other.

    Args:
      word: what was typed.
      known: the words that would have been right.

    Example:
      >>> near("--methd", ["--method", "--unit"]), near("--shard-size", ["--max-shard-size"])
      (" (did you mean '--method'?)", " (did you mean '--max-shard-size'?)")
      >>> near("--device", ["--recipe"]), near("layers.1.q.weight", ["layers.1.k.weight"])
      ('', '')
    """
    scores = [(_likeness(str(word), one), one) for one in known]
    best, found = max(scores, key=lambda score: score[0], default=(0.0, ""))
    return f" (did you mean {found!r}?)" if best else ""


def elsewhere(option: str, known: Iterable[str]) -> str | None:
    """What to do about an option of another tool; None for one that is not listed.

    Args:
      option: as it was typed, with its dashes.
      known: the options of this command.

    Example:
      >>> elsewhere("--device", []), elsewhere("--output", ["--out"])
      ('no accelerator is needed or used; leave it out', 'write --out')
    """
    word = option.strip("-").replace("_", "-").lower().removeprefix("no-")
    for advice, words in _NEEDLESS.items():
        if word in words:
            return advice
    known = set(known)
    return next((f"write {ours}" for ours, words in _RENAMED.items()
                 if word in words and ours in known), None)


def _likeness(word: str, known: str) -> float:
    """From 0, unrelated, to 1, equal but for upper case, dashes and underscores."""
    options = word.startswith("-") and known.startswith("-")
    one, two = (re.sub(r"[-_]+", "_", text.lower().strip("-")) for text in (word, known))
    short, long = sorted((one, two), key=len)
    enough = len(short) >= _LEAST if options else len(short) >= _PART * len(long)
    # An option may be cut anywhere (--check for --checksum); what is known is a part as it is.
    end = "" if options and short == one else r"(?:$|[._])"
    if enough and re.search(rf"(?:^|[._]){re.escape(short)}{end}", long):
        return _SIMILAR + (1 - _SIMILAR) * len(short) / len(long)
    return _ratio(re.split("[._]", one), re.split("[._]", two))


def _ratio(one: list[str], two: list[str]) -> float:
    """Likeness of two names, given as the words between their separators."""
    if re.findall(r"\d+", " ".join(one)) != re.findall(r"\d+", " ".join(two)):
        return 0.0  # Another layer.
    if len(one) == len(two):
        pairs, least = list(zip(one, two, strict=True)), _SIMILAR
    else:
        for _ in range(2):  # Without what they begin with in common, and then end with.
            same = len(os.path.commonprefix([one, two]))
            one, two = one[same:][::-1], two[same:][::-1]
        pairs, least = [("".join(one), "".join(two))], _JOINED
    ratio = min(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
    return ratio if ratio >= least else 0.0
