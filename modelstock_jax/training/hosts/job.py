"""A run of one process or of many: how it starts, and how each of its ends is one clear line.

Exit codes: 0 done; 1 a mistake, or another process was lost; 130 Ctrl-C; 143 stopped by SIGTERM
with everything saved.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax

from modelstock_jax.errors import UserError
from modelstock_jax.training.hosts import cluster, distributed
from modelstock_jax.training.hosts.interruption import STOPPED

# All processes must have come within so many seconds: a queue may start them one by one.
START_SECONDS = 300
# A process that sends no heartbeat for so long is lost. Its closed connections show it earlier on
# CPUs; a GPU's collectives wait for this.
HEARTBEAT_SECONDS = 60
# Process 0 may still write the model when the others are done.
END_SECONDS = 3600
# By these a failure is known to be another process's.
_SIGNS = ("gloo", "nccl", "coordination", "unhealthy", "peer", "unavailable", "heartbeat")


@contextlib.contextmanager
def job(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """Runs its body as one process of a run; every mistake in it ends as one line and exit code 1.

    `jax.distributed` is started where flags or the cluster say that there are more processes
    (`cluster.find`), and only there.

    Args:
      coordinator_address: host:port of process 0, or None to find it out; so are the other two.
      num_processes: how many there are.
      process_id: which one this is.

    Raises:
      SystemExit: with the line to print, where there is one process. One of several ends at once:
        to wait for the others would be to wait for those that are lost.
    """
    try:
        place = cluster.find(coordinator_address, num_processes, process_id, os.environ)
    except UserError as error:
        sys.exit(f"error: {error}")
    if place is None:
        with one_process():
            yield
        return
    end = _End(place.process_id or 0)
    try:
        _start(place)
        end.number = jax.process_index()
        yield
    except UserError as error:
        if line := _another(error):
            end.line(line)
        end.mistake(str(error))
    except KeyboardInterrupt:
        end.now(130)
    except Exception as error:
        if line := _another(error):
            end.line(line)
        traceback.print_exc()
        end.now(1)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """Runs its body as a process of its own; a mistake or a signal in it ends as one line.

    Raises:
      SystemExit: with the line; of a signal, with its code.
    """
    # Between trainings: what is half written is removed, and the exit code says why.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


_LOST = (
    "another process of this run ended or was lost; its own line says why, if it could write one. "
    "The same command goes on from the last checkpoint"
)


def _start(place: cluster.Place) -> None:
    if place.coordinator_address and place.process_id:
        _wait_for(place.coordinator_address)
    # Its handler of SIGTERM would take the place of `Interruption`'s.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *place,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the processes cannot be joined ({_where(place)}): {reason}") from error
    # What is printed from here on, process 0 prints; Gloo, by itself, says whom it has found.
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(os.dup(1) if distributed.is_main() else nowhere, "w", buffering=1)
    os.dup2(nowhere, 1)
    distributed.barrier("all are here")


def _where(place: cluster.Place) -> str:
    address, count, number = place
    return f"coordinator {address}, process {number} of {count}" if address else "by the cluster"


def _wait_for(address: str) -> None:
    """Waits for process 0's port; jax alone would end here with a stack trace."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"no coordinator at {address} after {START_SECONDS} s ({error}); is process 0 "
                    "running there, and is the port open?"
                ) from error
        time.sleep(0.2)


def _another(error: BaseException | None) -> str | None:
    """The line for a failure that comes from another process; None where it is this one's own."""
    while error is not None:
        if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)):
            text = " ".join(str(error).split())
            if not isinstance(error, UserError) and any(sign in text.lower() for sign in _SIGNS):
                return f"{_LOST} ({text[:200]})"
        error = error.__cause__
    return None


class _End:
    """The end of one of several processes: the one line, and no wait for the others.

    jax ends a process by SIGABRT when another is lost, after pages of its own; there is no hook
    for Python. Its text is read here instead, and the abort held up until the line is written.
    """

    def __init__(self, number: int) -> None:
        """`number` is this process's, as far as it is known."""
        self.number, self._silent = number, False
        self._last = threading.Lock()  # Whoever speaks first is the one who speaks.
        self._stderr = os.fdopen(os.dup(2), "w", buffering=1)
        source, sink = os.pipe()
        os.dup2(sink, 2)
        os.close(sink)
        sys.stderr = self._stderr
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        # The handler is sleep(SIGABRT): six seconds for this line, and then the abort goes on.
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        threading.Thread(target=self._read, args=(source,), daemon=True).start()

    def mistake(self, line: str) -> NoReturn:
        """Says a mistake; one that all make, process 0 says, and the others see it end."""
        if self.number:
            self._silent = True
            time.sleep(2)
        self.line(line)

    def line(self, line: str) -> NoReturn:
        """Says one line and ends."""
        with self._last:
            who = f"process {self.number}: " if self.number else ""
            self._stderr.write(f"error: {who}{line}\n")
            self.now(1)

    def now(self, code: int) -> NoReturn:
        """Ends without the wait for the others at an interpreter's end."""
        sys.stdout.flush()
        self._stderr.flush()
        os._exit(code)

    def _read(self, source: int) -> None:
        held: list[str] = []
        with open(source, errors="replace") as lines:
            for line in lines:
                # Either opens the message of a loss, which nothing survives.
                if held or "coordination_service" in line or "Terminating process" in line:
                    held.append(line)
                else:
                    self._stderr.write(line)
                if "failure stack trace" in line:
                    if self._silent:
                        self.now(1)
                    self.line(what_was_lost("".join(held)))


def what_was_lost(message: str) -> str:
    r"""The one line for the message with which jax ends a process.

    >>> what_was_lost("... unhealthy (stopped sending heartbeats):\n3\nThe tasks ...")[:20]
    'process 3 was lost: '
    """
    goes_on = "the same command goes on from the last checkpoint"
    if "RegisterTask" in message:
        return (
            f"not all processes came within {START_SECONDS} s; start as many as --num_processes "
            "says, all with the same --coordinator_address"
        )
    _, found, after = message.partition("(stopped sending heartbeats):")
    if found:
        numbers = after.split("The tasks")[0].split()
        return f"process {', '.join(numbers)} was lost: no sign of life for a minute; {goes_on}"
    if "Failed to send RPC" in message:
        return f"process 0 ended or was lost; {goes_on}"
    return _LOST
