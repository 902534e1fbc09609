"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modelstock_jax.errors import UserError
from modelstock_jax.tensor_files.disk import flush


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
