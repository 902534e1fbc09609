"""The picture of a merge, drawn beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock_jax.fileio import plain

# matplotlib's start takes a second: a merge of less would wait for a second process longer.
WORTH_A_PROCESS = 2**30


class Drawing:
    """Draws `figures.angle_by_block` for a merge that reads `num_bytes`.

    A long merge has a process of its own load matplotlib from the start on, and draw while the
    last file is flushed to the disk; a short one draws here.

    Args:
      num_bytes: that the merge reads.

    Example:
      >>> Drawing(0).close()
    """

    def __init__(self, num_bytes: int):
        self._rows: Sequence[Mapping[str, Any]] = []
        self._path: Path | None = None
        self._process = _start() if num_bytes >= WORTH_A_PROCESS else None

    def begin(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Gives the rows of a merge's report and where the picture will lie; does not wait."""
        self._path, self._rows = path, rows
        if self._process is not None and self._process.stdin is not None:
            try:
                with self._process.stdin as pipe:
                    pipe.write(json.dumps([str(path), plain(rows)]).encode())
            except OSError:  # It ended before its time: `finish` draws.
                pass

    def finish(self) -> None:
        """Waits until the picture is on the disk."""
        if self._process is None or self._process.wait() != 0:
            # matplotlib takes its time: it is imported when there is something to draw.
            from modelstock_jax.reporting.figures import angle_by_block

            angle_by_block(self._rows, self._path)

    def close(self) -> None:
        """Lets go of the process, whatever it does."""
        if self._process is not None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.kill()
            self._process.wait()


def _start() -> subprocess.Popen | None:
    command = [sys.executable, "-m", "modelstock_jax.checkpoint_merge.plot_process"]
    try:
        # A session of its own: Ctrl-C is for the merge, which ends this process.
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL, start_new_session=True)
    except OSError:
        return None


def main() -> None:
    """Loads matplotlib, waits for the rows on standard input, draws."""
    from modelstock_jax.reporting.figures import angle_by_block

    if text := sys.stdin.buffer.read():
        path, rows = json.loads(text)
        angle_by_block(rows, path)


if __name__ == "__main__":
    main()
