"""Calls that some file systems do not support (vfat, CIFS, NFS, FUSE): without them a write counts.

What they cannot do is no error; a disk that is full or broken is.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

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
