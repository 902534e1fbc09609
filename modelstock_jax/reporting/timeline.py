"""Where a run's time goes: a line when a phase begins and when it ends, and seconds by phase."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from modelstock_jax.errors import UserError
from modelstock_jax.fileio import append_line, open_appending, read_lines

SUMS_ONLY = frozenset({"train", "data"})  # A step has both: a line for each would cost it.
SHOWN = {
    "train": "training",
    "data": "waiting for data",
    "merge": "merging",
    "save": "saving (while training waits)",
    "evaluate": "evaluating",
    "export": "exporting",
    "restore": "restoring",
    "compile": "compiling",
}


class Timeline:
    """Appends {"phase", "event", "time", "step"} lines to a file, and sums each phase's seconds.

    A line is with the operating system when the call returns: the file's last lines are what a run
    is in now, or was in when it was killed. Phases may lie in one another; a second counts once,
    for the innermost. A full disk costs lines, and a warning, never the run; a line that it or a
    kill has torn ends before the next one begins.

    Args:
      path: the file, appended to where it exists; None writes none.
      enabled: False writes nothing (all processes but the first); the sums are kept.

    Attributes:
      seconds: phase -> seconds that the thread which made this has spent in it.

    Raises:
      UserError: the file cannot be opened.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/timeline.jsonl"
      >>> with Timeline(path) as timeline, timeline.phase("merge", step=8):
      ...     pass
      >>> [(line["phase"], line["event"], line["step"]) for line in read_timeline(path)]
      [('merge', 'begin', 8), ('merge', 'end', 8)]
    """

    def __init__(self, path: str | Path | None, enabled: bool = True):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []  # Innermost last.
        self._began = self._since = time.perf_counter()
        self._thread = threading.get_ident()
        self._lock = threading.Lock()  # A save ends on a thread of its own.
        self._path, self._file = path, None
        self._warned = False
        if path is None or not enabled:
            return
        try:
            self._file = open_appending(path)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose another --workdir, or make this "
                "one writable"
            ) from error

    @contextlib.contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """What happens inside is in phase `name`; its lines carry `step`."""
        try:  # From here on: a signal may raise as soon as the line is written.
            if name not in SUMS_ONLY:
                self.begin(name, step)
            with self.spend(name):
                yield
        finally:
            if name not in SUMS_ONLY:
                self.end(name, step)

    @contextlib.contextmanager
    def spend(self, name: str) -> Iterator[None]:
        """Sums the seconds inside for `name`; writes no lines."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def move(self, name: str, seconds: float) -> None:
        """Counts seconds that this thread just spent in the open phase for `name` instead."""
        if threading.get_ident() == self._thread:
            if self._open:
                self.seconds[self._open[-1]] -= seconds
            self.seconds[name] += seconds

    def begin(self, name: str, step: int | None = None) -> None:
        """A line alone: `name` begins; it may end on another thread."""
        self._write(name, "begin", step)

    def end(self, name: str, step: int | None = None) -> None:
        """A line alone: what `begin` began has ended."""
        self._write(name, "end", step)

    def totals(self) -> defaultdict[str, float]:
        """A copy of `seconds`, the open phase counted up to now."""
        self._count()
        return self.seconds.copy()

    def wall(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self._began

    def show(self, console: Console | None = None) -> None:
        """Prints where this process's time went."""
        wall = self.wall()
        table = Table(title=f"Where {wall:.1f} s went", title_justify="left", box=None)
        table.add_column()
        table.add_column("seconds", justify="right")
        table.add_column("share", justify="right")
        rows = {text: self.seconds.get(name, 0.0) for name, text in SHOWN.items()}
        rows["the rest (starting, reading, writing)"] = wall - sum(rows.values())
        for text, seconds in rows.items():
            if seconds >= 0.001 * wall:
                table.add_row(text, f"{seconds:.1f}", f"{100 * seconds / wall:.1f} %")
        (console or Console()).print(table)

    def close(self) -> None:
        """Closes the file; later lines are not written, and a second call does nothing."""
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                os.close(file)

    def __enter__(self) -> Timeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def _write(self, phase: str, event: str, step: int | None) -> None:
        entry = {"phase": phase, "event": event, "time": time.time(), "step": step}
        with self._lock:
            if self._file is None:
                return
            try:
                append_line(self._file, json.dumps(entry))
            except OSError as error:
                self._warn(error.strerror or str(error))

    def _warn(self, reason: str) -> None:
        if not self._warned:
            print(f"warning: cannot write {self._path}: {reason}", file=sys.stderr, flush=True)
        self._warned = True


def read_timeline(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a timeline, in order; a torn one is left out."""
    return [entry for entry in read_lines(path) if "phase" in entry]
