"""What a misspelt word was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def near(word: Any, known: Iterable[str]) -> str:
    """A hint to put behind an error, or nothing.

    Example:
      >>> near("--methd", ["--method", "--unit"])
      " (did you mean '--method'?)"
      >>> near("xyz", ["--method"])
      ''
    """
    found = difflib.get_close_matches(str(word), list(known), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""
