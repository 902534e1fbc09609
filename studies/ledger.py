"""Finished measurements, a line of JSON each; locks by which processes share the work."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import FileLock, append_line, flush, read_lines

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
            entries = read_lines(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error}; move it away") from error
        self._lines |= {entry["key"]: entry for entry in entries if _fits(entry)}

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
        line = json.dumps(entry, allow_nan=False)
        try:
            with FileLock(self._path, wait=True) as lock:
                append_line(lock.file, line)
                flush(lock.file)
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


def _fits(entry: Mapping[str, Any]) -> bool:
    """Whether a line is one of a ledger's."""
    of_kinds = (isinstance(entry.get(name), kind) for name, kind in _FIELDS.items())
    return "value" in entry and all(of_kinds)


# Work that several processes share: who claims a piece does it, and the others take the next.


Piece = TypeVar("Piece")

# Between two looks at what others are doing; a piece takes a second to days.
_SECONDS = 0.5


@contextlib.contextmanager
def lock_run(directory: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
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
        lock = FileLock(path, wait=wait)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another workdir") from error
    with lock:
        yield lock.held
        if lock.held:
            # Whoever still comes to the old file finds the piece done.
            path.unlink(missing_ok=True)


def work_queue(
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
      >>> for piece in work_queue(Path(tempfile.mkdtemp()), {"a": "a", "b": "b"}, results.__contains__):
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
            with lock_run(directory, name) as ours:
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
