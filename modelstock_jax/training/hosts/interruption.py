"""A request to stop, granted at a step where everything is saved."""

from __future__ import annotations

import signal

import jax

from modelstock_jax.training.hosts import distributed

STOPPED = 143  # 128 + SIGTERM, as a shell reports it.


class Interruption:
    """Turns SIGTERM and Ctrl-C into a request that the loop grants after a save.

    A signal that the process was started to ignore stays ignored, as a shell's background job
    ignores Ctrl-C.

    Attributes:
      requested: whether a signal has come to this process; a second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        """Changes no signal's handler yet."""
        self.requested = False
        self._asked: jax.Array | None = None
        self._granted = False
        self._number = signal.SIGTERM

    def granted(self, step: int) -> bool:
        """Whether to save and stop after `step`: the same answer on every process.

        A signal to any one process is enough. Among several, it is granted a step late: each call
        sends this process's flag and reads what was sent by all at the call before, so that no
        step waits.

        Args:
          step: the step that was just taken; every process must ask at the same ones.
        """
        if jax.process_count() == 1:
            self._granted = self.requested
        else:
            before, self._asked = self._asked, distributed.anywhere(self.requested)
            self._granted = before is not None and bool(before)
        return self._granted

    def __enter__(self) -> Interruption:
        self._before = {}
        for kind in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(kind) is not signal.SIG_IGN:
                self._before[kind] = signal.signal(kind, self._request)
        return self

    def _request(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self._number = True, number

    def __exit__(self, error, *_) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        # It came too late for a step to grant it: it is not forgotten.
        if self.requested and not self._granted and error is None:
            signal.raise_signal(self._number)
