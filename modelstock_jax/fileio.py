"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from modelstock_jax.errors import UserError

# Calls that some file systems do not support (vfat, CIFS, NFS, FUSE): without them a write counts.


_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_MODES = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def flush(descriptor: int, *, data_only: bool = False) -> None:
    """Flushes an open file to the disk, where its file system supports that.

    Args:
        descriptor: Of the file.
        data_only: Without its times and modes.

    Raises:
        OSError: The disk is full or broken.
    """
    try:
        (os.fdatasync if data_only else os.fsync)(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def flush_path(path: Path) -> None:
    """Flushes a file or a directory (its names) to the disk, where that is supported.

    Raises:
        OSError: The disk is full or broken, or a file cannot be opened.
    """
    directory = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        if directory:  # It may be written without being readable.
            return
        raise
    try:
        flush(descriptor)
    except OSError as error:
        if not (directory and error.errno == errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def set_mode(path: Path, mode: int) -> None:
    """Sets the permissions of a file or directory, where its file system has any.

    Raises:
        OSError: There is no such path, or the disk is read-only or broken.
    """
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in _MODES:
            raise


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Lets `write` fill a file beside `path`, then renames it over `path`.

    Args:
      path: the file to write; its directory is made.
      write: is given the path of the temporary file (same suffix as `path`).

    Returns:
      `path`.

    Raises:
      UserError: the directory cannot be written, or the disk is full.

    Example:
      >>> import tempfile
      >>> directory = tempfile.mkdtemp()
      >>> write_atomically(directory + "/a.txt", lambda p: p.write_text("whole")).read_text()
      'whole'
    """
    path = Path(path)
    writer = f"{os.getpid()}-{threading.get_ident()}"
    temporary = path.with_name(f".{path.stem}.{writer}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # Of a process that died and had the same number.
        temporary.touch(exist_ok=False)
        write(temporary)
        with temporary.open("rb+") as file:
            flush(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space there or choose "
            "another directory"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # Of the directory too, whose error is already told.
            temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Writes text (UTF-8) atomically; see `write_atomically`."""
    return write_atomically(path, lambda file: file.write_bytes(_utf8(text)))


def write_json(path: str | Path, value: Any) -> Path:
    """Writes JSON atomically, keys sorted, non-finite as null: equal values give equal bytes."""
    return write_text(path, json.dumps(plain(value), sort_keys=True, indent=1) + "\n")


def _utf8(text: str) -> bytes:
    """UTF-8, also of text with names of files that are not UTF-8 (or not in this locale)."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            raw = text.encode("utf-8", "surrogateescape")  # The bytes of the names.
            raw.decode()
            return raw
        return text.encode("utf-8", "backslashreplace")


def plain(value: Any) -> Any:
    """Turns NumPy or jax scalars and arrays into Python's own; NaN and infinities into None.

    Example:
      >>> import numpy as np
      >>> plain({"a": np.float32(0.5), "b": (1, float("nan"))})
      {'a': 0.5, 'b': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, of mappings in one another.

    Example:
      >>> flat({"a": 1, "b": {"c": (2, 3), "d": {}}})
      {'a': 1, 'b.c': (2, 3)}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


# A file of JSON lines that a run appends to, through kills and restarts.


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
