"""File operations that are safe under kills: atomic writes, locks, and appended JSON lines.

A file or directory is complete or absent. A file lock belongs to one process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from modelstock_jax.errors import UserError, listed

# Errors of calls that some file systems (vfat, CIFS, NFS, FUSE) do not support. They are ignored.
_FLUSH_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_CHMOD_UNSUPPORTED = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def flush(descriptor: int, *, data_only: bool = False) -> None:
    """Flush an open file to the disk, if its file system supports it.

    Args:
      descriptor: file descriptor
      data_only: flush only the data, without times and mode

    Raises:
      OSError: the disk is full or broken
    """
    try:
        (os.fdatasync if data_only else os.fsync)(descriptor)
    except OSError as error:
        if error.errno not in _FLUSH_UNSUPPORTED:
            raise


def flush_path(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk, if the file system supports it.

    Raises:
      OSError: the disk is full or broken, or a file cannot be opened
    """
    is_directory = os.path.isdir(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        if is_directory:  # it may be writable but not readable
            return
        raise
    try:
        flush(descriptor)
    except OSError as error:
        if not (is_directory and error.errno == errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file or directory, if its file system supports them.

    Raises:
      OSError: the path does not exist, or the disk is read-only or broken
    """
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in _CHMOD_UNSUPPORTED:
            raise


@contextlib.contextmanager
def os_errors_as_user_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert an OSError of the block to a UserError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def replace_atomically(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file to fill, and rename it to `path` after it is flushed to the disk.

    Args:
      path: final path, in an existing directory; an existing file is replaced
      temporary: path of the temporary file (default: a name for this thread, next to `path`, with
        the same suffix).

    Yields:
      The temporary file, empty and with the mode of a new file. It is removed if the block fails; a
      kill leaves it.

    Raises:
      OSError: a file cannot be written, flushed or renamed
    """
    if temporary is None:
        writer = f"{os.getpid()}-{threading.get_ident()}"
        temporary = path.with_name(f".{path.stem}.{writer}.tmp{path.suffix}")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process with the same process ID
        temporary.touch(exist_ok=False)
        yield temporary
        flush_path(temporary)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # e.g. of the directory, which was already reported
            temporary.unlink(missing_ok=True)


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Call `write` on a temporary file, then rename the file to `path`.

    Args:
      path: the file to write; its directory is created
      write: function that fills the temporary file; its argument is the path, which has the same
        suffix as `path`.

    Returns:
      `path`

    Raises:
      UserError: the directory cannot be written, or the disk is full

    Example:
      >>> directory = tempfile.mkdtemp()
      >>> write_atomically(directory + "/a.txt", lambda p: p.write_text("complete")).read_text()
      'complete'
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_atomically(path) as temporary:
            write(temporary)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free disk space or choose another "
            "directory"
        ) from error
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write text (UTF-8) atomically; see `write_atomically`."""
    return write_atomically(path, lambda file: file.write_bytes(_utf8(text)))


def write_json(path: str | Path, value: Any, *, sort_keys: bool = True) -> Path:
    """Write JSON atomically: keys sorted or in the order of `value`, non-finite values as null."""
    text = json.dumps(to_json_types(value), sort_keys=sort_keys, indent=1)
    return write_text(path, text + "\n")


def _utf8(text: str) -> bytes:
    """Encode as UTF-8, including text with file names that are not valid UTF-8 or in the locale."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            raw = text.encode("utf-8", "surrogateescape")  # restores the bytes of the file names
            raw.decode()
            return raw
        return text.encode("utf-8", "backslashreplace")


def to_json_types(value: Any) -> Any:
    """Convert NumPy or JAX scalars and arrays to Python values, NaN and infinity to None.

    Example:
      >>> import numpy as np
      >>> to_json_types({"a": np.float32(0.5), "b": (1, float("nan"))})
      {'a': 0.5, 'b': [1, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): to_json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_types(item) for item in value]
    if hasattr(value, "tolist"):
        return to_json_types(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to {dotted key: value}.

    Example:
      >>> flatten({"a": 1, "b": {"c": (2, 3), "d": {}}})
      {'a': 1, 'b.c': (2, 3)}
    """
    flattened: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flattened |= flatten(value, f"{prefix}{key}.")
        else:
            flattened[f"{prefix}{key}"] = value
    return flattened


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory to fill, and rename it to `path` after it is flushed to the disk.

    Args:
      path: final path; its parent directories are created
      overwrite: replace an existing directory; False raises an error if it contains files

    Yields:
      The temporary directory, next to `path`. It is removed if the body fails.

    Raises:
      UserError: `path` exists and `overwrite` is False, or it cannot be written

    Example:
      >>> root = Path(tempfile.mkdtemp())
      >>> with new_directory(root / "model") as directory:
      ...     _ = write_text(directory / "note.txt", "complete")
      ...     (root / "model").exists()
      False
      >>> (root / "model" / "note.txt").read_text()
      'complete'
    """
    path = Path(os.path.realpath(path))  # a symbolic link is kept and points to the new directory
    check_not_existing(path, overwrite=overwrite)
    with os_errors_as_user_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with os_errors_as_user_errors(path):
            yield staged
        move_into_place(staged, path, overwrite)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


# The part of a message that `modelstock` removes, because it is for callers in Python only.
PYTHON_HINT = " (in a program, overwrite=True)"


class ExistsError(UserError):
    """The path of a new directory exists already."""


def check_not_existing(path: Path, *, overwrite: bool = False) -> None:
    """Raise an error if `path` is a file, or a directory that contains files.

    Args:
      path: path of a new directory
      overwrite: allow a directory that contains files

    Raises:
      ExistsError: `path` is not available
    """
    shown = listed([os.fspath(path)])
    if os.path.isfile(path):
        raise ExistsError(f"{shown}: exists already, and is a file; choose a directory")
    if os.path.isdir(path) and any(path.iterdir()) and not overwrite:
        raise ExistsError(
            f"{shown}: exists already; choose another directory, or replace it with --overwrite"
            f"{PYTHON_HINT}"
        )


def move_into_place(staged: Path, path: Path, overwrite: bool = False) -> None:
    """Flush a complete directory to the disk, then rename it to `path`.

    Args:
      staged: a directory with the same parent as `path`
      path: final path
      overwrite: replace an existing directory; False raises an error if it contains files

    Raises:
      ExistsError: `path` exists, possibly created by another process in the meantime
      UserError: the directory cannot be flushed or renamed
    """
    with os_errors_as_user_errors(path):
        _set_modes_and_flush(staged)
        _move_into_place(staged, path, overwrite)


def _move_into_place(staged: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.replace(staged, path)  # replaces an empty directory, fails on any other
        except OSError:
            check_not_existing(path)  # another process created it during the flush
            raise
    elif path.exists():
        # A rename cannot replace a directory that contains files: rename the old directory first.
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.replace(path, old)
        try:
            os.replace(staged, path)
        except OSError:
            os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(staged, path)
    flush_path(path.parent)


def _set_modes_and_flush(directory: Path) -> None:
    """Set default modes for a directory and its files, and flush them to the disk."""
    # Create a file and a folder to find the default modes: reading the umask requires setting it,
    # for all threads. They are created elsewhere, because a kill would leave them in `directory`.
    with tempfile.TemporaryDirectory() as probe:
        file, folder = Path(probe, "file"), Path(probe, "folder")
        file.touch()
        folder.mkdir()
        file_mode, folder_mode = (stat.S_IMODE(path.stat().st_mode) for path in (file, folder))
    for path in sorted(directory.rglob("*")):
        set_mode(path, folder_mode if path.is_dir() else file_mode)
        flush_path(path)
    set_mode(directory, folder_mode)
    flush_path(directory)


class FileLock:
    """An exclusive lock on a file. The kernel frees it when its process ends, even by a kill.

    Args:
      path: path of the file. It is created, with its directory, and never removed.
      wait: wait until the lock is free; False sets `held` instead
      note: text to write into the file while the lock is held; nothing by default

    Attributes:
      held: whether this process has the lock. Also True if the file system does not support locks:
        every process then continues as if it were alone.
      unsupported: why the file system does not support locks (as with some network and FUSE file
        systems); empty if it does.
      holder: note of the other process that has the lock, if it can be read
      file: descriptor of the file, to read and append to while the lock is held

    Raises:
      OSError: the file cannot be created or written

    Example:
      >>> path = Path(tempfile.mkdtemp()) / "locks" / "a.lock"
      >>> with FileLock(path, note="process 7") as lock:
      ...     other = FileLock(path)
      ...     lock.held, other.held, other.holder
      (True, False, 'process 7')
    """

    def __init__(self, path: Path, *, wait: bool = False, note: str = ""):
        self.held, self.unsupported, self.holder = False, "", ""
        self.file = open_appending(path)
        try:
            self.held = self._lock(wait)
            if not self.held:
                with contextlib.suppress(OSError):  # a lock may prevent reading (CIFS)
                    self.holder = os.read(self.file, 300).decode(errors="replace")
            elif note:
                os.ftruncate(self.file, 0)
                os.write(self.file, note.encode())
        except BaseException:
            self.release()
            raise
        if not self.held:
            self.release()

    def release(self) -> None:
        """Free the lock; a second call does nothing."""
        file, self.file = self.file, -1
        if file != -1:
            os.close(file)

    def _lock(self, wait: bool) -> bool:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            self.unsupported = error.strerror or str(error)
        return True

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def open_appending(path: str | Path) -> int:
    """Open a file to read and append to; create it and its directory if missing.

    Returns:
      the descriptor

    Raises:
      OSError: the file cannot be written
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)


def append_line(file: int, line: str) -> None:
    """Append a line. If a kill or a full disk left an incomplete line, start a new line first.

    Args:
      file: descriptor of `open_appending`
      line: text without a line break. It is passed to the operating system before this returns.

    Raises:
      OSError: the disk is full or broken; a part of the line may remain
    """
    size = os.fstat(file).st_size
    incomplete = size > 0 and os.pread(file, 1, size - 1) != b"\n"
    remaining = b"\n" * incomplete + line.encode() + b"\n"
    while remaining:
        remaining = remaining[os.write(file, remaining) :]


Entry = dict[str, Any]


class JsonLines:
    """A file of JSON objects, one per line, that a run appends to across kills and restarts.

    Keys are sorted, so the output is deterministic.

    Args:
      path: the file; its directory is created
      keep: function that selects which entries of an earlier process are preserved; None preserves
        none. Incomplete lines are never preserved.

    Attributes:
      kept: the preserved entries, in order

    Raises:
      UserError: the file cannot be written

    Example:
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
        self.preserved: list[Entry] = []
        if keep is not None and self._path.exists():
            self.preserved = [entry for entry in read_lines(self._path) if keep(entry)]
        write_text(self._path, "".join(map(_line, self.preserved)))
        self._file: TextIO | None = self._path.open("a", encoding="utf-8")

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a line; it is buffered until `flush`.

        Args:
          entry: values of Python, NumPy or JAX; a non-finite value becomes null

        Raises:
          UserError: the disk is full
        """
        if self._file is not None:
            with self._errors():
                self._file.write(_line(to_json_types(entry)))

    def flush(self) -> None:
        """Pass all buffered lines to the operating system.

        Raises:
          UserError: the disk is full
        """
        if self._file is not None:
            with self._errors():
                self._file.flush()

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
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
                f"cannot write {self._path}: {error.strerror}; free disk space and run the same "
                "command again to resume"
            ) from error

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: str | Path) -> list[Entry]:
    """Return the objects of a file of JSON lines, in order; incomplete lines are left out."""
    entries = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"
