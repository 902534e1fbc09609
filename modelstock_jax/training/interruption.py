"""A request to stop, granted at a step where everything is saved."""

from __future__ import annotations

import signal

STOPPED = 143  # 128 + SIGTERM, as a shell reports it.


class Interruption:
    """Turns SIGTERM and Ctrl-C into a request that the loop grants after a save.

    Attributes:
      requested: whether a signal has come; a second Ctrl-C stops at once.
    """

    requested = False

    def __enter__(self) -> Interruption:
        self._before = {}
        for kind in (signal.SIGTERM, signal.SIGINT):
            self._before[kind] = signal.signal(kind, self._request)
        return self

    def _request(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
