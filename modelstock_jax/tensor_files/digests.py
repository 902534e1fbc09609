"""Digests of tensors and files: what was read is what was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def digest_tensors(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, whatever the order and the files they lie in.

    Args:
        tensors: Name -> array.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> a, b = np.zeros(2, np.float32), np.ones((1, 2), np.float32)
        >>> digest_tensors({"a": a, "b": b}) == digest_tensors({"b": b, "a": a})
        True
        >>> digest_tensors({"a": a, "b": b}) == digest_tensors({"a": a, "b": b.T})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.asarray(tensors[name], order="C")
        head = f"{name}\0{array.dtype.name}\0{','.join(map(str, array.shape))}\0"
        digest.update(head.encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as ``sha256sum`` prints it.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.
    """
    with open(Path(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
