"""Bytes done, bytes a second and the time left: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from modelstock_jax.reporting.progress import duration

LINE_SECONDS, BAR_SECONDS = 10.0, 0.1


class Meter:
    """Called with bytes done and bytes in all; shows them on `console`.

    Args:
      title: what is being done, in a word or two.
      console: standard error, by the command line.
      clock: seconds; replaced in tests.

    Example:
      >>> import io
      >>> out = io.StringIO()
      >>> with Meter("merging", Console(file=out, width=80)) as meter:
      ...     meter(10**9, 10**9)
      >>> out.getvalue().split("  ")[:2]
      ['merging', '1.0 GB of 1.0 GB']
    """

    def __init__(self, title: str, console: Console, clock: Callable[[], float] = time.monotonic):
        self._title, self._console, self._clock = title, console, clock
        self._start = self._shown = clock()
        self._done = 0
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Meter:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(),
                TransferSpeedColumn(), TimeRemainingColumn(), console=self._console,
                refresh_per_second=4, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self._title, total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Says that `done` of `total` bytes are done."""
        now = self._clock()
        wait = LINE_SECONDS if self._bar is None else BAR_SECONDS
        if now - self._shown < wait and (done < total or self._done == done):
            return
        self._shown, self._done = now, done
        if self._bar is None:
            self._print(done, total, now - self._start)
        else:
            self._bar.update(self._task, completed=done, total=total)

    def _print(self, done: int, total: int, seconds: float) -> None:
        parts = [self._title, f"{decimal(done)} of {decimal(total)}"]
        if seconds > 0 and done:
            parts.append(f"{decimal(int(done / seconds))}/s")
            if done < total:
                parts.append(f"{duration(seconds * (total - done) / done)} left")
        self._console.print("  ".join(parts), highlight=False, markup=False, soft_wrap=True)
