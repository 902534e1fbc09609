"""Measure functions in turns, and format the results; needs no other package."""

from __future__ import annotations

import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

STAGES = ("trace", "lower", "compile")
Seconds = dict[str, float]  # {"cpu": ..., "wall": ...}


def take_turns(
    variants: dict[str, Callable[[int], None]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Return the seconds per call of each variant, one value per round.

    The variants run in turns, in a different order each round, so that other load affects all of
    them equally. A turn has as many calls as take at least `seconds`.

    Args:
      variants: name -> function of a number of calls that returns when all of them are done
      rounds: number of turns of each variant
      seconds: minimum time of a turn
    """
    calls = {}
    for name, run in variants.items():
        run(1)  # Compiles, and allocates its memory.
        calls[name] = max(1, math.ceil(seconds / max(_seconds(run, 1), 1e-9)))
    per_call: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in order(variants, number):
            per_call[name].append(_seconds(variants[name], calls[name]) / calls[name])
    return per_call


def order(names: Iterable[str], number: int) -> list[str]:
    """Return the order of the variants in a round."""
    names = list(names)
    first = number % len(names)
    return names[first:] + names[:first]


def _seconds(run: Callable[[int], None], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


def ratio(times: Iterable[float], others: Iterable[float]) -> float:
    """Return the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def timed(run: Callable[[], Any]) -> tuple[Any, Seconds]:
    """Return the result of a function, and the seconds of all threads of this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = run()
    return result, {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def in_new_process(function: Callable, *arguments: Any, initializer: Callable | None = None) -> Any:
    """Return the result of a function of a module, called in a new Python process.

    Args:
      function: function of a module
      *arguments: its arguments
      initializer: function that the process calls first
    """
    with ProcessPoolExecutor(1, get_context("spawn"), initializer) as pool:
        return pool.submit(function, *arguments).result()


def compile_stages(jitted, *arguments) -> tuple[Any, dict[str, Seconds]]:
    """Trace, lower and compile a jitted function; return the program and {stage: seconds}.

    Args:
      jitted: result of `jax.jit`
      *arguments: its arguments or their shapes
    """
    traced, trace = timed(lambda: jitted.trace(*arguments))
    lowered, lower = timed(traced.lower)
    compiled, compile_ = timed(lowered.compile)
    return compiled, {"trace": trace, "lower": lower, "compile": compile_}


def table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table; the keys of the first row are its headings."""
    names = list(rows[0])
    alignment = ["---" if i == 0 else "---:" for i in range(len(names))]
    cells = ([str(row[name]).replace("|", "/") for name in names] for row in rows)
    lines = [names, alignment, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conditions(device: str, packages: Iterable[str]) -> dict[str, object]:
    """Return the device, host, versions and command of a result."""
    return {
        "device": device,
        "host": f"{_processor()}, {platform.system()}",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        "command": shlex.join(["python", *sys.argv]),
    }


def _processor() -> str:
    """Return the processor's name, which `platform.processor` lacks on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.machine()


def write_json(path: Path | None, results: dict) -> None:
    """Write the JSON file, if a path is passed."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")
