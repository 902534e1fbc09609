"""Arrays that are slow to find out and are kept in the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

WORTH_KEEPING = 20_000  # entries; fewer are found again in about a second


def read(kind: str, place: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays kept for a place, by name; empty if there are none or the file is damaged.

    They lie in $XDG_CACHE_HOME, else ~/.cache: nothing is ever written beside a user's data.

    Args:
      kind: what the arrays are.
      place: the directory that they are about.
    """
    try:
        with _file(kind, place).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return {}


def keep(kind: str, place: str | os.PathLike[str], **arrays: Any) -> None:
    """Keeps arrays for a place; a cache directory that cannot be written is no error."""
    path, temporary = _file(kind, place), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, **arrays)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def cache_directory() -> Path:
    """The user's cache directory of this package; it may not exist yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "modelstock_jax"


def _file(kind: str, place: str | os.PathLike[str]) -> Path:
    digest = hashlib.sha256(os.fsencode(Path(place).resolve())).hexdigest()[:32]
    return cache_directory() / kind / f"{digest}.npz"
