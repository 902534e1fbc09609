"""Runs that are killed at random instants, over and over, and must end as if they never were.

`make kill-test` starts a short run of glyphs as a process of its own, sends it SIGKILL inside a
phase that its timeline says is open, starts it again, and so on; when all is done, the weights,
the results and the metrics must be those of a run that nothing interrupted, byte for byte.
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

# Of so many kills, at least so many each lie inside these; the others inside training.
PHASES = ("save", "merge", "evaluate", "export")
SHARE = 0.15
STEPS = 2 * small_run.STEPS_PER_EPOCH
# A life that is not killed ends by itself; one that takes longer than this hangs.
LIFE_SECONDS = 400


class Life:
    """One process of a run, and the phases that its timeline says are open."""

    def __init__(self, arguments: list[str], workdir: Path) -> None:
        self._path = workdir / "timeline.jsonl"
        self._read = self._path.stat().st_size if self._path.exists() else 0
        self._part = b""
        self.open: Counter[str] = Counter()
        self._last: dict | None = None
        self._restores = 0
        self._states = [workdir / f"runs/seed_0/{arm}/state" for arm in ("unmerged", "merged")]
        self.process: Popen = small_run.start(*arguments)

    def events(self) -> list[dict]:
        """Lines that have come since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        self._read += len(text)
        *lines, self._part = (self._part + text).split(b"\n")
        entries = [json.loads(line) for line in lines if line]
        for entry in entries:
            self.open[entry["phase"]] += 1 if entry["event"] == "begin" else -1
            self._restores += (entry["phase"], entry["event"]) == ("restore", "end")
            self._last = entry
        return entries

    def inside(self) -> set[str]:
        """The phases that have begun and not ended."""
        return {phase for phase, count in self.open.items() if count > 0}

    def trains(self) -> bool:
        """Whether steps run and nothing else does; after the last of an arm they do not."""
        if self.inside() or self._last is None:
            return False
        if self._last["phase"] in ("merge", "save"):
            return self._last["step"] < STEPS
        # The unmerged arm is restored first, and where it is finished it trains no more.
        done = [(states / str(STEPS)).exists() for states in self._states]
        going_on = not done[0] or (not done[1] and self._restores > 1)
        return self._last["phase"] == "restore" and going_on

    def kill(self) -> set[str]:
        """SIGKILL; what it was inside of by the last line that it wrote."""
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()
        self.events()
        return self.inside()


class Series:
    """Kills of one kind of run, counted by phase.

    Args:
      scratch: where the pretrained model and every workdir lie.
      seed: of the instants.
    """

    def __init__(self, scratch: Path, seed: int) -> None:
        self.kills: Counter[str] = Counter()
        self.failures: list[str] = []
        self._scratch, self._random = scratch, random.Random(seed)
        self._anchor = small_run.save_anchor(scratch / "clip")
        # The last ones: the first run compiles, and what else the machine does changes.
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=9))
        self._whole = scratch / "whole"
        code, output = small_run.finish(*self.arguments(self._whole))
        if code:
            raise RuntimeError(output)
        self._learn(read_timeline(self._whole / "timeline.jsonl"), {})

    def until(self, wanted: Counter[str], jobs: int = 1) -> None:
        """Runs from the start to the end, with kills on the way, until there are so many.

        Args:
          wanted: kills of each phase.
          jobs: runs at a time.
        """
        numbers = itertools.count(1)

        def work(_) -> None:
            while any(self.kills[phase] < count for phase, count in wanted.items()):
                self._run(next(numbers), wanted)

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, range(jobs)))

    def start(self, workdir: Path) -> Life:
        """One process of the run in `workdir`."""
        return Life(self.arguments(workdir), workdir)

    def arguments(self, workdir: Path) -> list[str]:
        """Of the command that is started again and again."""
        return small_run.arguments(self._anchor, workdir)

    def _run(self, number: int, wanted: Counter[str]) -> None:
        workdir = self._scratch / f"run_{number}"
        self._one(workdir, wanted)
        different = [f"run {number}: {text}" for text in self.differences(workdir)]
        self.failures += different
        same = "DIFFERENT from" if different else "equal to"
        print(f"run {number} ended {same} the whole one; {self.count()}", flush=True)
        shutil.rmtree(workdir)

    def count(self) -> str:
        """The kills so far, by phase."""
        parts = ", ".join(f"{count} in {phase}" for phase, count in sorted(self.kills.items()))
        return f"{self.kills.total()} kills so far: {parts}"

    def _one(self, workdir: Path, wanted: Counter[str]) -> None:
        while True:
            life = self.start(workdir)
            killed = self._kill_somewhere(life, wanted)
            if not killed:
                output, _ = life.process.communicate()
                if life.process.returncode:
                    self.failures.append(f"exit code {life.process.returncode}:\n{output}")
                return

    def _kill_somewhere(self, life: Life, wanted: Counter[str]) -> bool:
        """Whether the life was killed; it has ended by itself otherwise."""
        deadline, instant, aim = time.monotonic() + LIFE_SECONDS, None, ""
        begun: dict[tuple[str, int | None], float] = {}
        while life.process.poll() is None:
            if time.monotonic() > deadline:
                life.kill()
                self.failures.append("a process hung")
                return True
            new = life.events()
            self._learn(new, begun)
            for entry in new:
                candidate = entry["phase"] if entry["event"] == "begin" else "train"
                if candidate == "train" and not life.trains():
                    continue
                lacks = self.kills[candidate] < wanted[candidate]
                # Training goes on for long: not every chance is taken, so that the run gets on.
                if instant is None and lacks and self._random.random() < 0.7:
                    seconds = statistics.median(self._seconds[candidate] or [0.2])
                    instant = time.monotonic() + self._random.uniform(0, seconds)
                    aim = candidate
            if instant is not None:
                still = aim in life.inside() if aim != "train" else life.trains()
                if not still:
                    instant = None  # It has passed: the next one.
                elif time.monotonic() >= instant:
                    inside = life.kill()
                    trains = aim == "train" and life.trains()
                    hit = aim if aim in inside or trains else "between"
                    self.kills[hit] += 1
                    return True
            time.sleep(0.0005)
        life.events()
        return False

    def _learn(self, entries: Iterable[dict], begun: dict[tuple[str, int | None], float]) -> None:
        """How long each phase takes; `begun` holds those that have not ended."""
        for entry in entries:
            key = (entry["phase"], entry["step"])
            if entry["event"] == "begin":
                begun[key] = entry["time"]
            elif key in begun:
                self._seconds[entry["phase"]].append(entry["time"] - begun.pop(key))

    def differences(self, workdir: Path) -> list[str]:
        """The files of a finished run that are not those of the uninterrupted one."""
        names = ["results.json", "metrics.jsonl"]
        names += [path.relative_to(self._whole).as_posix() for path in self._weights()]
        return [
            f"{name} differs"
            for name in names
            if not (workdir / name).exists()
            or (workdir / name).read_bytes() != (self._whole / name).read_bytes()
        ]

    def _weights(self) -> list[Path]:
        found = sorted(self._whole.glob("model/*.safetensors"))
        assert found, "the run that nothing interrupted has no merged weights"
        return found


def wanted(kills: int) -> Counter[str]:
    """So many kills in all, `SHARE` of them at least in each of `PHASES`."""
    each = math.ceil(SHARE * kills)
    return Counter({phase: each for phase in PHASES} | {"train": kills - each * len(PHASES)})


def main() -> None:
    """The kills of `make kill-test`; exits by an error where a run ended differently."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_test_") as scratch:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{scratch}/xla")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        began = time.monotonic()
        series = Series(Path(scratch), options.seed)
        series.until(wanted(options.kills), options.jobs)
        print(f"{time.monotonic() - began:.0f} s; {series.count()}")
        if series.failures:
            raise SystemExit("\n".join(series.failures))
        print("every run ended with the weights, results and metrics of the uninterrupted one")


if __name__ == "__main__":
    main()
