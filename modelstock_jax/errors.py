"""Errors that a user can fix: one line, no traceback; and helpers for their messages."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable
from typing import Any

# Minimum similarity of two names with equal numbers of words: --device and --recipe have 0.5,
# --exlude and --exclude 0.92.
_MIN_SIMILARITY = 0.7
# Minimum similarity of names with different numbers of words: --dryrun and --dry-run have 1.
_MIN_SIMILARITY_JOINED = 0.85
# Minimum fraction of a name, other than an option, that an abbreviation must have: "ties" and
# "dare_ties" are different methods.
_MIN_FRACTION = 0.6
# Minimum number of characters of an abbreviated option.
_MIN_CHARACTERS = 3


class UserError(ValueError):
    """A mistake in the input. The message states the problem and how to fix it, in one line."""


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise an error if a value is not one of the choices.

    Args:
      name: name of the option
      value: its value
      choices: allowed values, in the order of the message

    Raises:
      UserError: `value` is not in `choices`

    Example:
      >>> check_choice("merge.unit", "tensor", ("tensor", "layer"))
      >>> check_choice("merge.unit", "tensors", ("tensor", "layer"))
      Traceback (most recent call last):
      ...
      modelstock_jax.errors.UserError: merge.unit='tensors': choose one of tensor, layer
    """
    if value not in choices:
        raise UserError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def listed(names: Iterable[str], max_items: int = 10) -> str:
    r"""Return the first names as one line, and the number of the others.

    A name with control characters, such as a line break, is shown with escapes.

    Args:
      names: names to list
      max_items: maximum number of names

    Example:
      >>> listed("abcd", max_items=2), listed(["a", "b\n"])
      ('a, b and 2 more', "a, 'b\\n'")
    """
    names = list(names)
    more = f" and {len(names) - max_items} more" if len(names) > max_items else ""
    return ", ".join(n if n.isprintable() else repr(n) for n in names[:max_items]) + more


def suggest(word: Any, known: Iterable[str]) -> str:
    """Return a hint " (did you mean ...?)" to append to a message, or an empty string.

    Two names are similar if all their words (between dots, dashes or underscores) are equal or
    differ in few letters, or if one name is part of the other.

    Args:
      word: the word that was typed
      known: the valid words

    Example:
      >>> suggest("--methd", ["--method", "--unit"]), suggest("--shard-size", ["--max-shard-size"])
      (" (did you mean '--method'?)", " (did you mean '--max-shard-size'?)")
      >>> suggest("--device", ["--recipe"]), suggest("layers.1.q.weight", ["layers.1.k.weight"])
      ('', '')
    """
    similar = most_similar(word, known)
    return f" (did you mean {similar!r}?)" if similar else ""


def most_similar(word: Any, known: Iterable[str]) -> str:
    """Return the most similar of the valid words, as `suggest` compares them; "" if there is none.

    Example:
      >>> most_similar("--dry_run", ["--workdir", "--dry-run"]), most_similar("--x", ["--dry-run"])
      ('--dry-run', '')
    """
    scores = [(_similarity(str(word), candidate), candidate) for candidate in known]
    score, best = max(scores, key=lambda score: score[0], default=(0.0, ""))
    return best if score else ""


def _similarity(word: str, known: str) -> float:
    """Return the similarity in [0, 1]; 1 if equal except for case, dashes and underscores."""
    are_options = word.startswith("-") and known.startswith("-")
    first, second = (re.sub(r"[-_]+", "_", text.lower().strip("-")) for text in (word, known))
    short, long = sorted((first, second), key=len)
    if are_options:
        long_enough = len(short) >= _MIN_CHARACTERS
    else:
        long_enough = len(short) >= _MIN_FRACTION * len(long)
    # A typed option may be cut anywhere (--check for --checksum); otherwise complete words count.
    end = "" if are_options and short == first else r"(?:$|[._])"
    if long_enough and re.search(rf"(?:^|[._]){re.escape(short)}{end}", long):
        return _MIN_SIMILARITY + (1 - _MIN_SIMILARITY) * len(short) / len(long)
    return _words_similarity(re.split("[._]", first), re.split("[._]", second))


def _words_similarity(first: list[str], second: list[str]) -> float:
    """Return the similarity of two names, given as lists of their words; 0 below the minimum."""
    if re.findall(r"\d+", " ".join(first)) != re.findall(r"\d+", " ".join(second)):
        return 0.0  # another layer
    if len(first) == len(second):
        pairs, minimum = list(zip(first, second, strict=True)), _MIN_SIMILARITY
    else:
        for _ in range(2):  # remove the common beginning, then the common end
            common = len(os.path.commonprefix([first, second]))
            first, second = first[common:][::-1], second[common:][::-1]
        pairs, minimum = [("".join(first), "".join(second))], _MIN_SIMILARITY_JOINED
    ratio = min(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
    return ratio if ratio >= minimum else 0.0
