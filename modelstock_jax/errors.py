"""Errors that a user can mend: one clear line, no traceback."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input; the message names the thing and the way out."""


def listed(names: Iterable[str], most: int = 10) -> str:
    r"""Names for such a line: the first of them, and how many more there are.

    A name that would break the line, or do more to a terminal, is shown with its escapes.

    Example:
      >>> listed("abcd", most=2), listed(["a", "b\n"])
      ('a, b and 2 more', "a, 'b\\n'")
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(n if n.isprintable() else repr(n) for n in names[:most]) + more
