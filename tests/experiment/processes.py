"""Start several processes of one run on this machine, connected by Gloo."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence

from tests.experiment.small_run import ROOT, cpu_environment


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(
    count: int,
    *args: str,
    program: Sequence[str] = ("launch.py",),
    devices: int = 1,
    each: Sequence[Sequence[str]] = (),
) -> list[subprocess.Popen]:
    """Start `python PROGRAM ARGS` as `count` processes with `devices` devices each.

    Args:
      count: number of processes
      *args: arguments of all processes
      program: program with launch.py's flags for a process
      devices: CPU devices per process
      each: further arguments of each process
    """
    env = cpu_environment(f"--xla_force_host_platform_device_count={devices}")
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [
                sys.executable,
                *program,
                f"--coordinator_address={address}",
                f"--num_processes={count}",
                f"--process_id={number}",
                *args,
                *(each[number] if each else ()),
            ],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def finish(
    processes: Sequence[subprocess.Popen], timeout: float = 500
) -> list[tuple[int, str, str]]:
    """Wait for all processes; return (exit code, stdout, stderr) of each."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, outputs, strict=True)]


def run(count: int, *args: str, **options) -> list[tuple[int, str, str]]:
    """Start `count` processes and wait for their end."""
    return finish(start(count, *args, **options))
