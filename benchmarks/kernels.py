"""Time of a program by kind of kernel, from a trace of `jax.profiler`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

# The first pattern that a kernel's name contains determines its kind.
KINDS = {
    "attention": r"fmha|flash|sdpa|attention",
    "matrix product": r"gemm|nvjet|cutlass|cublas|xmma|wgmma|\bdot\b|dot_|_dot|matmul",
    "reduction": r"reduce|softmax|norm|argmax",
    "copy and layout": r"copy|memcpy|memset|transpose|concatenate|slice|broadcast|\bpad|_pad",
    "elementwise": r"fusion|wrapped|loop|convert|multiply|add|select",
}


def kind_of(name: str) -> str:
    """Return the kind of a kernel.

    Example:
      >>> kind_of("nvjet_hsh_256x128_64x4_2x1"), kind_of("loop_multiply_fusion_3")
      ('matrix product', 'elementwise')
    """
    kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))
    return next(kinds, "other")


def breakdown(directory: Path, steps: int) -> dict[str, Any]:
    """Return seconds per step by kind of kernel.

    Args:
      directory: output of `jax.profiler.trace`
      steps: number of steps in it

    Returns:
      "kinds": {kind: seconds}; "slowest": {kind: name of its slowest kernel}; "seconds" from the
      first kernel to the last; "idle", the part of them in which no kernel runs; "kernels", the ten
      slowest as [name, seconds]
    """
    (path,) = directory.rglob("*.xplane.pb")
    events = device_events(jax.profiler.ProfileData.from_file(str(path)))
    if not events:
        raise ValueError("the trace contains no kernels of the device")
    names: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for name, start, end in events:
        names[name] += (end - start) / 1e9 / steps
        kinds[kind_of(name)] += (end - start) / 1e9 / steps
    slowest = {kind_of(name): name for name, _ in reversed(names.most_common())}
    first, last = min(start for _, start, _ in events), max(end for *_, end in events)
    total = (last - first) / 1e9 / steps
    return {
        "kinds": dict(kinds), "slowest": slowest, "seconds": total,
        "idle": total - busy((start, end) for _, start, end in events) / 1e9 / steps,
        "kernels": names.most_common(10),
    }  # fmt: skip


def device_events(profile: jax.profiler.ProfileData) -> list[tuple[str, float, float]]:
    """Return (name, start, end) in nanoseconds of the kernels of the first device.

    On a CPU these are the operations of XLA's threads, without the executor's own events.
    """
    on_cpu = jax.default_backend() == "cpu"
    name, prefix = ("/host:CPU", "tf_XLA") if on_cpu else ("/device:GPU:0", "Stream")
    return [
        (event.name, event.start_ns, event.end_ns)
        for plane in profile.planes
        if plane.name == name
        for line in plane.lines
        if line.name.startswith(prefix)
        for event in line.events
        if not (on_cpu and "::" in event.name)
    ]


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals.

    Example:
      >>> busy([(0, 2), (1, 3), (5, 6)])
      4
    """
    total, covered = 0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0, end - max(start, covered))
        covered = max(covered, end)
    return total
