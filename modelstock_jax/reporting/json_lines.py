"""A file of JSON lines that a run appends to, through kills and restarts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from modelstock_jax.errors import UserError
from modelstock_jax.reporting.files import plain, write_text

Entry = dict[str, Any]


class JsonLines:
    """Appends objects to a file, one a line, keys sorted: equal entries give equal bytes.

    Args:
      path: the file; its directory is made.
      keep: which of the whole lines of an earlier life stay; None begins anew. A line torn by a
        crash never stays.

    Attributes:
      kept: the entries that stayed, in order.

    Raises:
      UserError: the file cannot be written.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/a.jsonl"
      >>> for keep in (None, lambda entry: entry["step"] < 2):
      ...     with JsonLines(path, keep) as lines:
      ...         lines.append({"step": 1})
      ...         lines.append({"step": 2})
      >>> [entry["step"] for entry in read_lines(path)]
      [1, 1, 2]
    """

    def __init__(self, path: str | Path, keep: Callable[[Entry], bool] | None = None):
        self._path = Path(path)
        self.kept: list[Entry] = []
        if keep is not None and self._path.exists():
            self.kept = [entry for entry in read_lines(self._path) if keep(entry)]
        write_text(self._path, "".join(map(_line, self.kept)))
        self._file: TextIO | None = self._path.open("a", encoding="utf-8")

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line; `flush` hands it on.

        Args:
          entry: numbers of Python, NumPy or jax; a non-finite one becomes null.

        Raises:
          UserError: the disk is full.
        """
        if self._file is not None:
            with self._errors():
                self._file.write(_line(plain(entry)))

    def flush(self) -> None:
        """Hands every line to the operating system.

        Raises:
          UserError: the disk is full.
        """
        if self._file is not None:
            with self._errors():
                self._file.flush()

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        file, self._file = self._file, None
        if file is not None:
            with self._errors():
                file.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; free some space and run the same "
                "command again to resume"
            ) from error

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: str | Path) -> list[Entry]:
    """The objects of a file of JSON lines, in order; a torn line is left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"
