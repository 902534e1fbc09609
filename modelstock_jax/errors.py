"""Errors that a user can mend: one clear line, no traceback."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable
from typing import Any

_SIMILAR = 0.7  # --device and --recipe are 0.5, --exlude and --exclude 0.92.
_JOINED = 0.85  # Of names of different numbers of words: --dryrun and --dry-run are 1.
_PART = 0.6  # Of other names than options: "ties" of "dare_ties" is another method.
_LEAST = 3  # Characters of an option that say which one it is.


class UserError(ValueError):
    """A mistake in the input; the message names the thing and the way out."""


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuses a value that is none of the choices.

    Args:
      name: what the value is given for.
      value: what was given.
      choices: in the order in which the message names them.

    Raises:
      UserError: if it is none of them.

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
    r"""Names for such a line: the first of them, and how many more there are.

    A name that would break the line, or do more to a terminal, is shown with its escapes.

    Example:
      >>> listed("abcd", max_items=2), listed(["a", "b\n"])
      ('a, b and 2 more', "a, 'b\\n'")
    """
    names = list(names)
    more = f" and {len(names) - max_items} more" if len(names) > max_items else ""
    return ", ".join(n if n.isprintable() else repr(n) for n in names[:max_items]) + more


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
