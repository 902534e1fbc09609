"""Progress with rate and time left: a bar on a terminal, otherwise a line at intervals.

`Progress` counts the steps of a loop, `ByteProgress` counts bytes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

WINDOW_SECONDS = 20.0
# Seconds between updates of `ByteProgress`: lines, and the bar.
LINE_SECONDS, BAR_SECONDS = 10.0, 0.1
# A shorter pause prints no line.
PAUSE_SECONDS = 1.0


class Progress:
    """Show how far a loop is, its rate and the time left.

    Without a terminal it prints a line every 10 s or 10 %, whichever is later, but at least one per
    minute, and one at the end. The time of the first step and of pauses (compilation) is not part
    of the rate.

    Args:
      title: short description of the loop
      total: total number of steps
      done: steps done before a resumed run started
      images_per_step: number of images per step, to show images/s; 0 shows steps
      unit: name of a step in the rate
      console: output; standard output by default
      enabled: False prints nothing (all processes except the first)
      clock: returns seconds; replaced in tests

    Attributes:
      transient: whether the bar disappears at the end
      total_known: whether `total` is known before the first update; until then the bar pulses

    Example:
      >>> import io
      >>> with Progress("train", 2, console=Console(file=io.StringIO())) as progress:
      ...     progress.update(1, {"loss": 2.5})
      ...     progress.update(2)
    """

    transient, total_known = False, True

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        images_per_step: int = 0,
        unit: str = "steps",
        console: Console | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._title, self._total, self._done = title, total, done
        self._images, self._unit = images_per_step, unit
        self._console = console or Console()
        self._enabled, self._clock = enabled, clock
        self._seen: deque[tuple[float, int]] = deque()
        self._values: dict[str, float] = {}
        self._printed = (clock(), done)
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._pauses, self._pause_start, self._paused = 0, 0.0, 0.0
        self._pause_timer: threading.Timer | None = None
        self._pause_printed: int | None = None  # Steps done when a pause was printed last.

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                *self._columns(),
                console=self._console,
                refresh_per_second=4,
                transient=self.transient,
            )
            total = self._total if self.total_known else None
            self._task = self._bar.add_task(self._title, total=total, completed=self._done, text="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and self._printed[1] < self._done:
            self._print_line()

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Report that `done` steps are done.

        Args:
          done: total number of steps done, including those before a restart
          values: name -> value to show next to the rate (loss, ...), until it is replaced
        """
        if not self._enabled:
            return
        now = self._clock()
        self._done = done
        self._values.update({name: float(value) for name, value in (values or {}).items()})
        active = now - self._paused
        self._seen.append((active, done))
        while len(self._seen) > 2 and active - self._seen[1][0] >= WINDOW_SECONDS:
            self._seen.popleft()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=self.text())
            return
        seconds, steps = now - self._printed[0], done - self._printed[1]
        if done >= self._total or (seconds >= 10 and steps >= 0.1 * self._total) or seconds >= 60:
            self._print_line()

    def begin_pause(self, text: str) -> None:
        """Show `text` until `end_pause`; the time until then is not part of the rate.

        Pauses may be nested. Without a terminal, a pause of a second prints a line, but only one
        between two updates.

        Args:
          text: what is done in the meantime
        """
        self._pauses += 1
        if self._pauses > 1 or not self._enabled:
            return
        self._pause_start = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        elif self._pause_printed != self._done:
            self._pause_timer = threading.Timer(PAUSE_SECONDS, self._print_pause, [text])
            self._pause_timer.daemon = True
            self._pause_timer.start()

    def end_pause(self) -> None:
        """End the pause that began last; without one, do nothing."""
        if not self._pauses:
            return
        self._pauses -= 1
        if self._pauses or not self._enabled:
            return
        self._paused += self._clock() - self._pause_start
        if self._pause_timer is not None:
            self._pause_timer.cancel()
        if self._bar is not None:
            self._bar.update(self._task, text=self.text())

    def _print_pause(self, text: str) -> None:
        self._pause_printed = self._done
        self.log(f"{self._title}  {self._amount()}  {text}")

    def log(self, line: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def rate(self) -> float | None:
        """Return steps per second over the last 20 s; None before the second update."""
        if len(self._seen) < 2:
            return None
        (begin, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - begin) if end > begin and last > first else None

    def text(self) -> str:
        """Return rate, time left and values as shown."""
        rate = self.rate()
        parts = []
        if rate is not None:
            speed = rate * self._images if self._images else rate
            unit = "images/s" if self._images else f"{self._unit}/s"
            number = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
            left = duration((self._total - self._done) / rate)
            parts = [f"{number} {unit}", f"{left} left"]
        parts += [f"{name} {value:.4g}" for name, value in self._values.items()]
        return "  ".join(parts)

    def _columns(self) -> list[ProgressColumn]:
        """Return the columns to the right of the bar."""
        return [
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[text]}"),
        ]

    def _amount(self) -> str:
        """Return the progress as shown in a line."""
        return f"{self._done}/{self._total} ({100 * self._done / max(1, self._total):.0f} %)"

    def _print_line(self) -> None:
        self.log(f"{self._title}  {self._amount()}  {self.text()}".rstrip())
        self._printed = (self._clock(), self._done)


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds.

    Example:
      >>> duration(75), duration(3700)
      ('1:15', '1:01:40')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ByteProgress(Progress):
    """Show the progress of bytes, and their rate since the start.

    Call it with the bytes done and the total. Without a terminal it prints a line every 10 s, and
    one at the end.

    Args:
      title: short description of the process
      console: output; the command line uses standard error
      clock: returns seconds; replaced in tests

    Example:
      >>> import io
      >>> out = io.StringIO()
      >>> with ByteProgress("merging", Console(file=out, width=80)) as progress:
      ...     progress(10**9, 10**9)
      >>> out.getvalue().split("  ")[:2]
      ['merging', '1.0 GB of 1.0 GB']
    """

    transient, total_known = True, False

    def __init__(self, title: str, console: Console, clock: Callable[[], float] = time.monotonic):
        super().__init__(title, 0, console=console, clock=clock)
        self._start = self._printed[0]

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` bytes are done."""
        now = self._clock()
        wait = LINE_SECONDS if self._bar is None else BAR_SECONDS
        if now - self._printed[0] < wait and (done < total or self._done == done):
            return
        self._done, self._total = done, total
        if self._bar is None:
            self._print_line()
        else:
            self._bar.update(self._task, completed=done, total=total)
            self._printed = (now, done)

    def text(self) -> str:
        """Return rate and time left as shown in a line; a bar has columns for them."""
        seconds, left = self._clock() - self._start, self._total - self._done
        if seconds <= 0 or not self._done:
            return ""
        parts = [f"{decimal(int(self._done / seconds))}/s"]
        if left > 0:
            parts.append(f"{duration(seconds * left / self._done)} left")
        return "  ".join(parts)

    def _columns(self) -> list[ProgressColumn]:
        return [DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]

    def _amount(self) -> str:
        return f"{decimal(self._done)} of {decimal(self._total)}"
