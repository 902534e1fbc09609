"""Finished measurements, a line of JSON each: nothing is measured twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from modelstock_jax.errors import UserError

_FIELDS = {"key": str, "what": str, "seconds": (int, float), "commit": str}


class Ledger:
    """A file of lines {"key", "what", "value", "seconds", "commit"}; appended to, never rewritten.

    Several processes may add to it. A line torn by a crash, or not of these, is passed over: its
    measurement is made again.

    Args:
      path: made when the first line is added.

    Raises:
      UserError: if it cannot be read.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/measured.jsonl"
      >>> Ledger(path).add("abc", value=1.5, what="a distance", seconds=0.1, commit="d8ecb55")
      >>> Ledger(path)["abc"], "abd" in Ledger(path)
      (1.5, False)
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lines: dict[str, dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Reads what other processes have added.

        Raises:
          UserError: if it cannot be read.
        """
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error}; move it away") from error
        for line in text.splitlines():
            if (entry := _read(line)) is not None:
                self._lines[entry["key"]] = entry

    def look_for(self, key: str) -> bool:
        """Whether it is here, or another process has added it since."""
        if key not in self._lines:
            self.refresh()
        return key in self._lines

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> Any:
        return self._lines[key]["value"]

    def add(self, key: str, *, value: Any, what: str, seconds: float, commit: str) -> None:
        """Appends a line, on disk when this returns.

        Raises:
          UserError: if it cannot be written.
        """
        entry = {
            "key": key,
            "what": what,
            "value": value,
            "seconds": round(seconds, 2),
            "commit": commit,
        }
        text = json.dumps(entry, allow_nan=False) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                with contextlib.suppress(OSError):  # Some file systems have no locks.
                    fcntl.flock(file, fcntl.LOCK_EX)
                file.write(b"\n" * _torn(file) + text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror}; make room, and the same command "
                "goes on"
            ) from error
        self._lines[key] = entry

    def rate(self, what: str, work: Callable[[Any], float] = lambda value: 1) -> float | None:
        """The median time of a unit of work in measurements of a kind; None if there is none.

        Args:
          what: the kind.
          work: value -> units of work that it took.
        """
        times = []
        for entry in self._lines.values():
            if entry["what"] == what:
                with contextlib.suppress(TypeError, KeyError, ZeroDivisionError):
                    times.append(entry["seconds"] / work(entry["value"]))
        return sorted(times)[len(times) // 2] if times else None

    def commits(self, keys: Iterable[str]) -> list[str]:
        """The commits that measured these keys, each once."""
        return sorted({self._lines[key]["commit"] for key in keys})


def _read(line: str) -> dict[str, Any] | None:
    """The entry of a line; None where it is none."""
    try:
        entry = json.loads(line)
        fits = all(isinstance(entry[name], kind) for name, kind in _FIELDS.items())
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return entry if fits and "value" in entry else None


def _torn(file: BinaryIO) -> bool:
    """Whether the file ends in the middle of a line."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"


# Work that several processes share: who claims a piece does it, and the others take the next.


Piece = TypeVar("Piece")

# Between two looks at what others are doing; a piece takes a second to days.
_SECONDS = 0.5


@contextlib.contextmanager
def claim(directory: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Whether the piece is this process's, until the block ends or the process does.

    A lock on DIRECTORY/NAME.lock; where a file system has none, every process is as if alone.

    Args:
      directory: made if missing; on a disk that the processes share.
      name: of the piece.
      wait: until whoever has it is done.

    Raises:
      UserError: if nothing can be written there.
    """
    path = directory / f"{name}.lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another workdir") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
        # Whoever still comes to the old file finds the piece done.
        path.unlink(missing_ok=True)
    finally:
        os.close(file)


def turns(
    directory: Path,
    pieces: Mapping[str, Piece],
    done: Callable[[str], bool],
    waits: Callable[[int], None] = lambda count: None,
    after: Mapping[str, Collection[str]] | None = None,
) -> Iterator[Piece]:
    """The pieces that are not done and that no other process is at; ends when all are done.

    A piece is claimed until the next is asked for. What another process gave up is taken over.

    Args:
      directory: of the locks.
      pieces: by name, in the order in which they are done.
      done: name -> whether anyone has done it.
      waits: told of the number of pieces whenever only others', and what needs them, are left and
        it has changed.
      after: name -> the pieces that must be done before it.

    Example:
      >>> import tempfile
      >>> results = {"a": 1}
      >>> for piece in turns(Path(tempfile.mkdtemp()), {"a": "a", "b": "b"}, results.__contains__):
      ...     results[piece] = 2
      >>> results
      {'a': 1, 'b': 2}
    """
    left, told, after = dict(pieces), 0, after or {}
    while left:
        found = False
        for name in list(left):
            if any(needed in left for needed in after.get(name, ())):
                continue
            with claim(directory, name) as ours:
                if ours and not done(name):
                    found = True
                    yield left[name]
                if ours:
                    del left[name]
        if left and not found:
            if len(left) != told:
                waits(len(left))
                told = len(left)
            time.sleep(_SECONDS)
