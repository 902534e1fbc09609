"""Files that outlive a kill: whole or absent, locked by one process, appended to line by line."""

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

# Calls that some file systems do not support (vfat, CIFS, NFS, FUSE): without them a write counts.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_MODES = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def flush(descriptor: int, *, data_only: bool = False) -> None:
    """Flush an open file to the disk, where its file system supports that.

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
    """Flush a file or a directory (its names) to the disk, where that is supported.

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
    """Set the permissions of a file or directory, where its file system has any.

    Raises:
        OSError: There is no such path, or the disk is read-only or broken.
    """
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in _MODES:
            raise


@contextlib.contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from None


@contextlib.contextmanager
def replacing(path: Path, staging_dir: Path | None = None) -> Iterator[Path]:
    """Give a file to fill, which takes the name `path` only when all of it is on the disk.

    Args:
      path: the final name, in an existing directory; an existing file is replaced.
      staging_dir: the temporary file; by default one of this thread, of the same suffix as `path`.

    Yields:
      The temporary file, empty and with the mode of any new file. It is removed where the block
      fails; a kill leaves it.

    Raises:
      OSError: a file cannot be written, flushed or renamed.
    """
    if staging_dir is None:
        writer = f"{os.getpid()}-{threading.get_ident()}"
        staging_dir = path.with_name(f".{path.stem}.{writer}.tmp{path.suffix}")
    try:
        staging_dir.unlink(missing_ok=True)  # Of a process that died and had the same number.
        staging_dir.touch(exist_ok=False)
        yield staging_dir
        flush_path(staging_dir)
        os.replace(staging_dir, path)
    finally:
        with contextlib.suppress(OSError):  # Of the directory too, whose error is already told.
            staging_dir.unlink(missing_ok=True)


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a file beside `path`, then rename it over `path`.

    Args:
      path: the file to write; its directory is made.
      write: is given the path of the temporary file (same suffix as `path`).

    Returns:
      `path`.

    Raises:
      UserError: the directory cannot be written, or the disk is full.

    Example:
      >>> directory = tempfile.mkdtemp()
      >>> write_atomically(directory + "/a.txt", lambda p: p.write_text("whole")).read_text()
      'whole'
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            write(beside)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space there or choose "
            "another directory"
        ) from error
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write text (UTF-8) atomically; see `write_atomically`."""
    return write_atomically(path, lambda file: file.write_bytes(_utf8(text)))


def write_json(path: str | Path, value: Any) -> Path:
    """Write JSON atomically, keys sorted, non-finite as null: equal values give equal bytes."""
    return write_text(path, json.dumps(plain(value), sort_keys=True, indent=1) + "\n")


def _utf8(text: str) -> bytes:
    """Encode as UTF-8, also text with names of files that are not UTF-8 (or not in this locale)."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        with contextlib.suppress(UnicodeError):
            raw = text.encode("utf-8", "surrogateescape")  # The bytes of the names.
            raw.decode()
            return raw
        return text.encode("utf-8", "backslashreplace")


def plain(value: Any) -> Any:
    """Turn NumPy or jax scalars and arrays into Python's own; NaN and infinities into None.

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
    """Return dotted key -> value, of mappings in one another.

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


# A directory that is there whole or not at all.


@contextlib.contextmanager
def new_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Make a directory to fill, which takes the name `path` only when all of it is on the disk.

    Args:
        path: The final name. Its parents are made.
        overwrite: Replace an existing directory; without it, one that holds files is an error.

    Yields:
        The directory beside it, to write into. It is removed where the body fails.

    Raises:
        UserError: `path` exists and `overwrite` is false, or it cannot be written.

    Example:
        >>> root = Path(tempfile.mkdtemp())
        >>> with new_directory(root / "model") as directory:
        ...     _ = write_text(directory / "note.txt", "whole")
        ...     (root / "model").exists()
        False
        >>> (root / "model" / "note.txt").read_text()
        'whole'
    """
    path = Path(os.path.realpath(path))  # A link stays, and leads to the new directory.
    refuse_existing(path, overwrite=overwrite)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with explained(path):
            yield beside
        move_into_place(beside, path, overwrite)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class ExistsError(UserError):
    """The place of a new directory is occupied."""


def refuse_existing(path: Path, *, overwrite: bool = False) -> None:
    """Raise ExistsError where `path` is a file, or a directory with files and not `overwrite`."""
    shown = listed([os.fspath(path)])
    if os.path.isfile(path):
        raise ExistsError(f"{shown}: exists already, and is a file; choose a directory.")
    if os.path.isdir(path) and any(path.iterdir()) and not overwrite:
        raise ExistsError(
            f"{shown}: exists already; choose another directory, or replace it with --overwrite "
            "(in a program, overwrite=True)."
        )


def move_into_place(staged: Path, path: Path, overwrite: bool = False) -> None:
    """Flush a finished directory to the disk, then give it the name `path`.

    Args:
        staged: A directory with the same parent as `path`.
        path: The final name.
        overwrite: Replace a directory of that name; without it, one that holds files is an error.

    Raises:
        ExistsError: `path` exists, perhaps since a moment ago.
        UserError: It cannot be flushed or renamed.
    """
    with explained(path):
        _settle(staged)
        _move_into_place(staged, path, overwrite)


def _move_into_place(staged: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.replace(staged, path)  # An empty directory is replaced, another is an error.
        except OSError:
            refuse_existing(path)  # Another process made it while this one flushed.
            raise
    elif path.exists():
        # A directory cannot be renamed over one that holds files: the old one steps aside first.
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.replace(path, aside)
        try:
            os.replace(staged, path)
        except OSError:
            os.replace(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(staged, path)
    flush_path(path.parent)


def _settle(directory: Path) -> None:
    """Flush a directory; give it and its files the modes that plain writing would have given."""
    # Asked of the file system: to read the umask is to set it, for all threads. Elsewhere: a kill
    # would leave in the directory what was asked with.
    with tempfile.TemporaryDirectory() as asked:
        file, folder = Path(asked, "file"), Path(asked, "folder")
        file.touch()
        folder.mkdir()
        of_file, of_folder = (stat.S_IMODE(place.stat().st_mode) for place in (file, folder))
    for place in sorted(directory.rglob("*")):
        set_mode(place, of_folder if place.is_dir() else of_file)
        flush_path(place)
    set_mode(directory, of_folder)
    flush_path(directory)


# A file that one process has at a time.


class FileLock:
    """An exclusive lock on a file, which the kernel frees when its process ends, whatever ends it.

    Args:
      path: of the file; it is made, with its directory, and stays.
      wait: until whoever has the lock frees it; else `held` says whether it was free.
      note: what is written into the file where the lock is held; nothing by default.

    Attributes:
      held: whether the lock is this process's. True too where the file system has no locks: there
        every process is as if alone.
      unsupported: why the file system has no locks, as some network and FUSE file systems; else
        empty.
      holder: the note of the process that has the lock, where it is another and can be read.
      file: descriptor of the file, to read and append to while the lock is held.

    Raises:
      OSError: the file cannot be made or written.

    Example:
      >>> path = Path(tempfile.mkdtemp()) / "locks" / "a.lock"
      >>> with FileLock(path, note="process 7") as ours:
      ...     other = FileLock(path)
      ...     ours.held, other.held, other.holder
      (True, False, 'process 7')
    """

    def __init__(self, path: Path, *, wait: bool = False, note: str = ""):
        self.held, self.unsupported, self.holder = False, "", ""
        self.file = open_appending(path)
        try:
            self.held = self._lock(wait)
            if not self.held:
                with contextlib.suppress(OSError):  # A lock may forbid others to read (CIFS).
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
    """Open a file to read and append to; make it, and its directory, where they are missing.

    Returns:
      The descriptor.

    Raises:
      OSError: it cannot be written.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)


def append_line(file: int, line: str) -> None:
    """Append a line; what a kill or a full disk tore at the end of the file ends before it.

    Args:
      file: descriptor of `open_appending`.
      line: without its end. It is with the operating system when this returns.

    Raises:
      OSError: the disk is full or broken; a part of the line may stay.
    """
    size = os.fstat(file).st_size
    torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
    left = b"\n" * torn + line.encode() + b"\n"
    while left:
        left = left[os.write(file, left) :]


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
        """Add a line; `flush` hands it on.

        Args:
          entry: numbers of Python, NumPy or jax; a non-finite one becomes null.

        Raises:
          UserError: the disk is full.
        """
        if self._file is not None:
            with self._errors():
                self._file.write(_line(plain(entry)))

    def flush(self) -> None:
        """Hand every line to the operating system.

        Raises:
          UserError: the disk is full.
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
                f"cannot write {self._path}: {error.strerror}; free some space and run the same "
                "command again to resume"
            ) from error

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_lines(path: str | Path) -> list[Entry]:
    """Read the objects of a file of JSON lines, in order; a torn line is left out."""
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
