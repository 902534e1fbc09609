"""Things that take turns under the clock, and their figures on paper; needs no package."""

from __future__ import annotations

import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path


def take_turns(
    ways: dict[str, Callable[[int], None]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds a call of each way, one number a round.

    The ways follow each other, in another order each round, so that what else the machine does
    falls on all alike. A turn is as many calls as take `seconds`.

    Args:
      ways: name -> function of a number of calls, which returns when all of them are done.
      rounds: how often each has its turn.
      seconds: the least time of a turn.
    """
    calls = {}
    for name, run in ways.items():
        run(1)  # Compiles, and takes its memory.
        calls[name] = max(1, math.ceil(seconds / max(_clocked(run, 1), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(_clocked(ways[name], calls[name]) / calls[name])
    return found


def _clocked(run: Callable[[int], None], count: int) -> float:
    began = time.perf_counter()
    run(count)
    return time.perf_counter() - began


def ratio(times: Iterable[float], others: Iterable[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: the keys of the first row are the header; all but names are to the right."""
    names = list(rows[0])
    aligned = ["---" if i == 0 else "---:" for i in range(len(names))]
    lines = [names, aligned, *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(device: str, packages: Iterable[str]) -> dict[str, object]:
    """What a figure depends on: machine, versions, command."""
    return {
        "device": device,
        "host": f"{_processor()}, {platform.system()}",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        "command": shlex.join(["python", *sys.argv]),
    }


def _processor() -> str:
    """The processor's name: `platform.processor` has none on most Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(named)} x {named[0]}" if named else platform.machine()


def keep(path: Path | None, results: dict) -> None:
    """Writes the JSON, where one is asked for."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")
