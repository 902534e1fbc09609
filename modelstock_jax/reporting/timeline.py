"""Phases of a run: a line at the start and end of each phase, and seconds per phase."""

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

SUMS_ONLY = frozenset({"train", "data"})  # Every step has both: lines would slow it down.
SHOWN = {
    "train": "training",
    "data": "waiting for data",
    "merge": "merging",
    "save": "saving (while training waits)",
    "batch norms": "estimating batch norms",
    "evaluate": "evaluating",
    "export": "exporting",
    "restore": "restoring",
    "compile": "compiling",
}


class Timeline:
    """Append {"phase", "event", "time", "step"} lines to a file, and sum each phase's seconds.

    A line is passed to the operating system before the call returns: the last lines of the file
    show what a run is doing, or was doing when it was killed. Phases can be nested; a second counts
    once, for the innermost phase. A full disk loses lines and prints a warning, but does not stop
    the run. A line that was cut off by a full disk or a kill is ended before the next one.

    Args:
      path: file to append to; None writes no file
      enabled: False writes nothing (all processes except the first) but sums seconds

    Attributes:
      seconds: phase -> seconds that the creating thread has spent in it

    Raises:
      UserError: the file cannot be opened

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
        self._start = self._since = time.perf_counter()
        self._thread = threading.get_ident()
        self._lock = threading.Lock()  # A save ends on another thread.
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
        """Record a `with` block as phase `name`, with `step` in its lines."""
        try:  # A signal can raise as soon as the line is written.
            if name not in SUMS_ONLY:
                self.begin(name, step)
            with self.spend(name):
                yield
        finally:
            if name not in SUMS_ONLY:
                self.end(name, step)

    @contextlib.contextmanager
    def spend(self, name: str) -> Iterator[None]:
        """Count the seconds of a `with` block for `name`; write no lines."""
        self._count()
        self._open.append(name)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def move(self, name: str, seconds: float) -> None:
        """Count seconds that this thread just spent in the open phase for `name` instead."""
        if threading.get_ident() == self._thread:
            if self._open:
                self.seconds[self._open[-1]] -= seconds
            self.seconds[name] += seconds

    def begin(self, name: str, step: int | None = None) -> None:
        """Write only the line that `name` begins; it may end on another thread."""
        self._write(name, "begin", step)

    def end(self, name: str, step: int | None = None) -> None:
        """Write only the line that `name` ends."""
        self._write(name, "end", step)

    def totals(self) -> defaultdict[str, float]:
        """Return a copy of `seconds`, with the open phase counted until now."""
        self._count()
        return self.seconds.copy()

    def wall(self) -> float:
        """Return the seconds since this object was created."""
        return time.perf_counter() - self._start

    def show(self, console: Console | None = None) -> None:
        """Print how this process spent its time."""
        wall = self.wall()
        table = Table(title=f"Time by phase, {wall:.1f} s in total", title_justify="left", box=None)
        table.add_column()
        table.add_column("seconds", justify="right")
        table.add_column("fraction", justify="right")
        rows = {text: self.seconds.get(name, 0.0) for name, text in SHOWN.items()}
        rows["other (startup, reading, writing)"] = wall - sum(rows.values())
        for text, seconds in rows.items():
            if seconds >= 0.001 * wall:
                table.add_row(text, f"{seconds:.1f}", f"{100 * seconds / wall:.1f} %")
        (console or Console()).print(table)

    def close(self) -> None:
        """Close the file; later lines are dropped, and a second call does nothing."""
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
    """Return the lines of a timeline in order, without incomplete lines."""
    return [entry for entry in read_lines(path) if "phase" in entry]
