"""Check and measure everything on this machine's GPU, in at most eight minutes.

    make gpu                                             # everything
    make gpu ARGS="--parts b16 torch --limit 200"        # only these parts
    make gpu ARGS=--rehearse                             # tiny sizes, on a CPU
    make gpu-wheels                                      # with a network: packages for `make gpu`

Each part is a separate process (gpu_parts.py) with a time limit, in order of priority. Its results
are stored when it ends, and those of a part that is stopped at its limit are kept. A part that
fails is reported with its last error line, and the next part starts.

Writes `benchmarks/results/gpu_DEVICE.json` with all values, and `gpu_DEVICE.md` with the tables.
Needs jax, flax, optax, orbax, numpy, safetensors and, for the comparison, torch. All other packages
are installed from `benchmarks/wheels` if they are missing; no network is used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import gpu_tables, gpu_wheels  # noqa: E402
from modelstock_jax.fileio import write_json, write_text  # noqa: E402

LIMIT = 480.0  # seconds
# A part needs this long to import jax and to start the device.
MIN_SECONDS = 10.0
# Signals that stop a part: at its limit, and 3 s later if it is still running.
STOP, KILL_AFTER = signal.SIGTERM, 3.0


class Part(NamedTuple):
    """A part of the measurement.

    Attributes:
      name: key of the results
      seconds: time limit, for a total limit of `LIMIT`
      function: name of its function in gpu_parts.py; "" is `name`
      xla_flags: options of XLA, which it reads when a process starts
    """

    name: str
    seconds: float
    function: str = ""
    xla_flags: str = ""


# The limits add up to more than `LIMIT`: few parts need all of their time.
PARTS = (
    Part("device", 40),
    Part("correct", 100),
    Part("glyphs", 60),
    Part("b16", 80),
    Part("l14", 95),
    Part("b32", 55),
    Part("merge", 35),
    Part("input", 50),
    Part("torch", 85),
    Part("variants", 70),
    *(
        Part(f"XLA: {name}", 60, "flags", flag)
        for name, flag in (
            ("no Triton products", "--xla_gpu_enable_triton_gemm=false"),
            ("no command buffers", "--xla_gpu_enable_command_buffer="),
            ("latency hiding", "--xla_gpu_enable_latency_hiding_scheduler=true"),
            ("exhaustive tiling search", "--xla_gpu_exhaustive_tiling_search=true"),
        )
    ),
)
NAMES = [part.name for part in PARTS]


class Measurement:
    """The results of all parts, stored after each of them."""

    def __init__(self, args: argparse.Namespace, workdir: Path) -> None:
        self._args, self.workdir, self._start = args, workdir, time.monotonic()
        self.results: dict[str, Any] = {
            "command": shlex.join(["python", *sys.argv]),
            "rehearsal": args.rehearse,
            "limit": args.limit,
            "parts": {},
        }

    @property
    def seconds_left(self) -> float:
        """Seconds until the total limit."""
        return self._args.limit - (time.monotonic() - self._start)

    def run(self, part: Part, environment: Mapping[str, str]) -> dict[str, Any]:
        """Run a part in this environment; return its record."""
        limit = min(part.seconds * self._args.limit / LIMIT, self.seconds_left)
        record: dict[str, Any] = {"status": "skipped", "error": "no time left"}
        if limit >= min(MIN_SECONDS, part.seconds):
            flags = f"{environment.get('XLA_FLAGS', '')} {part.xla_flags}".strip()
            record = run_process(
                self.command(part, limit), self.workdir / part.name, limit,
                {**environment, "XLA_FLAGS": flags},
            )  # fmt: skip
        self.results["parts"][part.name] = record
        return record

    def command(self, part: Part, limit: float) -> list[str]:
        """Return the command of a part's process."""
        rehearse = ["--rehearse"] if self._args.rehearse else []
        return [
            sys.executable, str(Path(__file__).with_name("gpu_parts.py")),
            part.function or part.name, "--json", str(self.workdir / f"{part.name}.json"),
            "--seconds", f"{limit:.0f}", "--torch", self._args.torch, *rehearse,
        ]  # fmt: skip

    def save(self) -> None:
        """Write the JSON file and the tables."""
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.results)
        write_text(path.with_suffix(".md"), gpu_tables.document(self.results))

    @property
    def path(self) -> Path:
        """The JSON file: --json, or a name with the name of the device."""
        if self._args.json:
            return self._args.json
        if self._args.rehearse:
            return ROOT / "runs/gpu_rehearsal.json"
        slug = re.sub(r"[^a-z0-9]+", "_", gpu_tables.device_name(self.results).lower()).strip("_")
        return ROOT / f"benchmarks/results/gpu_{slug}.json"


def run_process(
    command: list[str], results: Path, limit: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Run a part's process, and stop it at its limit.

    Args:
      command: its command
      results: path of its results without the suffix .json; its output is stored next to them
      limit: seconds
      environment: all variables of the process

    Returns:
      "status": "done", "failed", "cut off" or "skipped"; "seconds"; "error" and the end of the
      output, if it is not done; "results", which it stored until then
    """
    start, log = time.monotonic(), results.with_suffix(".log")
    with log.open("w") as output, started(command, output, environment) as process:
        try:
            status = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            status = "cut off"
    record: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "done":
        lines = log.read_text(errors="replace").strip().splitlines()
        record["error"] = lines[-1] if lines else f"exit code {process.returncode}"
        record["output"] = lines[-30:]
    if status == "cut off":
        record["error"] = f"stopped at its limit of {limit:.0f} s"
    with contextlib.suppress(FileNotFoundError):
        record["results"] = json.loads(results.with_suffix(".json").read_text())
        if reason := record["results"].get("skipped"):
            record |= {"status": "skipped", "error": reason}
    return record


@contextlib.contextmanager
def started(command, output, environment) -> Iterator[subprocess.Popen]:
    """Start a process and, at the end, stop it and all processes that it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(environment), stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        for number in (STOP, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_AFTER)


def part_environment(args: argparse.Namespace, workdir: Path) -> dict[str, str]:
    """Return the environment of the parts, with the packages that this interpreter lacks."""
    defaults = {
        # Memory is allocated as needed, so that the allocator's peak is that of the measurement.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Otherwise the last line of an error is a note about frames that were removed.
        "JAX_TRACEBACK_FILTERING": "off",
    }
    environment = defaults | os.environ | {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    # A program that two parts need is compiled once, but no program is one of an earlier run: its
    # compilation is measured.
    programs = {"JAX_COMPILATION_CACHE_DIR": str(workdir / "programs")}
    if args.rehearse:
        environment = programs | environment | {"JAX_PLATFORMS": "cpu"}
    else:
        environment |= programs
        platforms = environment.get("JAX_PLATFORMS", "")
        if platforms and "cpu" not in platforms.split(","):  # The checks compare with the CPU.
            environment["JAX_PLATFORMS"] = f"{platforms},cpu"
    packages = gpu_wheels.install_missing(workdir / "packages")
    paths = [str(path) for path in (packages, ROOT) if path]
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [*paths, os.environ.get("PYTHONPATH")])
    )
    return environment


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", nargs="+", default=NAMES, choices=NAMES, metavar="PART",
        help=f"parts to run, of {', '.join(NAMES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="total time in seconds (default: 480)"
    )
    parser.add_argument("--rehearse", action="store_true", help="run tiny sizes on the CPU")
    parser.add_argument(
        "--torch", default=sys.executable, help="interpreter with torch (default: this)"
    )
    parser.add_argument(
        "--json", type=Path,
        help="output file; the tables are stored next to it (default: results/gpu_DEVICE.json)",
    )  # fmt: skip
    return parser.parse_args(argv)


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)  # The part in progress is stopped, and the results remain.


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit)
    with tempfile.TemporaryDirectory() as directory:
        measurement = Measurement(args, Path(directory))
        environment = part_environment(args, measurement.workdir)
        for part in PARTS:
            # The files have the name of the device, and most tables its peaks.
            if part.name not in ("device", *args.parts):
                continue
            record = measurement.run(part, environment)
            if part.name == "device" and record["status"] == "failed":
                sys.exit(record["error"])
            measurement.save()
            print(gpu_tables.progress(part.name, record), flush=True)
        print(gpu_tables.document(measurement.results))
        print(f"results in {measurement.path} and {measurement.path.with_suffix('.md').name}")
        if problems := gpu_tables.problems(measurement.results):
            sys.exit(f"error: {'; '.join(problems)}")


if __name__ == "__main__":
    main()
