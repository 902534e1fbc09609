"""Finished measurements, one line of JSON each, and locks with which processes share work."""

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

    Several processes may append to it. Lines that a crash truncated, and lines in another format,
    are ignored: their measurements run again.

    Args:
      path: created with the first line.

    Raises:
      UserError: if the file cannot be read.

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
        """Read the lines that other processes have appended.

        Raises:
          UserError: if the file cannot be read.
        """
        try:
            entries = read_lines(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UserError(f"cannot read {self._path}: {error}; move it away") from error
        self._lines |= {entry["key"]: entry for entry in entries if _is_valid(entry)}

    def look_for(self, key: str) -> bool:
        """Return whether the ledger contains a key; read the file again if needed."""
        if key not in self._lines:
            self.refresh()
        return key in self._lines

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __getitem__(self, key: str) -> Any:
        return self._lines[key]["value"]

    def add(self, key: str, *, value: Any, what: str, seconds: float, commit: str) -> None:
        """Append a line and flush it to disk.

        Raises:
          UserError: if the file cannot be written.
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
                f"cannot write {self._path}: {error.strerror}; free some disk space and run the "
                "same command again to resume"
            ) from error
        self._lines[key] = entry

    def median_seconds(
        self, what: str, work: Callable[[Any], float] = lambda value: 1
    ) -> float | None:
        """Return the median time per unit of work; None without measurements of this kind.

        Args:
          what: kind of measurement.
          work: value -> units of work.
        """
        times = []
        for entry in self._lines.values():
            if entry["what"] == what:
                with contextlib.suppress(TypeError, KeyError, ZeroDivisionError):
                    times.append(entry["seconds"] / work(entry["value"]))
        return sorted(times)[len(times) // 2] if times else None

    def commits(self, keys: Iterable[str]) -> list[str]:
        """Return the commits that measured these keys, without duplicates."""
        return sorted({self._lines[key]["commit"] for key in keys})


def _is_valid(entry: Mapping[str, Any]) -> bool:
    """Return whether a line has the ledger's fields and types."""
    has_types = (isinstance(entry.get(name), kind) for name, kind in _FIELDS.items())
    return "value" in entry and all(has_types)


Task = TypeVar("Task")

# Time between two looks at the work of other processes; a task takes a second to days.
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def lock_run(directory: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Lock a task until the block or the process ends; yield whether this process has the lock.

    The lock is on DIRECTORY/NAME.lock. On a file system without locks, every process gets it.

    Args:
      directory: created if missing; on a disk that the processes share.
      name: of the task.
      wait: wait until the process that has the lock frees it.

    Raises:
      UserError: if the lock file cannot be written.
    """
    path = directory / f"{name}.lock"
    try:
        lock = FileLock(path, wait=wait)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another workdir") from error
    with lock:
        yield lock.held
        if lock.held:
            # A process that still has the old file open finds the task done.
            path.unlink(missing_ok=True)


def work_queue(
    directory: Path,
    tasks: Mapping[str, Task],
    is_done: Callable[[str], bool],
    on_wait: Callable[[int], None] = lambda count: None,
    dependencies: Mapping[str, Collection[str]] | None = None,
) -> Iterator[Task]:
    """Yield the tasks that are not done and that no other process works on, until all are done.

    A task is locked until the next one is requested. Tasks that another process gave up are taken
    over.

    Args:
      directory: of the lock files.
      tasks: name -> task, in order of execution.
      is_done: name -> whether any process has done the task.
      on_wait: called with the number of remaining tasks whenever all of them belong to other
        processes, or depend on such tasks, and the number has changed.
      dependencies: name -> names of the tasks that must be done before it.

    Example:
      >>> import tempfile
      >>> results = {"a": 1}
      >>> tasks = {"a": "a", "b": "b"}
      >>> for task in work_queue(Path(tempfile.mkdtemp()), tasks, results.__contains__):
      ...     results[task] = 2
      >>> results
      {'a': 1, 'b': 2}
    """
    remaining, reported, dependencies = dict(tasks), 0, dependencies or {}
    while remaining:
        found = False
        for name in list(remaining):
            if any(needed in remaining for needed in dependencies.get(name, ())):
                continue
            with lock_run(directory, name) as locked:
                if locked and not is_done(name):
                    found = True
                    yield remaining[name]
                if locked:
                    del remaining[name]
        if remaining and not found:
            if len(remaining) != reported:
                on_wait(len(remaining))
                reported = len(remaining)
            time.sleep(_POLL_SECONDS)
