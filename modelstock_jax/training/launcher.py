"""A run of one process or of many: how it starts, and how each of its ends is one clear line.

Exit codes: 0 done; 1 a mistake, or another process was lost; 130 Ctrl-C; 143 stopped by SIGTERM
with everything saved.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib.util
import os
import signal
import socket
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, NoReturn

import jax
from ml_collections import ConfigDict

from modelstock_jax.errors import UserError
from modelstock_jax.machine import usable_cores
from modelstock_jax.training import multihost

# All processes must have come within so many seconds: a queue may start them one by one.
START_SECONDS = 300
# A process that sends no heartbeat for so long is lost. Its closed connections show it earlier on
# CPUs; a GPU's collectives wait for this.
HEARTBEAT_SECONDS = 60
# Process 0 may still write the model when the others are done.
END_SECONDS = 3600
# By these a failure is known to be another process's.
_SIGNS = ("gloo", "nccl", "coordination", "unhealthy", "peer", "unavailable", "heartbeat")
_LOST = (
    "another process of this run ended or was lost; its own line says why, if it could write one. "
    "The same command goes on from the last checkpoint"
)


@contextlib.contextmanager
def distributed_session(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """Runs its body as one process of a run; every mistake in it ends as one line and exit code 1.

    `jax.distributed` is started where flags or the cluster say that there are more processes
    (`launcher.detect_cluster`), and only there.

    Args:
      coordinator_address: host:port of process 0, or None to find it out; so are the other two.
      num_processes: how many there are.
      process_id: which one this is.

    Raises:
      SystemExit: with the line to print, where there is one process. One of several ends at once:
        to wait for the others would be to wait for those that are lost.
    """
    try:
        place = detect_cluster(coordinator_address, num_processes, process_id, os.environ)
    except UserError as error:
        sys.exit(f"error: {error}")
    if place is None:
        with single_process_session():
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
def single_process_session() -> Iterator[None]:
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


def _start(place: ProcessSpec) -> None:
    if place.coordinator_address and place.process_id:
        _wait_for(place.coordinator_address)
    # Its handler of SIGTERM would take the place of `PreemptionHandler`'s.
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
    sys.stdout = os.fdopen(os.dup(1) if multihost.is_main() else nowhere, "w", buffering=1)
    os.dup2(nowhere, 1)
    multihost.barrier("all are here")


def _where(place: ProcessSpec) -> str:
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
                    self.line(lost_process_message("".join(held)))


def lost_process_message(message: str) -> str:
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


# Where this process stands among those of a run, from flags or from what the cluster says.

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


class ProcessSpec(NamedTuple):
    """One of several processes; None is what `jax.distributed` finds out by itself.

    Attributes:
      coordinator_address: host:port of process 0, the same for all.
      num_processes: how many there are.
      process_id: which one this is, from 0.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def detect_cluster(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    environ: Mapping[str, str],
) -> ProcessSpec | None:
    """The place of this process, or None where it is the only one.

    Flags come first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, then
    SLURM, Open MPI, an indexed Kubernetes job (for the id alone) and Cloud TPU.

    Args:
      coordinator_address: of --coordinator_address, or None; so are the other two.
      num_processes: of --num_processes.
      process_id: of --process_id.
      environ: the environment's variables.

    Raises:
      UserError: if what is given does not make a place.

    >>> detect_cluster(None, None, None, {}) is None
    True
    >>> detect_cluster("node0:1234", 2, 1, {})
    Place(coordinator_address='node0:1234', num_processes=2, process_id=1)
    >>> detect_cluster(None, None, None, {"SLURM_STEP_NODELIST": "node[0-3]", "SLURM_NTASKS": "4"})
    Place(coordinator_address=None, num_processes=None, process_id=None)
    """
    address = coordinator_address or environ.get("JAX_COORDINATOR_ADDRESS") or None
    if num_processes is None:
        num_processes = _number("JAX_NUM_PROCESSES", environ)
    if process_id is None:
        process_id = _number("JAX_PROCESS_ID", environ)
    scheduled = _scheduled(environ)
    if address is None and num_processes is None and process_id is None:
        return ProcessSpec() if scheduled or _tpu_hosts(environ) > 1 else None
    if process_id is None and not scheduled:
        process_id = _number("JOB_COMPLETION_INDEX", environ)
    place = ProcessSpec(address, num_processes, process_id)
    if num_processes == 1 and not process_id:
        return None
    missing = [f"--{name}" for name, value in place._asdict().items() if value is None]
    if missing and not scheduled:
        raise UserError(
            f"{' and '.join(missing)} missing: several processes need --coordinator_address="
            "HOST:PORT, --num_processes and --process_id, or the JAX_... variables of these names"
        )
    _check(place)
    return place


def _check(place: ProcessSpec) -> None:
    address, count, number = place
    host, _, port = (address or "host:1").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address={address}: write HOST:PORT, as in node0:1234")
    if count is not None and count < 1:
        raise UserError(f"--num_processes={count}: it must be at least 1")
    if number is not None and not 0 <= number < (count or number + 1):
        last = "upward" if count is None else f"to {count - 1}, with --num_processes={count}"
        raise UserError(f"--process_id={number}: it is 0 {last}")


def _scheduled(environ: Mapping[str, str]) -> bool:
    """Whether `srun` or `mpirun` started this process beside others, as jax recognizes it."""
    if "SLURM_STEP_NODELIST" in environ:
        return (_number("SLURM_NTASKS", environ) or 1) > 1
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return (_number("OMPI_COMM_WORLD_SIZE", environ) or 1) > 1
    return False


def _tpu_hosts(environ: Mapping[str, str], ask: Callable[[str], str] | None = None) -> int:
    """Hosts of the Cloud TPU slices that this machine is part of; 0 where it is of none."""
    on_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if ask is None and (not on_tpu or importlib.util.find_spec("libtpu") is None):
        return 0
    slices = _number("MEGASCALE_NUM_SLICES", environ) or 1
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if names is None and "TPU_SKIP_MDS_QUERY" not in environ:
        names = (ask or _metadata)("worker-network-endpoints")
    return slices * len(names.split(",")) if names else 0


def _metadata(name: str) -> str:
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""  # Not on Google's cloud.


def _number(name: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdigit():
        raise UserError(f"{name}={text!r} in the environment: it must be a number")
    return int(text)


# A request to stop, granted at a step where everything is saved.

STOPPED = 143  # 128 + SIGTERM, as a shell reports it.


class PreemptionHandler:
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

    def should_stop(self, step: int) -> bool:
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
            before, self._asked = self._asked, multihost.any_process(self.requested)
            self._granted = before is not None and bool(before)
        return self._granted

    def __enter__(self) -> PreemptionHandler:
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


# The cores of a CPU as devices.

_CPU_DEVICES = "jax_num_cpu_devices"


def set_cpu_devices(config: ConfigDict) -> None:
    """Makes CPU devices, one a replica as far as the cores reach.

    Whoever has said how many there are (`XLA_FLAGS`, `JAX_NUM_CPU_DEVICES`) keeps them, as do
    replicas that run one after the other, and one of several processes. Accelerators are not
    touched, nor is a jax that has computed before.

    Args:
      config: of the run.
    """
    said = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    said = said or getattr(jax.config, _CPU_DEVICES) > 0 or jax.distributed.is_initialized()
    if said or config.compute.replica_mode == "map":
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update(_CPU_DEVICES, num_cpu_devices(config.num_replicas, usable_cores()))


def num_cpu_devices(num_replicas: int, cores: int) -> int:
    """The largest divisor of the number of replicas that is not above the cores: no batch is cut.

    >>> [devices(2, 1), devices(2, 64), devices(3, 2), devices(4, 3)]
    [1, 2, 1, 2]
    """
    return max(d for d in range(1, cores + 1) if num_replicas % d == 0)
