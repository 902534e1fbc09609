"""Runs that are killed repeatedly at random times and must give the same result.

`make kill-test` starts a short run on the synthetic benchmark in a separate process, sends SIGKILL
during a phase that is open in its timeline, starts it again, and so on. At the end, weights,
results and metrics must be bitwise identical to those of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen

from modelstock_jax.reporting.timeline import read_timeline
from tests.experiment import small_run

# At least MIN_FRACTION of the kills are in each of these phases, the others in training.
PHASES = ("save", "merge", "evaluate", "export")
MIN_FRACTION = 0.15
STEPS = 2 * small_run.STEPS_PER_EPOCH
# A process that runs longer than this hangs.
TIMEOUT_SECONDS = 400


class RunProcess:
    """One process of a run, and the open phases of its timeline."""

    def __init__(self, arguments: list[str], workdir: Path) -> None:
        self._path = workdir / "timeline.jsonl"
        self._offset = self._path.stat().st_size if self._path.exists() else 0
        self._partial_line = b""
        self.open: Counter[str] = Counter()
        self._last: dict | None = None
        self._restores = 0
        self._states = [workdir / f"runs/seed_0/{arm}/state" for arm in ("unmerged", "merged")]
        self.process: Popen = small_run.start(*arguments)

    def events(self) -> list[dict]:
        """Return the timeline entries since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        self._offset += len(text)
        *lines, self._partial_line = (self._partial_line + text).split(b"\n")
        entries = [json.loads(line) for line in lines if line]
        for entry in entries:
            self.open[entry["phase"]] += 1 if entry["event"] == "begin" else -1
            self._restores += (entry["phase"], entry["event"]) == ("restore", "end")
            self._last = entry
        return entries

    def open_phases(self) -> set[str]:
        """Return the phases that have begun and not ended."""
        return {phase for phase, count in self.open.items() if count > 0}

    def is_training(self) -> bool:
        """Return whether train steps are running and no other phase is open."""
        if self.open_phases() or self._last is None:
            return False
        if self._last["phase"] in ("merge", "save"):
            return self._last["step"] < STEPS
        # The run without merging is restored first. If it is finished, it does not train.
        done = [(states / str(STEPS)).exists() for states in self._states]
        continues = not done[0] or (not done[1] and self._restores > 1)
        return self._last["phase"] == "restore" and continues

    def kill(self) -> set[str]:
        """Send SIGKILL. Return the phases that were open in the last timeline entry."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        self.events()
        return self.open_phases()


class KillSeries:
    """Kills of one kind of run, counted by phase.

    Args:
      scratch: directory of the pretrained model and all workdirs
      seed: seed of the times of the kills
    """

    def __init__(self, scratch: Path, seed: int) -> None:
        self.kills: Counter[str] = Counter()
        self.failures: list[str] = []
        self._scratch, self._random = scratch, random.Random(seed)
        self._anchor = small_run.save_anchor(scratch / "clip")
        # Only recent durations: the first run compiles, and the load of the machine changes.
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=9))
        self._uninterrupted = scratch / "uninterrupted"
        code, output = small_run.finish(*self.arguments(self._uninterrupted))
        if code:
            raise RuntimeError(output)
        self._record_durations(read_timeline(self._uninterrupted / "timeline.jsonl"), {})

    def until(self, wanted: Counter[str], jobs: int = 1) -> None:
        """Repeat complete runs with kills, until there are enough kills of each phase.

        Args:
          wanted: number of kills per phase
          jobs: number of runs in parallel
        """
        numbers = itertools.count(1)

        def work(_) -> None:
            while any(self.kills[phase] < count for phase, count in wanted.items()):
                self._run(next(numbers), wanted)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, range(jobs)))

    def start(self, workdir: Path) -> RunProcess:
        """Start a process of the run in `workdir`."""
        return RunProcess(self.arguments(workdir), workdir)

    def arguments(self, workdir: Path) -> list[str]:
        """Return the arguments of the command that is repeated."""
        return small_run.arguments(self._anchor, workdir)

    def _run(self, number: int, wanted: Counter[str]) -> None:
        workdir = self._scratch / f"run_{number}"
        self._run_to_end(workdir, wanted)
        different = [f"run {number}: {text}" for text in self.differences(workdir)]
        self.failures += different
        result = "DIFFERENT from" if different else "equal to"
        print(f"run {number} is {result} the uninterrupted run; {self.summary()}", flush=True)
        shutil.rmtree(workdir)

    def summary(self) -> str:
        """Return the number of kills so far, by phase."""
        parts = ", ".join(f"{count} in {phase}" for phase, count in sorted(self.kills.items()))
        return f"{self.kills.total()} kills so far: {parts}"

    def _run_to_end(self, workdir: Path, wanted: Counter[str]) -> None:
        while True:
            run = self.start(workdir)
            killed = self._kill_at_random(run, wanted)
            if not killed:
                output, _ = run.process.communicate()
                if run.process.returncode:
                    self.failures.append(f"exit code {run.process.returncode}:\n{output}")
                return

    def _kill_at_random(self, run: RunProcess, wanted: Counter[str]) -> bool:
        """Return whether the process was killed; otherwise it has ended by itself."""
        deadline, kill_time, target = time.monotonic() + TIMEOUT_SECONDS, None, ""
        begun: dict[tuple[str, int | None], float] = {}
        while run.process.poll() is None:
            if time.monotonic() > deadline:
                run.kill()
                self.failures.append("a process hung")
                return True
            entries = run.events()
            self._record_durations(entries, begun)
            for entry in entries:
                phase = entry["phase"] if entry["event"] == "begin" else "train"
                if phase == "train" and not run.is_training():
                    continue
                needed = self.kills[phase] < wanted[phase]
                # Skip some opportunities, so that the run makes progress.
                if kill_time is None and needed and self._random.random() < 0.7:
                    seconds = statistics.median(self._seconds[phase] or [0.2])
                    kill_time = time.monotonic() + self._random.uniform(0, seconds)
                    target = phase
            if kill_time is not None:
                is_open = target in run.open_phases() if target != "train" else run.is_training()
                if not is_open:
                    kill_time = None  # The phase has ended: wait for the next one.
                elif time.monotonic() >= kill_time:
                    open_phases = run.kill()
                    was_training = target == "train" and run.is_training()
                    hit = target if target in open_phases or was_training else "between"
                    self.kills[hit] += 1
                    return True
            time.sleep(0.0005)
        run.events()
        return False

    def _record_durations(
        self, entries: Iterable[dict], begun: dict[tuple[str, int | None], float]
    ) -> None:
        """Record the duration of each phase; `begun` contains the phases that have not ended."""
        for entry in entries:
            key = (entry["phase"], entry["step"])
            if entry["event"] == "begin":
                begun[key] = entry["time"]
            elif key in begun:
                self._seconds[entry["phase"]].append(entry["time"] - begun.pop(key))

    def differences(self, workdir: Path) -> list[str]:
        """Return the files of a finished run that differ from those of the uninterrupted run."""
        names = ["results.json", "metrics.jsonl"]
        names += [path.relative_to(self._uninterrupted).as_posix() for path in self._weights()]
        return [
            f"{name} differs"
            for name in names
            if not (workdir / name).exists()
            or (workdir / name).read_bytes() != (self._uninterrupted / name).read_bytes()
        ]

    def _weights(self) -> list[Path]:
        paths = sorted(self._uninterrupted.glob("model/*.safetensors"))
        assert paths, "the uninterrupted run has no merged weights"
        return paths


def kills_per_phase(kills: int) -> Counter[str]:
    """Distribute kills over the phases: at least `MIN_FRACTION` of them in each of `PHASES`."""
    each = math.ceil(MIN_FRACTION * kills)
    return Counter({phase: each for phase in PHASES} | {"train": kills - each * len(PHASES)})


def main() -> None:
    """Run `make kill-test`; exit with an error if the result of a run differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of kills (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their times (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs in parallel (default: 2)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_test_") as scratch:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/xla")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        start = time.monotonic()
        series = KillSeries(Path(scratch), options.seed)
        series.until(kills_per_phase(options.kills), options.jobs)
        print(f"{time.monotonic() - start:.0f} s; {series.summary()}")
        if series.failures:
            raise SystemExit("\n".join(series.failures))
        print("all runs have the weights, results and metrics of the uninterrupted run")


if __name__ == "__main__":
    main()
