"""Start and exit of a run with one or several processes; cluster detection; preemption.

Every failure ends in one line. Exit codes:

    0    done
    1    a user error, or another process was lost
    130  Ctrl-C
    143  stopped by SIGTERM, with everything saved
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

# Timeout until all processes have started: a scheduler may start them one by one.
START_SECONDS = 300
# A process without a heartbeat for this long is lost. On CPUs its closed connections show it
# earlier; collectives of GPUs wait for this timeout.
HEARTBEAT_SECONDS = 60
# Process 0 may still be writing the model when the others are done.
END_SECONDS = 3600
STOPPED = 143  # exit code 128 + SIGTERM, as a shell reports it
# Words in an error message that show that another process caused the failure.
_REMOTE_FAILURE_WORDS = (
    "gloo",
    "nccl",
    "coordination",
    "unhealthy",
    "peer",
    "unavailable",
    "heartbeat",
)
_RESUME = "run the same command again to resume from the last checkpoint"
_LOST = (
    "another process of this run exited or was lost; the output of that process gives the reason "
    f"if it could write one; {_RESUME}"
)
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_CPU_DEVICES = "jax_num_cpu_devices"


@contextlib.contextmanager
def distributed_session(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """Run the body as one process of a run. Every failure ends in one line and exit code 1.

    `jax.distributed` is initialized only if flags or the cluster specify several processes
    (`detect_cluster`).

    Args:
      coordinator_address: host:port of process 0; None detects it
      num_processes: number of processes; None detects it
      process_id: index of this process; None detects it

    Raises:
      SystemExit: with the error line, if there is one process. One of several processes exits
        immediately instead: waiting for the others could mean waiting for lost processes.
    """
    try:
        spec = detect_cluster(coordinator_address, num_processes, process_id, os.environ)
    except UserError as error:
        sys.exit(f"error: {error}")
    if spec is None:
        with single_process_session():
            yield
        return
    reporter = _ExitReporter(spec.process_id or 0)
    try:
        _initialize(spec)
        reporter.process_id = jax.process_index()
        yield
    except UserError as error:
        if line := _remote_failure(error):
            reporter.exit_with_line(line)
        reporter.exit_with_user_error(str(error))
    except KeyboardInterrupt:
        reporter.exit_now(130)
    except Exception as error:
        if line := _remote_failure(error):
            reporter.exit_with_line(line)
        traceback.print_exc()
        reporter.exit_now(1)


@contextlib.contextmanager
def single_process_session() -> Iterator[None]:
    """Run the body as a single process. A user error or signal ends in one line.

    Raises:
      SystemExit: with the error line, or with the exit code of the signal
    """
    # Outside of training: partial files are removed, and the exit code gives the reason.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)


def _initialize(spec: ProcessSpec) -> None:
    if spec.coordinator_address and spec.process_id:
        _wait_for(spec.coordinator_address)
    # JAX's SIGTERM handler would replace the one of `PreemptionHandler`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *spec,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=END_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the processes cannot connect ({_describe(spec)}): {reason}") from error
    # From here on, only process 0 prints. Gloo writes its connections to file descriptor 1.
    sys.stdout.flush()
    devnull = os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(os.dup(1) if multihost.is_main() else devnull, "w", buffering=1)
    os.dup2(devnull, 1)
    multihost.barrier("initialized")


def _describe(spec: ProcessSpec) -> str:
    address, count, index = spec
    if not address:
        return "detected from the cluster"
    return f"coordinator {address}, process {index} of {count}"


def _wait_for(address: str) -> None:
    """Wait for the port of process 0; JAX would fail here with a traceback."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"no coordinator at {address} after {START_SECONDS} s ({error}); check that "
                    "process 0 is running there and that the port is open"
                ) from error
        time.sleep(0.2)


def _remote_failure(error: BaseException | None) -> str | None:
    """Return the error line if another process caused the failure, else None."""
    while error is not None:
        if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)):
            text = " ".join(str(error).split())
            is_remote = any(word in text.lower() for word in _REMOTE_FAILURE_WORDS)
            if not isinstance(error, UserError) and is_remote:
                return f"{_LOST} ({text[:200]})"
        error = error.__cause__
    return None


class _ExitReporter:
    """Ends one of several processes with one line, without waiting for the others.

    JAX ends a process with SIGABRT when another process is lost, after pages of output, and has no
    hook for Python. Therefore this class reads that output from stderr, and delays the abort until
    the line is written.
    """

    def __init__(self, process_id: int) -> None:
        """Redirect stderr; `process_id` is the index of this process, if it is known yet."""
        self.process_id, self._silent = process_id, False
        self._report_lock = threading.Lock()  # The first thread that reports is the only one.
        self._stderr = os.fdopen(os.dup(2), "w", buffering=1)
        source, sink = os.pipe()
        os.dup2(sink, 2)
        os.close(sink)
        sys.stderr = self._stderr
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        # The handler is sleep(SIGABRT): it delays the abort by six seconds.
        libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
        threading.Thread(target=self._read, args=(source,), daemon=True).start()

    def exit_with_user_error(self, line: str) -> NoReturn:
        """Print a user error that all processes have in common; only process 0 prints it."""
        if self.process_id:
            self._silent = True
            time.sleep(2)  # Process 0 exits first; then this process ends silently.
        self.exit_with_line(line)

    def exit_with_line(self, line: str) -> NoReturn:
        """Print one error line and exit with code 1."""
        with self._report_lock:
            process = f"process {self.process_id}: " if self.process_id else ""
            self._stderr.write(f"error: {process}{line}\n")
            self.exit_now(1)

    def exit_now(self, code: int) -> NoReturn:
        """Exit without the interpreter's shutdown, which would wait for the other processes."""
        sys.stdout.flush()
        self._stderr.flush()
        os._exit(code)

    def _read(self, source: int) -> None:
        message: list[str] = []
        with open(source, errors="replace") as lines:
            for line in lines:
                # Either text starts the message about a lost process; JAX then always aborts.
                if message or "coordination_service" in line or "Terminating process" in line:
                    message.append(line)
                else:
                    self._stderr.write(line)
                if "failure stack trace" in line:
                    if self._silent:
                        self.exit_now(1)
                    self.exit_with_line(lost_process_message("".join(message)))


def lost_process_message(message: str) -> str:
    r"""Summarize in one line the message with which JAX ends a process.

    Example:
      >>> lost_process_message("... unhealthy (stopped sending heartbeats):\n3\nThe tasks")[:20]
      'process 3 was lost: '
    """
    if "RegisterTask" in message:
        return (
            f"not all processes started within {START_SECONDS} s; start --num_processes processes, "
            "all with the same --coordinator_address"
        )
    _, heartbeat_lost, after = message.partition("(stopped sending heartbeats):")
    if heartbeat_lost:
        processes = ", ".join(after.split("The tasks")[0].split())
        return f"process {processes} was lost: no heartbeat for {HEARTBEAT_SECONDS} s; {_RESUME}"
    if "Failed to send RPC" in message:
        return f"process 0 exited or was lost; {_RESUME}"
    return _LOST


class ProcessSpec(NamedTuple):
    """One of several processes; `jax.distributed` detects fields that are None.

    Attributes:
      coordinator_address: host:port of process 0, the same for all processes
      num_processes: number of processes
      process_id: index of this process, 0 to num_processes - 1
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
    """Return the spec of this process, or None if it is the only process.

    Precedence: flags; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; SLURM, Open
    MPI, an indexed Kubernetes job (process id only) and Cloud TPU.

    Args:
      coordinator_address: value of --coordinator_address, or None
      num_processes: value of --num_processes, or None
      process_id: value of --process_id, or None
      environ: environment variables

    Raises:
      UserError: if the values are incomplete or invalid

    Example:
      >>> detect_cluster(None, None, None, {}) is None
      True
      >>> detect_cluster("node0:1234", 2, 1, {})
      ProcessSpec(coordinator_address='node0:1234', num_processes=2, process_id=1)
      >>> slurm = {"SLURM_STEP_NODELIST": "node[0-3]", "SLURM_NTASKS": "4"}
      >>> detect_cluster(None, None, None, slurm)
      ProcessSpec(coordinator_address=None, num_processes=None, process_id=None)
    """
    address = coordinator_address or environ.get("JAX_COORDINATOR_ADDRESS") or None
    if num_processes is None:
        num_processes = _int_variable("JAX_NUM_PROCESSES", environ)
    if process_id is None:
        process_id = _int_variable("JAX_PROCESS_ID", environ)
    scheduled = _is_scheduled(environ)
    if address is None and num_processes is None and process_id is None:
        return ProcessSpec() if scheduled or _tpu_hosts(environ) > 1 else None
    if process_id is None and not scheduled:
        process_id = _int_variable("JOB_COMPLETION_INDEX", environ)
    spec = ProcessSpec(address, num_processes, process_id)
    if num_processes == 1 and not process_id:
        return None
    missing = [f"--{name}" for name, value in spec._asdict().items() if value is None]
    if missing and not scheduled:
        raise UserError(
            f"{' and '.join(missing)} missing: several processes need --coordinator_address="
            "HOST:PORT, --num_processes and --process_id, or the JAX_... variables of these names"
        )
    _check(spec)
    return spec


def _check(spec: ProcessSpec) -> None:
    address, count, index = spec
    host, _, port = (address or "host:1").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator_address={address}: write HOST:PORT, for example node0:1234")
    if count is not None and count < 1:
        raise UserError(f"--num_processes={count}: it must be at least 1")
    if index is not None and not 0 <= index < (count or index + 1):
        valid = ">= 0" if count is None else f"0 to {count - 1}, with --num_processes={count}"
        raise UserError(f"--process_id={index}: it must be {valid}")


def _is_scheduled(environ: Mapping[str, str]) -> bool:
    """Return whether `srun` or `mpirun` started several processes, detected as in JAX."""
    if "SLURM_STEP_NODELIST" in environ:
        return (_int_variable("SLURM_NTASKS", environ) or 1) > 1
    if "OMPI_MCA_orte_hnp_uri" in environ:
        return (_int_variable("OMPI_COMM_WORLD_SIZE", environ) or 1) > 1
    return False


def _tpu_hosts(environ: Mapping[str, str], query: Callable[[str], str] | None = None) -> int:
    """Return the number of hosts of the Cloud TPU slices of this machine; 0 if it is in none."""
    on_tpu = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if query is None and (not on_tpu or importlib.util.find_spec("libtpu") is None):
        return 0
    slices = _int_variable("MEGASCALE_NUM_SLICES", environ) or 1
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if names is None and "TPU_SKIP_MDS_QUERY" not in environ:
        names = (query or _query_metadata)("worker-network-endpoints")
    return slices * len(names.split(",")) if names else 0


def _query_metadata(name: str) -> str:
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""  # not on Google Cloud


def _int_variable(name: str, environ: Mapping[str, str]) -> int | None:
    text = environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdigit():
        raise UserError(f"{name}={text!r} in the environment: it must be a number")
    return int(text)


class PreemptionHandler:
    """Turn SIGTERM and Ctrl-C into a request that the training loop honors after a save.

    A signal that the process was started to ignore remains ignored, as a shell's background job
    ignores Ctrl-C.

    Attributes:
      requested: whether this process received a signal; a second Ctrl-C stops immediately
    """

    def __init__(self) -> None:
        """Create the handler; `with` installs it."""
        self.requested = False
        self._pending_flag: jax.Array | None = None
        self._stopping = False
        self._signal = signal.SIGTERM

    def should_stop(self, step: int) -> bool:
        """Return whether to save and stop after `step`; the same on every process.

        A signal to any process is sufficient. With several processes, the stop is one call late:
        each call sends this process's flag and reads the flags that all processes sent at the
        previous call, so that no step waits.

        Args:
          step: the step that was just done; all processes must call this at the same steps
        """
        if jax.process_count() == 1:
            self._stopping = self.requested
        else:
            previous, self._pending_flag = self._pending_flag, multihost.any_process(self.requested)
            self._stopping = previous is not None and bool(previous)
        return self._stopping

    def __enter__(self) -> PreemptionHandler:
        self._previous_handlers = {}
        for kind in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(kind) is not signal.SIG_IGN:
                self._previous_handlers[kind] = signal.signal(kind, self._request)
        return self

    def _request(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self._signal = True, number

    def __exit__(self, error, *_) -> None:
        for kind, handler in self._previous_handlers.items():
            signal.signal(kind, handler)
        # The signal came after the last step: pass it on to the previous handler.
        if self.requested and not self._stopping and error is None:
            signal.raise_signal(self._signal)


def set_cpu_devices(config: ConfigDict) -> None:
    """Create CPU devices: one per replica, up to the number of cores.

    Nothing changes if the number of devices is already set (`XLA_FLAGS`, `JAX_NUM_CPU_DEVICES`), if
    the replicas run one after the other, if there are several processes, or if JAX is already
    initialized. Accelerators are not affected.

    Args:
      config: options of the run
    """
    if cpu_devices_are_set() or config.compute.replica_mode == "map":
        return
    simulate_cpu_devices(num_cpu_devices(config.num_replicas, usable_cores()))


def cpu_devices_are_set() -> bool:
    """Return whether the user, or a cluster, has set the number of CPU devices."""
    return (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or getattr(jax.config, _CPU_DEVICES) > 0
        or jax.distributed.is_initialized()
    )


def simulate_cpu_devices(number: int) -> None:
    """Create this number of CPU devices, unless JAX is already initialized.

    Args:
      number: number of devices
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update(_CPU_DEVICES, number)


def num_cpu_devices(num_replicas: int, cores: int) -> int:
    """Return the largest divisor of the number of replicas up to the cores; no batch is split.

    Example:
      >>> [num_cpu_devices(2, 1), num_cpu_devices(2, 64)]
      [1, 2]
      >>> [num_cpu_devices(3, 2), num_cpu_devices(4, 3)]
      [1, 2]
    """
    return max(d for d in range(1, cores + 1) if num_replicas % d == 0)
