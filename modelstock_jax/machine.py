"""Properties of the machine."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return the number of cores available to this process, under `taskset` and batch systems."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1
